"""This machine's CPU as a chip: how fast it reads memory and multiplies, measured when asked, in two seconds.

Unlike the figures of config/device/ these are reached, by the products that the CPU backend uses. For floors of
measured times (bench) and for plans on a CPU.
"""

import functools
import time
from collections.abc import Callable

import torch

from executor.capacity.chips import Chip
from executor.device.cpu.ops import CpuOps
from executor.device.weights import DynamicInt8
from executor.host.limits import host_memory_bytes

_READ_BYTES = 128 << 20
_ROWS, _SIZE = 512, 2048
_SLOW_ROWS, _SLOW_SIZE = 64, 512  # of float16, which some CPUs multiply a thousand times slower
_LEAST_S, _LEAST_CALLS = 0.5, 3  # of each measurement
_MEASURED = "measured on this machine"


@functools.cache
def host_chip(dtype: str) -> Chip:
    """This machine for models of `dtype`, all its threads together: one rank has all of it, several share it."""
    memory = host_memory_bytes()
    rates = {dtype: _product_rate(getattr(torch, dtype))}
    figures = ("usable_bytes", "memory_bytes", "bandwidth_bytes_per_s", "flops_per_s", "link_bytes_per_s")
    bandwidth = _read_rate()
    return Chip(
        name="this machine's CPU",
        soc=None,
        memory_bytes=memory,
        usable_bytes=memory,
        bandwidth_bytes_per_s=bandwidth,
        flops_per_s=rates | {"int8": _int8_rate()},
        link="memory",
        link_bytes_per_s=bandwidth / 2,  # what one rank writes another reads
        link_latency_s=20e-6,
        dies_per_node=1,
        sources=dict.fromkeys(figures, _MEASURED)
        | {"link_latency_s": "an assumption, two processes waking each other", "dies_per_node": "one machine"},
    )


def _best_s(function: Callable[[], object]) -> float:
    """Of the fastest call: what the machine can do, whatever else it does meanwhile."""
    function()
    times: list[float] = []
    while sum(times) < _LEAST_S or len(times) < _LEAST_CALLS:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def _read_rate() -> float:
    """Bytes a second of a sum over more than any cache holds, on all threads."""
    numbers = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / _best_s(lambda: numbers.sum())


def _product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large product by the backend's own linears."""
    device = CpuOps()
    rows, size = (_SLOW_ROWS, _SLOW_SIZE) if dtype is torch.float16 else (_ROWS, _SIZE)
    x = torch.full((rows, size), 0.5, dtype=device.compute_dtype(dtype))
    multiply = device.prepare_linear(torch.full((size, size), 0.5, dtype=dtype), None, many_rows=True)
    return 2.0 * rows * size * size / _best_s(lambda: multiply(x))


def _int8_rate() -> float:
    """The same by int8 weights and activations, quantized on the way."""
    weight = DynamicInt8(torch.ones(_SIZE, _SIZE, dtype=torch.int8), torch.ones(_SIZE))
    multiply = CpuOps().prepare_linear(weight, None, many_rows=True)
    x = torch.full((_ROWS, _SIZE), 0.5)
    return 2.0 * _ROWS * _SIZE * _SIZE / _best_s(lambda: multiply(x))
