#!/usr/bin/env bash
# msmodelslim's iter_smooth with `symmetric: False` writes biases that the architecture has not: one beside each
# smoothed RMSNorm and one beside each linear that reads it (q, k, v, gate, up), although config.json says
# `attention_bias: false`. The description calls them FLOAT, as it calls biases that belong there.
#
# The norm's bias moves its result, the linears' biases take that back. So a reader that drops both kinds, as
# load_state_dict(strict=False) does, computes the right logits, and one that knows one kind only is far off: "the
# extra tensors make no difference" is a wrong conclusion from the first.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_msmodelslim_environment
write_tiny_qwen3_vl

cat >"$folder/probe.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
from tiny_qwen3_vl import linears, model, prompts, quantize

folder = Path(sys.argv[1])
original = model()
original.save_pretrained(folder / "source")
print("attention_bias in config.json:", original.config.text_config.attention_bias)
smooth = dict(type="iter_smooth", symmetric=False, alpha=0.5, include=["*"])
smooth |= dict(enable_subgraph_type=["norm-linear", "linear-linear", "ov", "up-down"])
tensors, description = quantize(folder / "source", folder / "quantized", [smooth, linears("dynamic")])

weights = {}
for name, tensor in tensors.items():
    scale = tensors.get(f"{name}_scale")
    if not name.endswith(("_scale", "_offset")):
        weights[name] = tensor.float() if scale is None else tensor.float() * scale
added = [name for name in weights if name not in original.state_dict()]
kinds = {"norms": [n for n in added if "norm" in n], "linears": [n for n in added if "_proj" in n]}
for kind, names in kinds.items():
    print(f"biases added to {kind}:", sorted({name.split(".")[-2] for name in names}), f"({len(names)})")
print("their types in the description:", {description[name] for name in added})


def add_bias(bias):
    return lambda module, arguments, result: result + bias


@torch.no_grad()
def logits(network):
    return network(**prompts(1)[0]).logits


def error(*kept):
    """Relative error of the logits when a reader adds these kinds of the added biases."""
    reader = model()
    missing, _ = reader.load_state_dict(weights, strict=False)
    assert not missing, missing
    for name in added:
        if any(name in kinds[kind] for kind in kept):
            reader.get_submodule(name.removesuffix(".bias")).register_forward_hook(add_bias(weights[name]))
    wanted = logits(original)
    return float((logits(reader) - wanted).norm() / wanted.norm())


both, none, norms, only_linears = error("norms", "linears"), error(), error("norms"), error("linears")
print(f"logits, relative error: both kinds added {both:.1%}, both dropped {none:.1%},", end=" ")
print(f"norms' only {norms:.0%}, linears' only {only_linears:.0%}")
found = sorted(len(names) for names in kinds.values()) == [4, 10] and len(added) == 14
found &= {description[name] for name in added} == {"FLOAT"}
sys.exit(not (found and max(both, none) < 0.05 and min(norms, only_linears) > 0.2))
PYTHON

status=0
(cd "$folder" && "$python" probe.py "$folder" 2>"$folder/log") || { status=1; tail -5 "$folder/log"; }
[ "$status" = 0 ] && echo "as found: two kinds of bias that cancel each other, in a model without either"
exit "$status"
