"""Reads a recipe with the standard library alone: the part of YAML that recipes are written in.

Sections at the margin, `key: value` below them, comments, quotes, one-line lists and `- item` lists. Anything else
(anchors, mappings in braces, text over several lines, tabs) is refused with its line, never guessed at. Which keys
there are and what they may hold is the schema's business (executor/recipe/schema.py), which infer.sh asks; the doctor
looks at the few keys that the machine decides about.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_KEY = re.compile(r"""^( *)([A-Za-z_][\w.-]*|"[^"]*"|'[^']*')\s*:(?:\s+(.*))?$""")
_INT = re.compile(r"^[-+]?(0|[1-9][\d_]*)$")
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$")
_WORDS = {"null": None, "~": None, "": None}
_WORDS.update({word: word in ("true", "yes", "on") for word in ("true", "yes", "on", "false", "no", "off")})


class RecipeError(ValueError):
    """The user's recipe cannot be read, or asks for something that contradicts itself. Exit status 2."""


@dataclass(frozen=True)
class Wish:
    """What a recipe wants of a machine. The defaults are those of executor/recipe/schema.py (a test compares them)."""

    model_path: str
    device: str = "auto"
    soc: str | None = None
    dtype: str = "auto"
    exe_mode: str = "eager"
    quantization: str = "auto"
    world_size: int = 1
    attn_tp_size: int | None = None
    port: int = 8000


# field of Wish -> section, and what it may be
_PLACES = {
    "model_path": ("model_config", (str,)),
    "device": ("model_config", (str,)),
    "soc": ("model_config", (str, type(None))),
    "dtype": ("model_config", (str,)),
    "exe_mode": ("model_config", (str,)),
    "quantization": ("model_config", (str,)),
    "world_size": ("parallel_config", (int,)),
    "attn_tp_size": ("parallel_config", (int, type(None))),
    "port": ("server_config", (int,)),
}


def read_recipe(text: str, overrides: list[str] | None = None) -> Wish:
    """The Wish of a recipe's text, with `section.key=value` overrides laid over it.

    Raises RecipeError naming the line or the key.
    """
    tree = parse_yaml(text)
    for override in overrides or []:
        name, equals, value = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise RecipeError(f"--set {override}: the form is section.key=value, e.g. --set model_config.device=cpu")
        if not value.strip():
            raise RecipeError(
                f"--set {override}: there is no value (an unset variable of the shell?); write null for none"
            )
        place, kinds = _PLACES.get(key, ("", ()))
        if place == section:  # other keys may hold any text: they are infer.sh's to read
            tree.setdefault(section, {})[key] = _overriding(value, kinds, f"--set {override}")
    values = {}
    for field, (section, kinds) in _PLACES.items():
        if field not in tree.get(section, {}):
            continue
        value = tree[section][field]
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = "a whole number" if int in kinds else "a text"
            raise RecipeError(f"{section}.{field}: wanted {wanted}, got {value!r}")
        if isinstance(value, int) and value < 1:
            raise RecipeError(f"{section}.{field}: wanted a number of 1 or more, got {value}")
        values[field] = value
    if not values.get("model_path"):
        raise RecipeError("model_config.model_path: the recipe names no checkpoint; give its folder or hub id")
    return Wish(**values)


def parse_yaml(text: str) -> dict[str, dict[str, Any]]:
    """Sections of keys. RecipeError with the line number for what this reader does not know."""
    tree: dict[str, dict[str, Any]] = {}
    section: str | None = None
    indent: int | None = None
    items: list[Any] | None = None  # the `- item` list that the last key has begun
    lines = text.lstrip("\ufeff").splitlines()
    for number, raw in enumerate(lines, 1):
        where = f"line {number}"
        line = _without_comment(raw, where).rstrip()
        if not line or line == "---":
            continue
        if "\t" in line[: len(line) - len(line.lstrip())]:
            raise RecipeError(f"{where}: YAML is indented with spaces, not tabs")
        if line.lstrip().startswith("- ") and items is not None:
            items.append(_value(line.lstrip()[2:].strip(), where))
            continue
        found = _KEY.match(line)
        if not found:
            raise RecipeError(f"{where}: expected `key: value`, got {raw.strip()!r}{_ADVICE}")
        depth, key, value = len(found[1]), found[2].strip("\"'"), (found[3] or "").strip()
        if depth == 0:
            if value and value not in ("{}", "null", "~"):
                raise RecipeError(f"{where}: '{key}' is at the margin, where sections stand; a section has no value")
            if key in tree:
                raise RecipeError(f"{where}: the section '{key}' is there twice")
            tree[key], section, indent, items = {}, key, None, None
            continue
        if section is None:
            raise RecipeError(f"{where}: '{key}' stands in no section")
        indent = depth if indent is None else indent
        if depth != indent:
            raise RecipeError(f"{where}: '{key}' is indented by {depth}, the keys before it by {indent}{_ADVICE}")
        if key in tree[section]:
            raise RecipeError(f"{where}: '{section}.{key}' is there twice")
        starts_list = not value and _next_line(lines, number).startswith("- ")
        items = [] if starts_list else None
        tree[section][key] = items if starts_list else _value(value, where)
    return tree


def _overriding(text: str, kinds: tuple[type, ...], where: str) -> Any:
    """The value of an override: a text stands as it is, as infer.sh takes it."""
    plain = text.strip()
    if str not in kinds or plain[:1] in ("'", '"') or (plain in ("null", "~") and type(None) in kinds):
        return _value(plain, where)
    return text


_ADVICE = "; the doctor reads plain recipes only (sections, `key: value`, lists), infer.sh reads all of YAML"


def _next_line(lines: list[str], number: int) -> str:
    for line in lines[number:]:
        if line.strip() and not line.lstrip().startswith("#"):
            return line.strip() + " "
    return ""


def _without_comment(line: str, where: str) -> str:
    """The line up to a `#` that stands outside quotes, at its start or behind a space."""
    quote = ""
    for position, letter in enumerate(line):
        before = line[position - 1] if position else " "
        if quote:
            # A doubled single quote closes and opens again, which comes to the same; \" stays inside.
            quote = "" if letter == quote and not (quote == '"' and before == "\\") else quote
        elif letter in "\"'" and before in " [,:-":
            quote = letter
        elif letter == "#" and before in " \t":
            return line[:position]
    if quote:
        raise RecipeError(f"{where}: the text in {quote} quotes does not end on its line{_ADVICE}")
    return line


def _value(text: str, where: str) -> Any:
    if text[:1] == "[":
        if text[-1:] != "]" or "[" in text[1:] or "{" in text:
            raise RecipeError(f"{where}: a list stands on one line, without lists in it{_ADVICE}")
        return [_value(item, where) for item in _items(text[1:-1])]
    if text == "{}":
        return {}
    if text[:1] == '"':
        try:
            return json.loads(text)
        except ValueError:
            raise RecipeError(f"{where}: {text} is not a text in double quotes") from None
    if text[:1] == "'":
        if len(text) < 2 or text[-1] != "'" or "'" in text[1:-1].replace("''", ""):
            raise RecipeError(f"{where}: {text} is not a text in single quotes")
        return text[1:-1].replace("''", "'")
    if text[:1] in ("&", "*", "!", "|", ">", "{", "%", "@", "`") or ": " in text:
        raise RecipeError(f"{where}: {text!r} is more YAML than the doctor reads{_ADVICE}")
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _FLOAT.match(text):
        return float(text.replace("_", ""))
    return text


def _items(text: str) -> list[str]:
    """The comma-separated items of a list, commas in quotes left alone."""
    found = re.findall(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,]*)\s*(?:,|$)""", text)
    items = [item.strip() for item in found]
    return [item for item in items if item]
