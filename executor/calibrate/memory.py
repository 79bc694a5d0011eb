"""What a quantization needs of memory at most, before it starts: it does not grow with the number of layers.

Three things follow one another in every stage: its weights are loaded, the samples run through it one by one, its
linears are rounded one by one. Pages of the checkpoint's file count too, as the system counts them.
Legend, in elements per token or patch: n hidden size, I intermediate size.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from executor.calibrate.linears import LinearSource
from executor.calibrate.settings import Settings
from executor.calibrate.stages import VISION, Stage
from executor.checkpoint.headers import TensorInfo
from executor.checkpoint.writing import PIECE_BYTES
from executor.errors import UserError
from executor.recipe.peak import ENCODE_TOKENS

SLACK_BYTES = 96 << 20
"""What allocators keep of what is free again, tokenizer and picture of a prompt, files being written."""
ROUNDING_BYTES = 26
"""Of a weight while it is rounded: as read, and in float32 by itself, folded, divided, rounded; and as int8."""


def stage_bytes(
    names: Sequence[str],
    linears: Sequence[LinearSource],
    catalog: Mapping[str, TensorInfo],
    settings: Settings,
    num_rows: int,
    weight_bytes: int,
) -> int:
    """Of one stage. num_rows: tokens, or patches, of the longest sample. weight_bytes: of a number of its weights."""
    counts = [prod(catalog[name].shape) for name in names]
    # As they were read and in the device's form: what is freed of the first, allocators keep for a while.
    held = 2 * sum(counts) * weight_bytes + sum(catalog[name].num_bytes for name in names)
    largest = max((prod(linear.shape) for linear in linears), default=0)
    dense = [linear for linear in linears if not linear.is_expert]
    widest = max((linear.shape[1] for linear in dense), default=0)
    outputs = sum(linear.shape[0] for linear in dense) + sum(_active(linears))
    activations = num_rows * 4 * (8 * widest + 3 * outputs)
    products = 0
    if settings.rounding == "gptq":
        inputs = {linear.module: linear.shape[1] for linear in dense}
        products = sum(4 * size**2 for size in inputs.values()) + 3 * 8 * widest**2
    running = held + activations
    rounding = sum(counts) + largest * ROUNDING_BYTES
    return max(running if settings.needs_activations else 0, rounding) + products


def _active(linears: Sequence[LinearSource]) -> list[int]:
    """Outputs of one expert: as many as a token meets, and few meet the same one twice; eight of them are enough."""
    return [8 * linear.shape[0] for linear in linears if linear.is_expert][:3]


def most_bytes(
    stages: Sequence[Stage],
    names: Sequence[Sequence[str]],
    linears: Sequence[Sequence[LinearSource]],
    catalog: Mapping[str, TensorInfo],
    settings: Settings,
    num_tokens: int,
    num_patches: int,
    weight_bytes: int,
) -> int:
    """Of the whole, beside what the process holds already."""
    largest = PIECE_BYTES
    for stage, of_stage, held in zip(stages, names, linears, strict=True):
        if not stage.has_weights:
            continue
        rows = num_patches if stage.prefixes[0].startswith(VISION) else num_tokens
        largest = max(largest, stage_bytes(of_stage, held, catalog, settings, rows, weight_bytes))
    return largest + SLACK_BYTES


def check_memory(needed: int, available: int, what: Any) -> None:
    """UserError where the machine has less."""
    if needed > available:
        raise UserError(
            f"{what}: its largest layer and the longest calibration sample need {needed / 1e9:.1f} GB of memory, and "
            f"{available / 1e9:.1f} GB are free; take --dtype bfloat16, --rounding nearest or smaller pictures, or "
            "a machine with more memory"
        )


def patches_of_longest(grids: Sequence[tuple[int, int, int]]) -> int:
    """Of the largest piece of a picture or video; what a pass of the encoder takes where there is none."""
    return max((prod(grid) for grid in grids), default=ENCODE_TOKENS)
