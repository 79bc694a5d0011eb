"""What the config.json files of all families have in common, for the families' parsers."""

from collections.abc import Callable, Mapping
from typing import Any

from executor.checkpoint.fields import Fields
from executor.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
_TYPES = ("dtype", "torch_dtype")
_NOT_TEXT = ("text_config", "vision_config", "architectures", "model_type", "tie_word_embeddings", *_TYPES)
_ROPE_SECTIONS = ("rope_scaling", "rope_parameters")
_IN_ROPE = ("rope_theta", "mrope_section", "original_max_position_embeddings", "partial_rotary_factor")
VISION_THETA = 10000.0  # the base of the encoders' rotary angles, see executor.layers.vision


def named_architecture(raw: Mapping[str, Any]) -> Any:
    """What `architectures` of a config.json names first, whatever it is; None where it says nothing."""
    named = raw.get("architectures")
    named = next(iter(named), None) if isinstance(named, list | tuple) else named
    return named or None


def read_tied(whole: Fields, nested: Fields | None) -> bool:
    """Whether config.json says that head and embedding are one tensor. The outer flag counts where it says anything.

    What stands in the weights may differ: see executor.checkpoint.head.
    """
    outer = whole.flag("tie_word_embeddings", None)
    inner = nested.flag("tie_word_embeddings", None) if nested else None
    return bool(inner if outer is None else outer)


def read_dtype(whole: Fields, nested: Fields | None) -> str:
    """The type of the weights, bfloat16 where none is named."""
    for holder in (whole, nested):
        for key in _TYPES:
            if holder is not None and key in holder:
                named = holder.text(key).removeprefix("torch.")
                if named not in (*DTYPES, "auto"):
                    raise holder.fault(key, f"one of {', '.join(DTYPES)}")
                return "bfloat16" if named == "auto" else named
    return "bfloat16"


def read_heads(text: Fields, *, heads: int, kv_heads: int) -> tuple[int, int]:
    """Query heads and key/value heads, of which a null means as many; `heads`, `kv_heads` are the class's defaults."""
    num_heads = text.whole("num_attention_heads", heads)
    is_null = "num_key_value_heads" in text.values and "num_key_value_heads" not in text
    num_kv_heads = num_heads if is_null else text.whole("num_key_value_heads", kv_heads)
    if num_heads % num_kv_heads:
        raise text.fault("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    return num_heads, num_kv_heads


def check_full_attention(text: Fields, family: str) -> None:
    """Refuse layers that look at less than the whole context."""
    kinds = text.values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise text.fault("layer_types", f"full_attention everywhere, as {family} is published")


def check_vision(vision: Fields, *, hidden_size: int, num_heads: int, out_hidden_size: int, text_size: int) -> None:
    """Refuse an encoder whose heads do not divide, whose tokens do not fit the text, or that turns otherwise."""
    if hidden_size % num_heads or hidden_size // num_heads % 4:
        raise vision.fault("num_heads", f"a divisor of hidden_size {hidden_size} that leaves a head dim divisible by 4")
    if out_hidden_size != text_size:
        raise vision.fault("out_hidden_size", f"the text model's hidden_size, {text_size}")
    for key in ("in_channels", "in_chans"):
        vision.only(key, (3, 3.0), "3: pictures come as red, green and blue")
    rope = vision.section("rope_parameters")
    if rope is not None:
        rope.only("rope_theta", (VISION_THETA, int(VISION_THETA)), f"{VISION_THETA:g}, as the models are published")
        for key in ("rope_type", "type"):
            rope.only(key, ("axial", "default"), "axial, as the models are published")


def check_outer_keys(whole: Fields, nested: Fields, read: Callable[[Fields], Any]) -> None:
    """Refuse keys of the text model that stand beside a text_config and would change it.

    transformers (5.24) and this project read the text model from text_config alone. Some releases repeat its keys at
    the top level, so what changes nothing is let through. `read` parses a text model's section.
    """
    parsed = read(nested)
    for key, value in whole.values.items():
        if value is None or key in _NOT_TEXT:
            continue
        try:
            same = read(Fields(_with_outer(nested.values, key, value), nested.file, nested.path)) == parsed
        except UserError:
            same = False
        if not same:
            says = f"says {nested.values[key]!r}" if key in nested else "does not say it"
            raise whole.fault(
                key,
                f"nothing there: it belongs into text_config, which {says}, and the text model is read from there "
                f"alone. Move {key} into text_config if it is meant, or remove it",
            )


def _with_outer(text: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The text model's section as if the outer `key` counted; what is said of the rope is laid over its rope."""
    said = next((text[name] for name in _ROPE_SECTIONS if text.get(name)), {})
    said = said if isinstance(said, Mapping) else {}
    if key in _ROPE_SECTIONS and isinstance(value, Mapping):
        return {**text, "rope_scaling": {**said, **value}}
    if key in _IN_ROPE and said:
        return {**text, key: value, "rope_scaling": {**said, key: value}}
    return {**text, key: value}
