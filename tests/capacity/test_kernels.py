"""Runs the comparison of the count table with the emulator in a process of its own."""

import pytest

from emulator.activate import available
from executor.capacity.kernels import decode_kernels, prefill_kernels, vision_kernels
from tests.capacity.models import QWEN3, published, recipe_of
from tests.emulator.apart import run_apart


def test_the_count_table() -> None:
    if reason := available():
        pytest.skip(reason)
    run_apart("tests/capacity/inside")["test_kernels.py"].check(5)


@pytest.mark.long
def test_the_whole_count_table() -> None:
    if reason := available():
        pytest.skip(reason)
    run_apart("tests/capacity/inside", options=("-m", "long"), timeout_s=3000)["test_kernels.py"].check(100)


def test_a_cpu_counts_no_kernels() -> None:
    _, shapes = published(QWEN3)
    recipe = recipe_of(QWEN3)
    assert decode_kernels(recipe, shapes) == vision_kernels(recipe, shapes) == 0
    assert prefill_kernels(recipe, shapes, 100, has_visual=True) == 0


def test_the_mode_decides_which_kernels_are_counted() -> None:
    _, shapes = published(QWEN3)
    graph, eager = (
        decode_kernels(recipe_of(QWEN3, soc="atlas_800i_a3", exe_mode=mode), shapes) for mode in ("ge_graph", "eager")
    )
    assert graph == 36 * 9 + 11
    assert eager == 36 * 9 + 9
