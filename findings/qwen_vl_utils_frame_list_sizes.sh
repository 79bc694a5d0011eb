#!/usr/bin/env bash
# qwen-vl-utils resizes a video given as a list of frames twice, first to multiples of 56 pixels (64 for Qwen3-VL).
#
# The merged patch size (28, 32) is handed to the function for pictures as if it were the patch size, which doubles it.
# Frames whose size already fits are scaled, and have another number of tokens than the same frames in a video file.
# Beside it: resized_height without resized_width counts for nothing, without a word.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment torch==2.13.0 numpy==2.4.2 qwen-vl-utils==0.0.14
add_torchvision 0.28.0

cat >"$folder/probe.py" <<'PYTHON'
import sys

import torchvision_ops  # noqa: F401
from PIL import Image
from qwen_vl_utils import fetch_image, fetch_video, smart_resize

status = 0
# Within the limits of 128 to 768 tokens a frame. The second size of each fits a multiple of 56 or 64 as well.
for patch, sizes in {14: [(420, 420), (448, 448)], 16: [(480, 480), (512, 512)]}.items():
    for height, width in sizes:
        frames = [Image.new("RGB", (width, height))] * 2
        got = tuple(fetch_video({"video": frames}, image_patch_size=patch).shape[-2:])
        tokens = (2 * patch) ** 2
        wanted = smart_resize(height, width, 2 * patch, min_pixels=128 * tokens, max_pixels=768 * tokens)
        print(
            f"patch {patch}: frames of {height}x{width} come out as {got[0]}x{got[1]},"
            f" {got[0] * got[1] // tokens} tokens; by the rule for video files they stay {wanted[0]}x{wanted[1]},"
            f" {wanted[0] * wanted[1] // tokens} tokens"
        )
        status |= wanted != (height, width) or (got == wanted) != ((height, width) == sizes[1])
picture = Image.new("RGB", (420, 420))
one, both = (
    fetch_image({"image": picture, **keys}).size
    for keys in ({"resized_height": 140}, {"resized_height": 140, "resized_width": 140})
)
print(f"picture of 420x420 with resized_height 140: {one}; with resized_width 140 too: {both}")
status |= one != (420, 420) or both != (140, 140)
sys.exit(status)
PYTHON

status=0
"$python" "$folder/probe.py" || status=1
[ "$status" = 0 ] && echo "as found: frames that fit already are scaled; one resized_ key alone is ignored"
exit "$status"
