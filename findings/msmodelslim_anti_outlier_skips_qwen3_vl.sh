#!/usr/bin/env bash
# msmodelslim's AntiOutlier (of the calibration scripts) changes nothing in Qwen3-VL with the methods m1, m2, m3 and m5
# and does not say so: what is quantized afterwards is the model as it was.
#
# It smooths behind one class of norm, the first whose name has "norm" in it. In Qwen3-VL that is the vision encoder's
# LayerNorm; a calibration with text never runs it, and no pair of norm and linear is found. A text model of the same
# shape is smoothed.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_msmodelslim_environment

cat >"$folder/probe.py" <<'PYTHON'
import logging
import sys

import torch
from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

text = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
text |= dict(num_key_value_heads=2)
vision = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64)
vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**text))


def qwen3_vl():
    rope = dict(rope_type="default", mrope_section=[4, 2, 2])
    config = Qwen3VLConfig(text_config=text | dict(head_dim=16, rope_scaling=rope), vision_config=vision)
    return Qwen3VLForConditionalGeneration(config)


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def changed(make, method):
    """Number of changed tensors, number of all, warnings."""
    torch.manual_seed(0)
    model = make().eval()
    model.config.architectures = [type(model).__name__]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    warnings = Warnings()
    logging.getLogger("msmodelslim").addHandler(warnings)
    calibration = [[torch.arange(1, 17)[None]], [torch.arange(17, 33)[None]]]
    config = AntiOutlierConfig(anti_method=method, dev_type="cpu", w_bit=8, a_bit=8)
    AntiOutlier(model, calib_data=calibration, cfg=config).process()
    logging.getLogger("msmodelslim").removeHandler(warnings)
    after = model.state_dict()
    new = [n for n, tensor in after.items() if n not in before or not torch.equal(tensor, before[n])]
    return len(new), len(after), warnings.messages


status = 0
for make, methods in ((qwen2, ("m1",)), (qwen3_vl, ("m1", "m2", "m3", "m5"))):
    for method in methods:
        number, of, warnings = changed(make, method)
        print(f"{make.__name__:<8} {method}: {number} of {of} tensors changed, warnings: {warnings}")
        status |= bool(warnings) or (number == 0) != (make is qwen3_vl)
sys.exit(status)
PYTHON

status=0
(cd "$folder" && "$python" probe.py 2>"$folder/log") || { status=1; tail -5 "$folder/log"; }
[ "$status" = 0 ] && echo "as found: the text model is smoothed, Qwen3-VL is left as it was, without a warning"
exit "$status"
