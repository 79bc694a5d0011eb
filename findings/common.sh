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
