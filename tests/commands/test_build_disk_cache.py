"""A prefix cache on disk that cannot be opened is the user's mistake, in the words of the recipe's key."""

import os

import pytest

from executor.commands.build import build_engine
from executor.errors import UserError
from executor.recipe.schema import build_recipe
from tests.reference import REPO


def recipe_of(path):
    model = {"model_path": str(REPO / "models/tiny/qwen3_vl"), "device": "cpu"}
    return build_recipe({"model_config": model, "scheduler_config": {"prefix_cache_path": str(path)}})


@pytest.mark.parametrize("name", ["checkpoints.json", "checkpoints.lock"])
def test_a_file_that_comes_while_weights_are_read_is_refused_by_the_key(tmp_path, monkeypatch, name):
    monkeypatch.setattr("executor.recipe.settle.root_findings", lambda _: [])
    (tmp_path / name).mkdir()
    reason = "no regular file|Is a directory"
    with pytest.raises(UserError, match=rf"prefix_cache_path: .*/{name} cannot be used \(({reason})"):
        build_engine(recipe_of(tmp_path))


def test_a_folder_of_another_user_is_refused_by_its_key(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(UserError, match=r"prefix_cache_path: .*/prefix-\w+ cannot be used \(a folder of another user"):
        build_engine(recipe)


def test_a_file_of_the_checkpoint_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "/models/notes.json")

    monkeypatch.setattr("executor.commands.build.content_digest", refused)
    with pytest.raises(UserError, match=r"prefix_cache_path: .*notes.json .*known by .Permission denied.; make it rea"):
        build_engine(recipe_of(tmp_path))
