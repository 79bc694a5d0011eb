#!/usr/bin/env bash
# PyTorch's int8 linear adds pairs of products in 16 bits where the CPU has no VNNI: sums of full-range values saturate.
# So does torch._int_mm, a plain product of integers with an int32 result.
#
# oneDNN takes the instructions that the CPU has; ONEDNN_MAX_CPU_ISA makes any newer CPU take those of an older one, so
# an AVX2 machine and an AVX-512 machine of the first generation are shown on any x86-64 with VNNI. Weights within
# -63..63 are exact everywhere.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ "$(uname -m)" = x86_64 ] || { echo "this machine is no x86-64: nothing to show"; exit 2; }
make_environment torch==2.13.0 numpy==2.4.2

cat >"$folder/probe.py" <<'PYTHON'
import sys

import torch

torch.manual_seed(0)
inputs, outputs, rows = 2048, 256, 8
x = torch.randint(0, 256, (rows, inputs)).to(torch.uint8)
full = torch.randint(-127, 128, (outputs, inputs)).to(torch.int8)


def linear(x, weight):
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def product(x, weight):
    return torch._int_mm((x.int() - 128).to(torch.int8), weight.T)


def wrong_share(function, weight):
    operand = x.long() - 128 * (function is product)
    exact = operand @ weight.long().T
    # Every sum is below 2**24 here or rounds to the nearest even float32: half a unit of slack. Integers have none.
    slack = exact.abs().double() * 2**-23 * (function is linear)
    return float(((function(x, weight).double() - exact.double()).abs() > slack).double().mean())


shares = [[wrong_share(f, w) for f in (linear, product)] for w in (full, full.clamp(-63, 63))]
(full_linear, full_product), (half_linear, half_product) = shares
print(f"{sys.argv[1]:<18} wrong results with weights in -127..127:", end=" ")
print(f"linear {full_linear:.2%}, _int_mm {full_product:.2%}; in -63..63: {half_linear:.2%}, {half_product:.2%}")
wanted = sys.argv[2] == "saturates"
saturates = [share > 0.5 for share in shares[0]]
sys.exit(saturates != [wanted, wanted] or any(shares[1]) or (not wanted and any(shares[0])))
PYTHON

status=0
for case in AVX2:saturates AVX512_CORE:saturates AVX512_CORE_VNNI:exact; do
    if [ "${case%%:*}" = AVX512_CORE_VNNI ] && ! grep -q avx512_vnni /proc/cpuinfo; then
        echo "AVX512_CORE_VNNI    not shown: this CPU has none"
        continue
    fi
    ONEDNN_MAX_CPU_ISA="${case%%:*}" "$python" "$folder/probe.py" "${case%%:*}" "${case##*:}" || status=1
done
[ "$status" = 0 ] && echo "as found: without VNNI nearly every full-range result is wrong; no error, no warning"
exit "$status"
