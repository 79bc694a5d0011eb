#!/usr/bin/env bash
# What msmodelslim writes for a Qwen3-VL is not what the labels beside it say: three of them mislead a reader.
#
# - `dtype` of config.json: in a bfloat16 or float16 model the unquantized tensors of text layer 0 have that type, those
#   of all later layers are float32, and so are the biases of quantized linears. Later layers are built one by one in
#   PyTorch's default type.
# - `model_quant_type` of the description: FLOAT for a folder whose text linears are all W4A8_DYNAMIC, W8A8 for static
#   attention beside a dynamic MLP. The tensors' own entries are right.
# - `W8A8` as the type of a deq_scale: float32 for a bfloat16 model, int64 that holds float32 bits for all others, also
#   float32 ones. The other saver of the same release, mindie_format_saver, writes float32 for every model.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_msmodelslim_environment
write_tiny_qwen3_vl

cat >"$folder/probe.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
from tiny_qwen3_vl import linears, model, quantize

folder, status = Path(sys.argv[1]), 0
for dtype in ("float32", "float16", "bfloat16"):
    model(getattr(torch, dtype)).save_pretrained(folder / dtype)


def run(name, dtype, *steps, **options):
    return quantize(folder / dtype, folder / f"{name}_{dtype}", list(steps), **options)


def show(what, seen, wanted):
    global status
    print(what, seen)
    status |= seen != wanted


def types(tensors, names):
    return sorted({str(tensors[name].dtype).removeprefix("torch.") for name in names})


for dtype in ("float32", "float16", "bfloat16"):
    tensors, description = run("static", dtype, linears("static"))
    print(f"static W8A8 of a model with dtype {dtype} in config.json:")
    unquantized = [name for name in tensors if description[name] == "FLOAT"]
    quantized = [name.removesuffix(".deq_scale") for name in tensors if name.endswith(".deq_scale")]
    biases = [f"{name}.bias" for name in quantized if f"{name}.bias" in tensors]
    for layer in (0, 1):
        names = [name for name in unquantized if f"language_model.layers.{layer}." in name]
        show(f"  unquantized tensors of text layer {layer}:", types(tensors, names), ["float32"] if layer else [dtype])
    show("  biases of quantized linears:", types(tensors, biases), ["float32"])
    scales = [f"{name}.deq_scale" for name in quantized]
    show("  deq_scale:", types(tensors, scales), ["float32" if dtype == "bfloat16" else "int64"])
    if dtype != "bfloat16":
        scale = tensors[scales[0]]
        other, _ = run("other_saver", dtype, linears("static"), saver="mindie_format_saver")
        same = torch.equal(scale.to(torch.int32).view(torch.float32), other[scales[0]])
        show("  deq_scale of mindie_format_saver:", types(other, scales), ["float32"])
        show("  the int64's low half is that float32:", same, True)

attention, mlp = ["*language_model*self_attn*"], ["*language_model*mlp*"]
for what, steps, label in (
    ("static attention, dynamic MLP", [linears("static", attention), linears("dynamic", mlp)], "W8A8"),
    ("int4 weights everywhere in the text", [linears("dynamic", attention + mlp, weight="int4")], "FLOAT"),
):
    tensors, description = run(what.split(",")[0].replace(" ", "_"), "float32", *steps)
    weights = [name for name in tensors if name.endswith("_proj.weight") and "language_model" in name]
    print(f"{what}: types {sorted({description[name] for name in weights})},", end=" ")
    show("model_quant_type", description["model_quant_type"], label)
sys.exit(status)
PYTHON

status=0
(cd "$folder" && "$python" probe.py "$folder" 2>"$folder/log") || { status=1; tail -5 "$folder/log"; }
[ "$status" = 0 ] && echo "as found: config.json, model_quant_type and the type of deq_scale say something else"
exit "$status"
