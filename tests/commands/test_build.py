"""What a command's engine does beside an embedded one's."""

import gc

import pytest

from executor.commands.build import build_engine, engine_of, open_rank
from executor.recipe.schema import build_recipe
from executor.recipe.settle import prepare


@pytest.fixture
def frozen(monkeypatch) -> list[str]:
    """What was asked of the collector, in order."""
    asked: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda *args: asked.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: asked.append("freeze"))
    return asked


def recipe():
    model = {"model_path": "models/tiny/qwen3_vl", "device": "cpu"}
    return build_recipe({"model_config": model, "scheduler_config": {"max_model_len": 256, "max_num_seqs": 2}})


def test_a_commands_engine_is_left_out_of_later_collections(frozen):
    prepared = prepare(recipe())
    with engine_of(prepared, *open_rank(prepared)):
        assert frozen[-2:] == ["collect", "freeze"]


def test_an_embedded_engine_leaves_the_collector_alone(frozen):
    with build_engine(recipe()):
        assert "freeze" not in frozen
