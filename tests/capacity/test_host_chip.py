"""This machine as a chip: figures that were reached here, so that nothing of theirs can be faster."""

import time

import torch

from executor.capacity.host_chip import host_chip


def test_this_machine_is_measured_once_for_each_type() -> None:
    chip = host_chip("float32")
    assert host_chip("float32") is chip
    assert chip.soc is None and set(chip.flops_per_s) == {"float32", "int8"}
    assert chip.usable_bytes <= chip.memory_bytes


def test_a_plain_product_is_about_as_fast_as_its_figure() -> None:
    chip, a = host_chip("float32"), torch.full((512, 2048), 0.5)
    b, best_s = torch.full((2048, 2048), 0.5), 1e9
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(a, b)
        best_s = min(best_s, time.perf_counter() - started)
    assert 0.2 < 2 * 512 * 2048 * 2048 / best_s / chip.rate("float32") < 5
