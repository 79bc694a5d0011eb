"""Layers prepared while others are read: each once, none before its tensors, and what is shared at the end."""

import json
import threading

import pytest
import torch
from torch import nn

from executor.checkpoint.early import EarlyPreparation
from executor.checkpoint.load import load_model
from executor.checkpoint.pull import empty, finalize, pull_all, whole
from executor.checkpoint.weights import Checkpoint
from executor.device import ops
from executor.device.cpu.ops import CpuOps
from executor.errors import UserError
from models.registry import family_runner
from tests.reference import FAMILIES, REPO


class Layer(nn.Module):
    def __init__(self, log: list, first: torch.nn.Parameter | None = None) -> None:
        super().__init__()
        self.first, self.second, self.log = empty(2) if first is None else first, empty(3), log

    def pulls(self, catalog, prefix):
        yield whole(f"{prefix}.first", self.first)
        yield whole(f"{prefix}.second", self.second)

    def prepare(self) -> None:
        self.log.append((self, threading.current_thread() is threading.main_thread()))


def filled(early: EarlyPreparation, pulls) -> None:
    with early:
        for pull in pulls:
            early.filled(pull)


def test_a_layer_is_prepared_once_as_soon_as_its_tensors_are_there():
    log: list = []
    model = nn.ModuleDict({"a": Layer(log), "b": Layer(log)})
    pulls = list(pull_all(model, {}, ""))
    early = EarlyPreparation(model, pulls)
    filled(early, pulls[:3])
    assert log == [(model["a"], False)], "b still lacks a tensor"
    finalize(model, done=early.prepared)
    assert log == [(model["a"], False), (model["b"], True)]


def test_a_shared_parameter_is_left_to_the_end():
    log: list = []
    first = Layer(log)
    model = nn.ModuleDict({"a": first, "b": Layer(log, first.first), "c": Layer(log)})
    pulls = list(pull_all(model, {}, ""))
    early = EarlyPreparation(model, pulls)
    filled(early, pulls)
    assert [layer for layer, _ in log] == [model["c"]]


def test_nothing_goes_early_where_a_pull_fills_no_parameter():
    log: list = []
    model = nn.ModuleDict({"a": Layer(log)})
    pulls = [*pull_all(model, {}, ""), whole("staged", torch.empty(2))]
    early = EarlyPreparation(model, pulls)
    filled(early, pulls)
    assert not log and not early.prepared


def test_what_a_layer_says_against_its_weights_is_raised():
    class Refusing(Layer):
        def prepare(self) -> None:
            raise UserError("no such product")

    model = nn.ModuleDict({"a": Refusing([])})
    pulls = list(pull_all(model, {}, ""))
    with pytest.raises(UserError, match="no such product"):
        filled(EarlyPreparation(model, pulls), pulls)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_tables_and_a_tied_head_are_left_after_the_last_tensor(family, monkeypatch):
    folder = REPO / "models" / "tiny" / family
    config, left = json.loads((folder / "config.json").read_text()), []

    def last(model: nn.Module, done: set[nn.Module]) -> None:
        left.extend(
            type(layer).__name__ for layer in model.modules() if hasattr(layer, "prepare") and layer not in done
        )

    monkeypatch.setattr("executor.checkpoint.load.finalize", last)
    device = CpuOps()
    ops.bind(device)
    load_model(lambda: family_runner(config).build_model(config), Checkpoint(folder), device, torch.float32)
    assert left == ["MRope"] + ["Head"] * config["tie_word_embeddings"]
