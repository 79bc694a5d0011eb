#!/usr/bin/env bash
# Qwen3-VL-MoE in transformers 5: what save_pretrained writes is not the published layout, also where that was loaded.
#
# Published files and 4.57 hold the experts as [experts, in, out]. 5.24 holds [experts, out, in] and transposes a loaded
# tensor when its shape does not fit. It saves without transposing back (save_original_format is True by default), so
# readers of the published layout refuse the file. Where hidden_size is twice moe_intermediate_size, as in many a tiny
# test model, both layouts have one shape: 5.24 takes the published gate_up_proj as it is and computes something else
# without a word.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cat >"$folder/probe.py" <<'PYTHON'
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
step, folder = sys.argv[1], Path(sys.argv[2])
hidden, experts = 32, 4
ids = torch.arange(1, 9)[None]
print(f"transformers {transformers.__version__}")


def saved_shapes(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        names = [name for name in sorted(file.keys()) if "experts" in name]
        return {name.split(".")[-1]: file.get_slice(name).get_shape() for name in names}


@torch.no_grad()
def logits(model):
    return model.eval()(ids).logits


def tiny(intermediate):
    text = dict(vocab_size=64, hidden_size=hidden, intermediate_size=48, moe_intermediate_size=intermediate)
    text |= dict(num_experts=experts, num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    text |= dict(num_key_value_heads=2, rope_scaling=dict(rope_type="default", mrope_section=[4, 2, 2]))
    vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=hidden)
    vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
    torch.manual_seed(0)
    # A wider spread than the default 0.02, so that the experts show in the logits.
    text |= dict(initializer_range=0.3)
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


status = 0
for intermediate in (24, 16):
    published, again = folder / f"published{intermediate}", folder / f"again{intermediate}"
    label = f"  hidden {hidden}, expert {intermediate}:"
    if step == "write":
        model = tiny(intermediate)
        model.save_pretrained(published)
        torch.save(logits(model), published / "logits.pt")
        print(label, "wrote", saved_shapes(published))
        status |= saved_shapes(published)["gate_up_proj"] != [experts, hidden, 2 * intermediate]
    elif step == "save_again":
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(published)
        wanted = torch.load(published / "logits.pt")
        error = float((logits(model) - wanted).norm() / wanted.norm())
        model.save_pretrained(again)
        print(label, f"logits {error:.1%} away from the writer's; saved", saved_shapes(again))
        status |= (error > 0.01) != (hidden == 2 * intermediate)
        status |= saved_shapes(again)["gate_up_proj"] != [experts, 2 * intermediate, hidden]
    elif hidden != 2 * intermediate:
        # 5.24's config.json names its rope otherwise; the published one describes the same model.
        shutil.copy(published / "config.json", again)
        try:
            Qwen3VLMoeForConditionalGeneration.from_pretrained(again)
            refused = "no"
        except RuntimeError as error:
            refused = str(error).splitlines()[-1].strip()
        print(label, "refused:", refused)
        status |= "size mismatch" not in refused
sys.exit(status)
PYTHON

make_environment torch==2.13.0 transformers==4.57.6
status=0
"$python" "$folder/probe.py" write "$folder" || status=1
pip_install transformers==5.24.0
"$python" "$folder/probe.py" save_again "$folder" || status=1
pip_install transformers==4.57.6
"$python" "$folder/probe.py" read "$folder" || status=1
[ "$status" = 0 ] && echo "as found: saved in another layout than loaded, and computed wrongly where the shapes agree"
exit "$status"
