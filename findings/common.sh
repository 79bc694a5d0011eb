# Sourced by every finding: `make_environment PACKAGE==VERSION...` gives $python with those packages and nothing else,
# in a temporary folder that goes away with the script; `pip_install` adds to it.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

pip_install() {
    "$python" -m pip --disable-pip-version-check install -q --no-compile "$@"
}

make_environment() {
    "${PYTHON:-python3}" -m venv "$folder/venv"
    python="$folder/venv/bin/python"
    local package names
    # One after another: a torch named first keeps what follows from bringing its own.
    for package in "$@"; do
        pip_install "$package"
    done
    names="$(printf '%s\n' "$@" | sed 's/[=<>[].*//' | paste -sd '|')"
    "$python" -m pip --disable-pip-version-check freeze | grep -i -E "^($names)=="
}

# `add_torchvision VERSION` beside the torch of `make_environment`, whose build it need not fit (CUDA beside a CPU
# torch): `import torchvision_ops` before torchvision declares the operators that its Python part looks up.
add_torchvision() {
    pip_install --no-deps "torchvision==$1"
    echo "torchvision==$1"
    cat >"$folder/torchvision_ops.py" <<'PYTHON'
import importlib.util
from pathlib import Path

import torch

library = torch.library.Library("torchvision", "FRAGMENT")
try:
    for extension in Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*.so"):
        torch.ops.load_library(str(extension))
except OSError:
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PYTHON
}

# msmodelslim 26.1 and what it imports, as `make_environment` does it.
make_msmodelslim_environment() {
    make_environment torch==2.13.0 numpy==2.4.6 transformers==4.57.1 accelerate==1.15.0 scipy==1.17.1 pandas==3.1.1 \
        easydict==1.14 einops==0.8.2 pydantic==2.14.4 wcmatch==12.0.1 pygtrie==2.6.2 requests==2.34.2
    pip_install --no-deps msmodelslim==26.1.0
    echo "msmodelslim==26.1.0"
}

# The module `tiny_qwen3_vl`: a random Qwen3-VL and `quantize`, which puts it through msmodelslim's newer pipeline (that
# of the command `msmodelslim quant`) on a CPU. Its calibration data are tensors: no processor, no pictures.
write_tiny_qwen3_vl() {
    umask 027 # msmodelslim refuses files that others may write
    cat >"$folder/tiny_qwen3_vl.py" <<'PYTHON'
import gc
import json

import torch
from msmodelslim.core.const import DeviceType
from msmodelslim.core.context import ContextFactory
from msmodelslim.core.quant_service.interface import BaseQuantConfig
from msmodelslim.core.quant_service.multimodal_vlm_v1.quant_service import MultimodalVLMModelslimV1QuantService
from msmodelslim.model.qwen3_vl.model_adapter import Qwen3VLModelAdapter
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

text = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
text |= dict(num_key_value_heads=2, head_dim=16, initializer_range=0.2)
text |= dict(rope_scaling=dict(rope_type="default", mrope_section=[4, 2, 2], mrope_interleaved=True))
vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64, patch_size=4)
vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
ids = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
gc.freeze()  # msmodelslim collects garbage after each step of each layer: not what was imported


def model(dtype=torch.float32):
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return Qwen3VLForConditionalGeneration(config).to(dtype).eval()


def prompts(number):
    """Pictures of 4x4 patches (2x2 tokens), each followed by text."""
    torch.manual_seed(1)
    out = []
    for _ in range(number):
        tokens = torch.tensor([[62, *[60] * 4, 63, *torch.randint(0, 60, (20,)).tolist()]])
        prompt = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), logits_to_keep=0)
        out.append(prompt | dict(pixel_values=torch.randn(16, 3 * 2 * 4 * 4), image_grid_thw=torch.tensor([[1, 4, 4]])))
    return out


class Adapter(Qwen3VLModelAdapter):
    def handle_dataset(self, dataset, device=None):
        return dataset


class Dataset:
    def get_dataset_by_name(self, name):
        return prompts(8)


def linears(activation, include=("*",), weight="int8"):
    """A step of the recipe: quantize linears; activation "static" or "dynamic"."""
    static = activation == "static"
    act = dict(scope="per_tensor" if static else "per_token", dtype="int8", symmetric=not static, method="minmax")
    weights = dict(scope="per_channel", dtype=weight, symmetric=True, method="minmax")
    return dict(type="linear_quant", qconfig=dict(act=act, weight=weights), include=list(include))


def quantize(source, to, steps, saver="ascendv1_saver"):
    """What the steps write for the checkpoint in `source`: (tensors, description)."""
    service = MultimodalVLMModelslimV1QuantService(None, Dataset(), ContextFactory())
    recipe = dict(process=steps, save=[dict(type=saver)])
    to.mkdir()
    adapter = Adapter("Qwen3-VL-4B-Instruct", source)
    service.quantize(BaseQuantConfig(apiversion=service.backend_name, spec=recipe), adapter, to, DeviceType.CPU)
    tensors = {name: tensor for file in to.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return tensors, json.loads(next(to.glob("quant_model_description*.json")).read_text())
PYTHON
}
