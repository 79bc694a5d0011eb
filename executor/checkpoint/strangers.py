"""Tensors of a checkpoint that no layer reads: which are harmless, and which mean that answers would be wrong.

Knows names and types only. A layer of which this rank reads nothing still names its tensors (`pull.elsewhere`), so
what is unread here is unread on every rank.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from executor.checkpoint.headers import Checkpoint
from executor.checkpoint.pull import Pull
from executor.errors import UserError

IGNORED_UNREAD = ("*.inv_freq",)
"""Tensors that old checkpoints carry and that every model computes for itself."""

NO_SCHEME = (
    "these are quantized weights, and nothing in the folder names their scheme: msmodelslim's have a "
    "quant_model_description.json beside them, which may not have been copied; of other tools take the float "
    "checkpoint of the same model (bfloat16 or float16)"
)
_NOT_DESCRIBED = (
    "these are of a quantized weight, and quant_model_description*.json calls it FLOAT or does not name it: the "
    "description is of other weights, or was changed. Take the one that was written with these weights, or quantize "
    "the model again"
)
QUANTIZED_TYPES = r"F[468]_"
_QUANTIZED = re.compile(
    r"(^|[._])(scale_inv|weight_scale(_\d)?|input_scale(_\d)?|weight_offset|input_offset|deq_scale|quant_bias|"
    r"kv_cache_(scale|offset)|qweight|qzeros|scales|zeros|biases|g_idx|weight_packed|weight_shape|weight_zero_point|absmax|quant_map|SCB|"
    r"quant_state\..*)$"
)
# Computed anew by every model, or of what is not part of it: draft layers that predict further tokens.
_HARMLESS = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|rotary_emb|rotary_pos_emb|cos_cached|sin_cached|position_ids|mtp\w*)(\.|$)"
)
_PARTS = re.compile(r"^model\.(language_model|visual)\.|(^|[._])(lm_head|embed_out|layers\.\d+|blocks\.\d+|experts)\.")
_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")


def unread_names(pulls: Iterable[Pull], checkpoint: Checkpoint, ignore: Iterable[str] = ()) -> tuple[str, ...]:
    """Canonical names that no pull asks for, without what `ignore` (shell patterns) lets pass."""
    patterns = (*IGNORED_UNREAD, *ignore)
    read = {pull.name for pull in pulls}
    return tuple(
        name
        for name in checkpoint.catalog
        if name not in read and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )


def check_unread(pulls: Sequence[Pull], checkpoint: Checkpoint, ignore: Iterable[str] = ()) -> None:
    """UserError for tensors that the whole model's `pulls` leave unread and that its answers depend on.

    Scales and packed weights of a quantizer; parts of the model: layers, heads, experts, norms, biases.
    """
    unread = unread_names(pulls, checkpoint, ignore)
    quantized = [name for name in unread if _QUANTIZED.search(name)]
    if quantized:
        raise UserError(f"{checkpoint.folder}: {named(quantized)} stand beside the weights: {no_scheme(checkpoint)}")
    refuse_unmerged(checkpoint)
    found = [name for name in unread if _PARTS.search(name) and not _HARMLESS.search(name)]
    if not found or any(pull.name not in checkpoint.catalog for pull in pulls):
        return  # loading names what is missing
    hint = "its sizes may be smaller than the weights' (num_hidden_layers, depth, num_experts), or names differ"
    if any("lm_head" in name or "embed_out" in name for name in found):
        hint = "the output head is read as 'lm_head.weight', unless tie_word_embeddings says that it is the embedding"
    raise UserError(
        f"{checkpoint.folder}: {named(found)} are not read, and the model would answer without them; check that "
        f"config.json belongs to these weights: {hint}"
    )


def no_scheme(checkpoint: Checkpoint) -> str:
    """Why quantized tensors among the weights cannot be read as they are."""
    return _NOT_DESCRIBED if checkpoint.is_described else NO_SCHEME


def refuse_unmerged(checkpoint: Checkpoint) -> None:
    """UserError for an adapter's tensors among the model's."""
    found = [name for name in checkpoint.catalog if _ADAPTER.search(name)]
    if found:
        raise UserError(
            f"{checkpoint.folder}: the weights hold an adapter that was not merged ({named(found)}); merge it with "
            "peft (merge_and_unload) and save the model again"
        )


def named(names: Sequence[str], what: str = "tensors") -> str:
    """How many they are, and the first of them."""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{len(names)} {what}, such as {shown}{', ...' if len(names) > 3 else ''}"
