"""What a user says that must hold, in words: "32 users, 4 pictures of 1080p, 8k context, TPOT 50 ms".

Phrases stand between commas, in any order; what is not said is the recipe's plan_config. Context is the text of a
prompt, pictures come on top of it; `in all` bounds prompt, pictures and answer together. 1k is 1024 tokens.
Knows words only: whether a demand can be held is searched elsewhere (executor/capacity/search.py).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from executor.errors import UserError, printable

PICTURE_SIZES = {
    "480p": (854, 480), "720p": (1280, 720), "hd": (1280, 720), "1080p": (1920, 1080), "full hd": (1920, 1080),
    "1440p": (2560, 1440), "4k": (3840, 2160), "2160p": (3840, 2160),
}  # fmt: skip
QUANTIZATIONS = {
    "w8a8": "w8a8", "w8a8_dynamic": "w8a8_dynamic", "w8a8sc": "w8a8sc",
}  # fmt: skip
FLOATS = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
UNDERSTOOD = (
    "32 users", "4 pictures of 1080p (480p, 720p, 1080p, 1440p, 4k, 1920x1080)", "8k context (text of a prompt)",
    "10k in all (prompt, pictures and answer)", "500 output tokens", "TPOT 50 ms", "TTFT 2 s", "1000 tokens/s",
    "at most 16 dies", "bf16, fp16, w8a8, w8a8_dynamic or w8a8sc", "a model as Qwen3-VL-8B",
    "a chip as 910b4, A2 or 300I DUO",
)  # fmt: skip
SOCS = {
    "a2": "atlas_800i_a2", "800i a2": "atlas_800i_a2", "atlas 800i a2": "atlas_800i_a2",
    "a3": "atlas_800i_a3", "800i a3": "atlas_800i_a3", "atlas 800i a3": "atlas_800i_a3",
    "duo": "atlas_300i_duo", "300i duo": "atlas_300i_duo", "atlas 300i duo": "atlas_300i_duo",
}  # fmt: skip


@dataclass(frozen=True)
class Demand:
    """What must hold; None: not said. `text_tokens` of a prompt beside its pictures, `total_tokens` of a request."""

    users: int | None = None
    pictures: int | None = None
    picture_size: tuple[int, int] | None = None
    text_tokens: int | None = None
    total_tokens: int | None = None
    output_tokens: int | None = None
    tpot_ms: float | None = None
    ttft_ms: float | None = None
    tokens_per_s: float | None = None
    most_dies: int | None = None
    quantization: str | None = None
    float_type: str | None = None  # of float weights
    model: str | None = None  # a published model
    chip: str | None = None  # a chip of config/device/
    soc: str | None = None  # all chips of this kind


def parse_demand(text: str, models: tuple[str, ...], chips: tuple[str, ...]) -> Demand:
    """The demand that `text` says; `models` and `chips` are the names that it may use.

    Raises UserError for a phrase that is not understood, with those that are, and for one thing said in two ways.
    """
    said: dict[str, Any] = {}
    phrases = [phrase.strip() for phrase in re.split(r"[;；，、。\n]|(?<!\d),|,(?!\d{3}(?:\D|$))|\band\b", text)]
    for phrase in filter(None, phrases):
        found = _understood(phrase, models, chips)
        if found is None:
            raise UserError(
                f"plan_config.demand: '{printable(phrase)}' is not understood{_what_lacks(phrase)}. Understood, "
                f"between commas: {'; '.join(UNDERSTOOD)}"
            )
        for name, value in found.items():
            if said.setdefault(name, value) != value:
                raise UserError(f"plan_config.demand: '{printable(phrase)}' says another {name} than {said[name]}")
    if "text_tokens" in said and "total_tokens" in said:
        raise UserError("plan_config.demand: say the context (text of a prompt) or the tokens in all, not both")
    if not said:
        raise UserError(f"plan_config.demand: it says nothing. Understood: {'; '.join(UNDERSTOOD)}")
    return Demand(**said)


def _what_lacks(phrase: str) -> str:
    """A word on a time without its unit."""
    found = re.fullmatch(r"(tpot|ttft)\D*([\d.]+)", phrase.lower())
    return f": a time needs its unit, as in {found[1].upper()} {found[2]} ms" if found else ""


def _understood(phrase: str, models: tuple[str, ...], chips: tuple[str, ...]) -> dict[str, Any] | None:
    """The fields that one phrase says; None for one that says none."""
    words = " ".join(phrase.lower().split())
    for pattern, meaning in _PHRASES:
        found = re.fullmatch(pattern, words)
        if found:
            return meaning(found)
    if words in QUANTIZATIONS:
        return {"quantization": QUANTIZATIONS[words]}
    if words in FLOATS:
        return {"quantization": "none", "float_type": FLOATS[words]}
    place = words.removeprefix("on ")
    if place in chips:
        return {"chip": place}
    if place.replace("_", " ") in SOCS:
        return {"soc": SOCS[place.replace("_", " ")]}
    name = words.rpartition("/")[2].removesuffix("-instruct")
    model = next((model for model in models if model.lower().removesuffix("-instruct") == name), None)
    return {"model": model} if model else None


def _tokens(text: str) -> int:
    """`8k`, `8,000` or `8192` tokens, at least one."""
    number = text.replace(",", "").replace(" ", "")
    count = float(number[:-1]) * 1024 if number.endswith("k") else float(number)
    return _at_least_one(round(count), "tokens")


def _at_least_one(count: int, what: str) -> int:
    if count < 1:
        raise UserError(f"plan_config.demand: {count} {what}, allowed 1 and more")
    return count


def _above_zero(value: float, what: str) -> float:
    if value <= 0:
        raise UserError(f"plan_config.demand: {value:g} {what}, allowed above 0")
    return value


def _ms(number: str, unit: str) -> float:
    is_micro = unit[0] in "uµμ" or unit.startswith("micro")
    value = float(number) * (1000.0 if unit[0] == "s" else 1e-3 if is_micro else 1.0)
    return _above_zero(value, "ms")


def _pictures(count: str, size: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {"pictures": int(_COUNTS.get(count, count))}
    if size is None:
        return said
    sides = re.fullmatch(r"(\d+) ?[x×] ?(\d+)(?: pixels| px)?", size)
    if not sides and size not in PICTURE_SIZES:
        raise UserError(
            f"plan_config.demand: pictures of '{printable(size)}', understood are WIDTHxHEIGHT and "
            f"{', '.join(PICTURE_SIZES)}"
        )
    chosen = (int(sides[1]), int(sides[2])) if sides else PICTURE_SIZES[size]
    return {**said, "picture_size": tuple(_at_least_one(side, "pixels") for side in chosen)}


_COUNTS = {
    "a": "1", "an": "1", "no": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8",
}  # fmt: skip
_WORDS = "|".join(_COUNTS)
_UNITS = "ms|msec|milliseconds?|s|sec|seconds?|us|µs|μs|microseconds?"
_N, _X = (
    r"(\d{1,3}(?:[, ]\d{3})+|\d+(?:\.\d+)?k|\d+)",
    r"(?:<=?|≤|of|below|under|at most|within|=|:)? ?(\d+(?:\.\d+)?) ?(" + _UNITS + r")",
)
_PHRASES: tuple[tuple[str, Callable[[re.Match[str]], Mapping[str, Any]]], ...] = (
    (
        rf"(\d[\d,]*|{_WORDS}) (?:concurrent |parallel )?(?:users?|requests?|clients?)(?: at once)?",
        lambda found: {"users": _at_least_one(int(_COUNTS.get(found[1], found[1]).replace(",", "")), "users")},
    ),
    (
        rf"(?P<count>\d+|{_WORDS}) ?(?:pictures?|images?)(?: (?:of|at|in) (?P<size>.+?))?(?: each)?",
        lambda found: _pictures(found["count"], found["size"]),
    ),
    (
        rf"(?P<count>\d+|{_WORDS}) (?P<size>{'|'.join(PICTURE_SIZES)}|\d+ ?[x×] ?\d+) (?:pictures?|images?)(?: each)?",
        lambda found: _pictures(found["count"], found["size"]),
    ),
    (
        rf"{_N} (?:tokens of )?(?:context|text|input|prompt)(?: tokens)?",
        lambda found: {"text_tokens": _tokens(found[1])},
    ),
    (rf"(?:context|text|input|prompt)(?: of)? {_N}(?: tokens)?", lambda found: {"text_tokens": _tokens(found[1])}),
    (rf"{_N} (?:tokens )?(?:in all|in total|total)(?: tokens)?", lambda found: {"total_tokens": _tokens(found[1])}),
    (
        rf"{_N} (?:tokens of )?(?:output|answer|answers)(?: tokens)?",
        lambda found: {"output_tokens": _tokens(found[1])},
    ),
    (rf"(?:output|answers?)(?: of)? {_N}(?: tokens)?", lambda found: {"output_tokens": _tokens(found[1])}),
    (rf"tpot {_X}", lambda found: {"tpot_ms": _ms(found[1], found[2])}),
    (rf"ttft {_X}", lambda found: {"ttft_ms": _ms(found[1], found[2])}),
    (rf"(\d+(?:\.\d+)?) ?({_UNITS}) (?:of )?(tpot|ttft)", lambda found: {f"{found[3]}_ms": _ms(found[1], found[2])}),
    (
        r"(\d[\d,]*(?:\.\d+)?) ?(?:output )?(?:tokens?|tok) ?(?:/|per) ?(?:s|second)",
        lambda found: {"tokens_per_s": _above_zero(float(found[1].replace(",", "")), "tokens/s")},
    ),
    (
        r"(?:at most|up to|max|<=?|≤) ?(\d+) (?:dies|die|chips|chip|ranks|npus)",
        lambda found: {"most_dies": _at_least_one(int(found[1]), "dies")},
    ),
)  # fmt: skip
