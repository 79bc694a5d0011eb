"""What this CPU reads and multiplies in a second, measured in the same process, with its threads, as a benchmark.

The best of several tries: anything else on the machine makes a try slower, nothing makes it faster. Rates are of large
operands in main memory; what fits into caches can be read faster, so that a tiny model may lie below its floor.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from executor.device.cpu.int8_products import OneCall

READ_BYTES = 256 * 2**20
ROWS, SIZE = 512, 4096  # of the products
TRY_S, MIN_TRIES = 0.25, 2


@dataclass(frozen=True)
class Rates:
    bytes_per_s: float
    flops_per_s: float
    int8_flops_per_s: float


def measure(dtype: torch.dtype) -> Rates:
    """Of this process's threads; products of `dtype` and of int8 operands. Takes one or two seconds."""
    block = torch.ones(READ_BYTES // 4).view(-1, SIZE)
    vector = torch.ones(SIZE)
    read_s = min(best_s(lambda: block @ vector), best_s(lambda: torch.linalg.vector_norm(block)))
    x, weight = torch.ones(ROWS, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    operations = 2 * ROWS * SIZE * SIZE
    product_s = best_s(lambda: F.linear(x, weight))
    # oneDNN's product, fast on every CPU; that it saturates on some is nothing to its rate. torch._int_mm takes minutes
    # on a CPU without AVX-512.
    x8, product8 = torch.ones(ROWS, SIZE, dtype=torch.int8), OneCall(torch.ones(SIZE, SIZE, dtype=torch.int8))
    int8_s = best_s(lambda: product8.sums(x8))
    return Rates(block.nbytes / read_s, operations / product_s, operations / int8_s)


def best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, after one that does not count."""
    work()
    times_s: list[float] = []
    begun_s = time.perf_counter()
    while len(times_s) < MIN_TRIES or time.perf_counter() - begun_s < TRY_S:
        started_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)
