#!/usr/bin/env bash
# A recipe for msmodelslim 26.1 may name stages before the main one (`prior`), each with a `dataset` of its own. For a
# text model the main stage then calibrates with the first stage's data: the recipe's own dataset is read and dropped.
# For Qwen3-VL, whose recipes accept `prior` as well, such stages do not run at all. There is no warning of either.
#
# Calibration data are kept under one name for the whole process: whoever asks first decides. So two quantizations in
# one Python process share their data, too.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_msmodelslim_environment
write_tiny_qwen3_vl

cat >"$folder/quantize.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from msmodelslim.core.const import DeviceType
from msmodelslim.core.context import ContextFactory
from msmodelslim.core.quant_service.interface import BaseQuantConfig
from msmodelslim.core.quant_service.modelslim_v1.quant_service import ModelslimV1QuantService
from msmodelslim.core.quant_service.multimodal_vlm_v1.quant_service import MultimodalVLMModelslimV1QuantService
from msmodelslim.model.qwen3.model_adapter import Qwen3ModelAdapter
from safetensors.torch import load_file
from tiny_qwen3_vl import Adapter, linears, model, prompts, text
from transformers import Qwen3Config, Qwen3ForCausalLM

folder, family, prior, main = Path(sys.argv[1]), *sys.argv[2:]
vision, read = family == "qwen3_vl", []


class Dataset:
    """Two calibration sets: "low" has the lower half of the token ids, "high" the upper one."""

    def get_dataset_by_name(self, name):
        read.append(name)
        if vision:
            return prompts(4)
        torch.manual_seed(1)
        first = 0 if name == "low" else 32
        return [[torch.randint(first, first + 32, (1, 40))] for _ in range(4)]


class Qwen3(Qwen3ModelAdapter):
    """Calibration data are token ids already: no tokenizer."""

    def _load_tokenizer(self, **options):
        return None

    def handle_dataset(self, dataset, device=None):
        return dataset


def text_model():
    torch.manual_seed(0)
    config = {name: value for name, value in text.items() if name != "rope_scaling"}
    return Qwen3ForCausalLM(Qwen3Config(**config, tie_word_embeddings=False))


source, to = folder / "source", folder / "quantized"
to.mkdir(parents=True)
(model() if vision else text_model()).save_pretrained(source)
recipe = dict(process=[linears("static")], dataset=main, save=[dict(type="ascendv1_saver")])
if prior != "none":
    step = dict(type="adapt_rotation", stage=1, steps=2, layer_type=["up_proj"])
    recipe |= dict(prior=[dict(process=[step], dataset=prior)])
kind = MultimodalVLMModelslimV1QuantService if vision else ModelslimV1QuantService
service = kind(None, Dataset(), ContextFactory())
adapter = Adapter("Qwen3-VL-4B-Instruct", source) if vision else Qwen3("Qwen3-32B", source)
service.quantize(BaseQuantConfig(apiversion=service.backend_name, spec=recipe), adapter, to, DeviceType.CPU)
tensors = {name: tensor for file in to.glob("*.safetensors") for name, tensor in load_file(file).items()}
scale = next(tensors[name] for name in sorted(tensors) if name.endswith("layers.1.mlp.down_proj.input_scale"))
stages = f"main stage on {main}" + (f" after a prior stage on {prior}" if prior != "none" else "")
print(f"{family}, {stages}: read {read}, input_scale of a down_proj {float(scale):.6f}")
(folder / "seen.json").write_text(json.dumps(dict(read=read, scale=float(scale))))
PYTHON

cat >"$folder/compare.py" <<'PYTHON'
import json
import sys
from pathlib import Path

low, high, both, vision = (json.loads((Path(folder) / "seen.json").read_text()) for folder in sys.argv[1:])
main_stage = both["read"] == ["low", "high"] and both["scale"] == low["scale"] != high["scale"]
sys.exit(not (main_stage and vision["read"] == ["high"]))
PYTHON

status=0
cd "$folder"
for run in "qwen3 none low" "qwen3 none high" "qwen3 low high" "qwen3_vl low high"; do
    # shellcheck disable=SC2086
    "$python" quantize.py "$folder/${run// /_}" $run 2>"$folder/log" || { status=1; tail -5 "$folder/log"; }
done
"$python" compare.py qwen3_none_low qwen3_none_high qwen3_low_high qwen3_vl_low_high || status=1
[ "$status" = 0 ] && echo "as found: the main stage takes the prior stage's data; Qwen3-VL's prior stage does not run"
exit "$status"
