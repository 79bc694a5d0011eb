#!/usr/bin/env bash
# PyTorch has two linears with float16 weights and float32 activations. Where the CPU has no AVX-512 FP16, oneDNN's
# (onednn.linear_dynamic_fp16) takes thousands of times as long as FBGEMM's (quantized.linear_dynamic_fp16): a second or
# more for one row and a quarter of one layer's matrix. Nothing is said, and the results agree.
#
# ONEDNN_MAX_CPU_ISA makes a newer CPU take the instructions of an older one; FBGEMM's code does not depend on it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ "$(uname -m)" = x86_64 ] || { echo "this machine is no x86-64: nothing to show"; exit 2; }
grep -q -w avx2 /proc/cpuinfo || { echo "this CPU has no AVX2: nothing to show"; exit 2; }
make_environment torch==2.13.0 numpy==2.4.2

cat >"$folder/probe.py" <<'PYTHON'
import sys
import time

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
outputs, inputs = 2752, 2048
weight, x = torch.randn(outputs, inputs) / 50, torch.randn(1, inputs)


def measured(linear, times):
    y = linear()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        linear()
        seconds.append(time.perf_counter() - start)
    return min(seconds), y


fbgemm_weight = torch.ops.quantized.linear_prepack_fp16(weight, None)
onednn_weight = torch.ops.onednn.linear_prepack_fp16(weight, list(x.shape))
fbgemm_s, fbgemm_y = measured(lambda: torch.ops.quantized.linear_dynamic_fp16(x, fbgemm_weight), 20)
onednn_s, onednn_y = measured(lambda: torch.ops.onednn.linear_dynamic_fp16(x, onednn_weight, None), 2)
error = float((fbgemm_y - onednn_y).norm() / fbgemm_y.norm())
print(
    f"{sys.argv[1]:<17} {outputs}x{inputs}, one row, one thread: FBGEMM {fbgemm_s * 1e3:.2f} ms, oneDNN"
    f" {onednn_s * 1e3:.0f} ms, {onednn_s / fbgemm_s:.0f} times; results differ by {error:.1e}"
)
sys.exit(onednn_s < 50 * fbgemm_s or error > 2e-3)
PYTHON

status=0
for isa in AVX2 AVX512_CORE AVX512_CORE_BF16; do
    case "$isa" in AVX512_CORE) flag=avx512bw ;; AVX512_CORE_BF16) flag=avx512_bf16 ;; *) flag=avx2 ;; esac
    if ! grep -q -w "$flag" /proc/cpuinfo; then
        echo "$isa not shown: this CPU has none"
        continue
    fi
    ONEDNN_MAX_CPU_ISA="$isa" "$python" "$folder/probe.py" "$isa" || status=1
done
[ "$status" = 0 ] && echo "as found: more than 50 times"
exit "$status"
