#!/usr/bin/env bash
# PyTorch's int8 linear (onednn.qlinear_pointwise) takes signed and unsigned activations. On x86 CPUs with VNNI and
# without AMX oneDNN has a fast product for unsigned ones only: signed ones go to its reference code, and a layer takes
# a hundred to thousands of times as long. Nothing is said and the results are right; 128 added to the activations and
# to their zero point gives the same numbers at full speed.
#
# ONEDNN_MAX_CPU_ISA makes a CPU with AMX take the instructions of one without.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
grep -q -w avx512_vnni /proc/cpuinfo || { echo "this CPU has no AVX-512 VNNI: nothing to show"; exit 2; }
make_environment torch==2.13.0 numpy==2.4.2
export ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16

cat >"$folder/probe.py" <<'PYTHON'
import sys
import time

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
rows, inputs, outputs = 64, 256, 512
weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
x = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8)
packed = torch.ops.onednn.qlinear_prepack(weight, None)
scale, zero = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32)


def measured(activations, zero_point):
    def linear():
        return torch.ops.onednn.qlinear_pointwise(
            activations, 1.0, zero_point, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )

    y, seconds = linear(), []
    for _ in range(5):
        start = time.perf_counter()
        linear()
        seconds.append(time.perf_counter() - start)
    return min(seconds), y


signed_s, signed_y = measured(x, 0)
unsigned_s, unsigned_y = measured((x.int() + 128).to(torch.uint8), 128)
expected = (x.double() @ weight.double().t()).float()
right = torch.equal(signed_y, expected) and torch.equal(unsigned_y, expected)
print(
    f"{rows} rows, {inputs}x{outputs}, one thread: signed activations {signed_s * 1e3:.2f} ms, unsigned"
    f" {unsigned_s * 1e3:.3f} ms, {signed_s / unsigned_s:.0f} times; both right: {right}"
)
sys.exit(signed_s < 30 * unsigned_s or not right)
PYTHON

status=0
"$python" "$folder/probe.py" || status=1
ONEDNN_VERBOSE=1 "$python" "$folder/probe.py" | grep -o -E "matmul,[a-z_0-9:]+,undef,src:[us]8" | sort | uniq -c
[ "$status" = 0 ] && echo "as found: more than 30 times"
exit "$status"
