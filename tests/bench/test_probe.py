"""What this CPU does in a second: reached here, so that no product of the backend's is far beyond it."""

import time

import torch

from executor.bench.probe import measure


def test_a_plain_product_is_about_as_fast_as_its_figure() -> None:
    started = time.perf_counter()
    rates = measure(torch.float32)
    assert time.perf_counter() - started < 30, "a benchmark measures the CPU between its runs"
    assert rates.bytes_per_s > 0 and rates.int8_flops_per_s > 0.2 * rates.flops_per_s
    a, b, best_s = torch.full((512, 2048), 0.5), torch.full((2048, 2048), 0.5), 1e9
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(a, b)
        best_s = min(best_s, time.perf_counter() - started)
    assert 0.2 < 2 * 512 * 2048 * 2048 / best_s / rates.flops_per_s < 5
