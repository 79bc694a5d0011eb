#!/usr/bin/env bash
# qwen-vl-utils and the times of a video that is given as a list of frames: raw_fps spoils them, fps counts for nothing.
#
# With raw_fps (the rate of the video that the frames were taken from) the metadata name the frames 0, 1, 2, ... at that
# rate, as if they followed each other in it, while total_num_frames is right. transformers' Qwen3-VL processor writes
# "<t seconds>" from these. fps, which sets the rate for a file, is not read for a list: its frames count as 2 a second.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment torch==2.13.0 transformers==5.24.0 qwen-vl-utils==0.0.14
add_torchvision 0.28.0

cat >"$folder/probe.py" <<'PYTHON'
import sys

import torchvision_ops  # noqa: F401
from PIL import Image
from qwen_vl_utils import fetch_video
from transformers import Qwen3VLProcessor

frames = [Image.new("RGB", (448, 448))] * 6  # one a second
right = [0.5, 2.5, 4.5]  # the middle of each pair
cases = [
    (dict(sample_fps=1.0), right),
    (dict(sample_fps=1.0, raw_fps=24.0), [0.0, 0.1, 0.2]),
    (dict(fps=1.0), [0.2, 1.2, 2.2]),
]
status = 0
print(f"six frames, one a second: their pairs are at {right} seconds")
for keys, found in cases:
    _, metadata = fetch_video({"video": frames, **keys}, image_patch_size=16, return_video_metadata=True)
    times = Qwen3VLProcessor._calculate_timestamps(None, list(metadata["frames_indices"]), metadata["fps"])
    times = [float(f"{t:.1f}") for t in times]  # as the prompt has them
    print(f"  {keys}: {times}, total_num_frames {metadata['total_num_frames']:g}")
    status |= times != found
sys.exit(status)
PYTHON

status=0
"$python" "$folder/probe.py" || status=1
[ "$status" = 0 ] && echo "as found: right with sample_fps alone"
exit "$status"
