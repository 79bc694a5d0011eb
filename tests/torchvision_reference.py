"""torchvision for the tests alone: transformers' default image and video processors are built on it.

The product does not need it, and its wheel may be built for another torch (CUDA beside a CPU torch), so it lies in a
folder of its own: `TORCHVISION_DIR`, else `.cache/torchvision` in the repository. `install` must run before
transformers is imported, which remembers whether torchvision is there.
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch

_libraries: list[torch.library.Library] = []  # an op lives as long as the Library that declared it


def folder() -> Path:
    default = Path(__file__).resolve().parent.parent / ".cache" / "torchvision"
    return Path(os.environ.get("TORCHVISION_DIR") or default)


def install() -> None:
    """Puts torchvision on the path when its folder is there. Idempotent."""
    if "torchvision" in sys.modules or not (folder() / "torchvision").is_dir():
        return
    try:
        for extension in (folder() / "torchvision").glob("_C*.so"):
            torch.ops.load_library(str(extension))
    except OSError:
        # Built for another torch. On import torchvision registers fakes for two ops of that part: they must exist.
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
    sys.path.insert(0, str(folder()))
    import torchvision  # noqa: F401


def missing() -> str | None:
    """Why there is no reference, for `pytest.skip`; None when there is one, in the folder or installed."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision"):
        return None
    return f"no torchvision in {folder()}: pip install --no-deps --target {folder()} torchvision"
