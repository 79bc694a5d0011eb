"""How a checkpoint turns queries and keys: base, M-RoPE sections, and what stretches them for longer contexts.

Read from `rope_scaling` or `rope_parameters`, with the kind under `rope_type` or `type`, as transformers reads them:
a `rope_scaling` that is there is all of it, `rope_theta` may stand in it or beside it. Kinds that this project does
not compute are refused by name. The angles are computed in executor.layers.rope.
Source: YaRN (arXiv 2309.00071); transformers 5.24, modeling_rope_utils.
"""

import math
from dataclasses import dataclass, field

from executor.checkpoint.fields import Fields
from executor.errors import UserError

KINDS = ("default", "linear", "yarn")
_PLAIN = ("default", "mrope")  # `mrope` is what older files call the plain kind with sections

_STRETCHING = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
               "mscale_all_dim", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor")  # fmt: skip


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """Slow frequencies divided by `factor`, fast ones kept, a ramp between; cos and sin times `attention_factor`.

    A frequency is fast if it turns `beta_fast` times within `original_length` tokens, slow below `beta_slow` times.
    """

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp's ends are rounded outwards to whole frequencies


@dataclass(frozen=True)
class Rope:
    theta: float
    sections: tuple[int, int, int]
    scaling: LinearScaling | YarnScaling | None = None
    unused: tuple[str, ...] = field(default=(), compare=False)  # keys that would stretch a rope of another kind


def read_rope(
    text: Fields,
    head_dim: int,
    *,
    theta: float,
    sections: tuple[int, int, int],
    length: int,
    interleaved: bool,
    nested: bool,
) -> tuple[Rope, int]:
    """The rope of a text model, and the longest context that its config.json vouches for, in tokens.

    `theta`, `sections` and `length` are the class's defaults, `nested` says that the file has a text_config.
    The context is max_position_embeddings; a stretched rope vouches for factor times the original length as well.
    """
    length = text.whole("max_position_embeddings", length)
    rope = text.section("rope_scaling") or text.section("rope_parameters") or Fields({}, text.file, "rope_scaling")
    rope = rope.section("full_attention") or rope  # transformers 5 may nest it by kind of layer
    base = rope.number("rope_theta", text.number("rope_theta", theta, null=True), null=True)
    if base <= 1:
        raise (rope if "rope_theta" in rope else text).fault("rope_theta", "a number above 1")
    holder = rope if "mrope_section" in rope else text
    parts = holder.wholes("mrope_section", sections, length=3, null=True)
    if not interleaved and sum(parts) != head_dim // 2:
        raise holder.fault("mrope_section", f"three numbers whose sum is half the head dim of {head_dim}")
    rope.only("mrope_interleaved", (interleaved,), f"{str(interleaved).lower()}, as this model family has it")
    for holder in (rope, text):
        holder.only("partial_rotary_factor", (1, 1.0), "1: heads turn whole here")
    kind = _kind(rope)
    if kind == "default":
        return Rope(base, parts, unused=tuple(f"{rope.path}.{key}" for key in _STRETCHING if key in rope)), length
    inner = rope.whole("original_max_position_embeddings", None, null=True)
    outer = text.whole("original_max_position_embeddings", None, null=True)
    # transformers lets the text model's own value win, but does not look at it in a file without text_config.
    original = (outer or inner) if nested else (inner or outer)
    if kind == "linear":
        factor = _factor(rope, rope.number("factor"))
        reach = int(factor * original) if original else length
        return Rope(base, parts, LinearScaling(factor)), max(length, reach)
    yarn = _yarn(rope, original or length, length)
    return Rope(base, parts, yarn), max(length, int(yarn.factor * yarn.original_length))


def _kind(rope: Fields) -> str:
    """The kind, `default` where none is named. UserError for one that is not computed, and for two that differ."""
    named = {key: rope.text(key, "default") for key in ("rope_type", "type") if key in rope}
    if named.get("type") == "mrope" and "rope_type" in named:
        del named["type"]  # says that there are sections, which is no contradiction
    kinds = {"default" if name in _PLAIN else name for name in named.values()}
    if len(kinds) > 1:
        raise UserError(
            f"{rope.file}: {rope.path} has rope_type {named['rope_type']} and type {named['type']}; they mean the same "
            "key by its new and its old name: make them equal, or leave one out"
        )
    kind = kinds.pop() if kinds else "default"
    if kind not in KINDS:
        key = next(iter(named))
        raise UserError(
            f"{rope.file}: {rope.path}.{key} is {kind}, a rope that this project does not compute; it computes "
            f"{', '.join(KINDS)} (for long contexts the models' authors advise yarn)"
        )
    return kind


def _yarn(rope: Fields, original: int, length: int) -> YarnScaling:
    is_null = "factor" in rope.values and "factor" not in rope
    factor = _factor(rope, length / original if is_null else rope.number("factor"))  # a null as transformers reads it
    attention = rope.number("attention_factor", None, null=True)
    mscale, mscale_all = (rope.number(key, None, null=True, zero=True) for key in ("mscale", "mscale_all_dim"))
    if attention is None:
        attention = _magnitude(factor, 1.0)
        if mscale and mscale_all:
            attention = _magnitude(factor, mscale) / _magnitude(factor, mscale_all)
    fast = rope.number("beta_fast", None, null=True, zero=True) or 32.0
    slow = rope.number("beta_slow", None, null=True, zero=True) or 1.0
    if fast < slow:
        raise rope.fault("beta_fast" if "beta_fast" in rope else "beta_slow", "beta_fast not below beta_slow")
    # A truncate of null is false in transformers, and an absent one true.
    truncate = bool(rope.flag("truncate", False)) if "truncate" in rope.values else True
    return YarnScaling(factor, original, attention, fast, slow, truncate)


def _factor(rope: Fields, factor: float) -> float:
    if factor < 1:
        raise rope.fault("factor", "a number, at least 1")
    return factor


def _magnitude(factor: float, scale: float) -> float:
    """By how much longer contexts sharpen attention."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
