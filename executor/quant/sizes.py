"""Bytes of a weight of a linear or an expert under each scheme, by arithmetic alone: for estimates before a start.

A scheme's own file says what tensors it keeps; scales and biases are below a percent of the weights.
"""

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED_BYTES = {"w8a8": 1, "w8a8_dynamic": 1, "w8a8_mix": 1, "w8a16": 1, "w8a8s": 1, "w8a8sc": 1, "wint8": 1}
QUANTIZED_BYTES |= {"w4a8_dynamic": 0.5}

MADE_AT_LOAD = ("wint8",)
"""A recipe's words for schemes that are made of float weights while they are loaded, rather than read."""


def weight_bytes(quantization: str, dtype: str) -> float:
    """Of one weight under a settled `quantization` ("none": float weights of `dtype`)."""
    return QUANTIZED_BYTES.get(quantization, FLOAT_BYTES[dtype])
