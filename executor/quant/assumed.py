"""Which type every linear has in a quantized folder that is not here: the vendor's default choice, by name.

For estimates and for `check`; a folder that is here says it itself (executor/checkpoint/description.py). Source:
msmodelslim 26.1.0's recipes for these models, and the folders that it writes.
"""

import re

from executor.checkpoint.description import FLOAT_TYPE

_NEVER = re.compile(r"^lm_head$|\.mlp\.gate$|\.patch_embed\.|merger")  # heads, routers, what leads into text
_EXPERTS = re.compile(r"\.mlp\.experts$|\.mlp\.experts\.")
# What one scale for all rows rounds too coarsely: the inputs of the MLPs' second linears.
_NEVER_STATIC = re.compile(r"\.mlp\.down_proj$|\.mlp\.linear_fc2$")
_EXPERT_TYPES = {"w8a16": "W8A16", "w4a8_dynamic": "W4A8_DYNAMIC"}
_EVERYWHERE = ("w8a8_dynamic", "w8a16")
_STATIC_TYPES = {"w8a8": "W8A8", "w8a8_mix": "W8A8_MIX", "w8a8s": "W8A8S", "w8a8sc": "W8A8SC", "w4a8_dynamic": "W8A8"}


def assumed_type(name: str, quantization: str) -> str:
    """A description's word for the linear (or experts) `name`, canonical and without `.weight`.

    `quantization`: a recipe's settled word.
    """
    if quantization == "none" or _NEVER.search(name):
        return FLOAT_TYPE
    if _EXPERTS.search(name):
        return _EXPERT_TYPES.get(quantization, "W8A8_DYNAMIC")
    if quantization in _EVERYWHERE:
        return quantization.upper()
    if quantization == "w8a8sc" and name.startswith("model.visual."):
        quantization = "w8a8s"  # the compressor leaves the vision encoder as it is
    assert quantization in _STATIC_TYPES, f"no default choice of layers is known for {quantization}"
    return FLOAT_TYPE if _NEVER_STATIC.search(name) else _STATIC_TYPES[quantization]
