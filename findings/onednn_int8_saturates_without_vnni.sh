#!/usr/bin/env bash
# PyTorch's int8 linear adds pairs of products in 16 bits where the CPU has no VNNI: sums of full-range values saturate.
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


def wrong_share(weight):
    exact = x.long() @ weight.long().T
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    y = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    # Every sum is below 2**24 here or rounds to the nearest even float32: half a unit of slack.
    return float(((y.double() - exact.double()).abs() > exact.abs().double() * 2**-23).double().mean())


full_range, half_range = wrong_share(full), wrong_share(full.clamp(-63, 63))
print(f"{sys.argv[1]:<18} wrong results: {full_range:7.2%} with weights in -127..127, {half_range:.2%} in -63..63")
wanted = sys.argv[2] == "saturates"
sys.exit((full_range > 0.5) != wanted or half_range != 0)
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
