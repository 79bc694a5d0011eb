"""A prefix cache on disk that cannot be opened is the user's mistake, in the words of the recipe's key."""

import os

import pytest

from executor.commands.build import build_engine
from executor.errors import UserError
from executor.recipe.schema import build_recipe
from tests.reference import REPO


def test_a_folder_of_another_user_is_refused_by_its_key(tmp_path, monkeypatch):
    model = {"model_path": str(REPO / "models/tiny/qwen3_vl"), "device": "cpu"}
    recipe = build_recipe({"model_config": model, "scheduler_config": {"prefix_cache_path": str(tmp_path)}})
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(UserError, match=r"prefix_cache_path: .*/prefix-\w+ cannot be used \(a folder of another user"):
        build_engine(recipe)
