"""The true sizes of the published models, for what needs no weights: checking a recipe, planning, tests.

The numbers stand in published.json and reproduce the published parameter counts.
"""

import functools
import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("published.json")


@functools.cache
def published_shapes() -> dict[str, dict[str, Any]]:
    """Sizes by model name, e.g. Qwen3-VL-8B-Instruct: architecture, parameters, text, vision."""
    return json.loads(_FILE.read_text(encoding="utf-8"))


def published_config(name: str) -> dict[str, Any]:
    """A config.json of the true sizes, in the layout of the published files. KeyError for a name that is none."""
    shape = published_shapes()[name]
    text, vision = dict(shape["text"]), dict(shape["vision"])
    ids = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    top = {"architectures": [shape["architecture"]], "tie_word_embeddings": shape["tie_word_embeddings"], **ids}
    if shape["architecture"].startswith("Qwen2_5"):
        text["rope_scaling"] = {"type": "mrope", "mrope_section": text.pop("mrope_section")}
        return {**top, "dtype": "bfloat16", **text, "vision_config": vision}
    sections = {"mrope_section": text.pop("mrope_section"), "mrope_interleaved": text.pop("mrope_interleaved")}
    text["rope_scaling"] = {"rope_type": "default", **sections}
    return {**top, "text_config": text | {"dtype": "bfloat16"}, "vision_config": vision}


def published_name(model_path: str) -> str | None:
    """The published model whose name this folder or hub id begins with, e.g. of .../Qwen3-VL-8B-Instruct-w8a8."""
    folder_name = model_path.rstrip("/").rpartition("/")[2]
    return max((name for name in published_shapes() if folder_name.startswith(name)), key=len, default=None)


def published_pixels(family: str) -> tuple[int, int]:
    """Least and most pixels of a picture after the resize, by the published preprocessor_config.json of a family."""
    return (3136, 12845056) if family == "qwen2_5_vl" else (65536, 16777216)
