#!/usr/bin/env bash
# Qwen2.5-VL in transformers 5: the text after a video is given positions that the video's frames have as well.
#
# 4.57, like the published description of M-RoPE, lets text resume behind the greatest position of the video; 5.24 resumes
# behind the greatest row or column. The two agree for pictures, whose temporal axis is one step.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cat >"$folder/probe.py" <<'PYTHON'
import inspect
import sys

import torch
import transformers
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

text = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64)
vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=64, tokens_per_second=2)
config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
with torch.device("meta"):
    model = Qwen2_5_VLModel(config)
frames, rows, columns = 4, 2, 2  # in tokens; one second from one pair of frames to the next
video = [config.video_token_id] * (frames * rows * columns)
ids = torch.tensor([[1, config.vision_start_token_id, *video, config.vision_end_token_id, 5]])
given = dict(video_grid_thw=torch.tensor([[frames, 2 * rows, 2 * columns]]), second_per_grid_ts=torch.tensor([1.0]))
if "mm_token_type_ids" in inspect.signature(model.get_rope_index).parameters:
    given["mm_token_type_ids"] = torch.where(ids == config.video_token_id, 2, 0)
positions = model.get_rope_index(ids, **given)[0][:, 0]
last, after = int(positions[:, 2:-2].max()), int(positions[0, -2])
print(
    f"transformers {transformers.__version__}: the video reaches position {last}, the text after it starts at {after}"
)
sys.exit((after <= last) != (sys.argv[1] == "overlap"))
PYTHON

make_environment torch==2.13.0 transformers==4.57.6
status=0
"$python" "$folder/probe.py" behind || status=1
pip_install transformers==5.24.0
"$python" "$folder/probe.py" overlap || status=1
[ "$status" = 0 ] && echo "as found: releases of 4 resumed behind the video, 5.24 within it"
exit "$status"
