#!/usr/bin/env bash
# PyTorch's argmax over a vocabulary takes longer than max(dim=-1), which gives the same indices and the values too;
# both take several times as long as amax, the values alone. One thread, float32.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ "$(uname -m)" = x86_64 ] || { echo "measured on x86-64 alone: nothing to show"; exit 2; }
grep -q -w avx2 /proc/cpuinfo || { echo "this CPU has no AVX2: nothing to show"; exit 2; }
make_environment torch==2.13.0 numpy==2.4.2

cat >"$folder/probe.py" <<'PYTHON'
import sys
import time

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(16, 151936)  # rows of logits, Qwen's vocabulary


def milliseconds(function):
    function()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


argmax, largest, amax = (milliseconds(f) for f in (lambda: x.argmax(-1), lambda: x.max(-1), lambda: x.amax(-1)))
same = torch.equal(x.argmax(-1), x.max(-1).indices)
print(
    f"{torch.backends.cpu.get_cpu_capability():<7} 16 x 151936 float32, one thread: argmax {argmax:.2f} ms,"
    f" max with indices {largest:.2f} ms, amax {amax:.2f} ms; same indices: {same}"
)
sys.exit(not same or argmax < 1.3 * largest or largest < 1.3 * amax)
PYTHON

status=0
"$python" "$folder/probe.py" || status=1
ATEN_CPU_CAPABILITY=avx2 "$python" "$folder/probe.py" || status=1
[ "$status" = 0 ] && echo "as found: amax, then max with indices, then argmax"
exit "$status"
