"""Puts pydantic's findings into plain words: which key, what it got, what is allowed, what the key is for."""

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from executor.errors import UserError, nearest
from executor.recipe.file import unknown_key

_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a mapping"}
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "a text": "texts"}


def plain_words(
    error: ValidationError, schema: type[BaseModel], source: str, overrides: Mapping[str, str] | None = None
) -> UserError:
    """One UserError for all findings, a line each, every line naming where the value stands.

    That is `source`, the recipe's file, or the override of `overrides` ("section.key" to what the user typed).
    """
    sections = {field.alias: field.annotation for field in schema.model_fields.values()}
    lines: dict[str, None] = {}  # a union reports each of its branches: the same line once
    for finding in error.errors(include_url=False):
        place = ".".join(str(part) for part in finding["loc"][:2])
        lines[f"{(overrides or {}).get(place, source)}: {_sentence(finding, sections)}"] = None
    return UserError("\n".join(lines))


def _sentence(finding: Any, sections: dict[str, type[BaseModel]]) -> str:
    section_name, *rest = finding["loc"]
    got = finding["input"]
    if section_name not in sections:
        return _unknown_section(str(section_name), sections)
    section = sections[section_name]
    if not rest:
        if finding["type"] == "missing":
            return f"the section {section_name} is missing; it must name model_path"
        keys = ", ".join(section.model_fields)
        return f"{section_name}: got {_show(got)}; allowed: `key: value` lines with the keys {keys}"
    key = rest[0]
    field = section.model_fields.get(key)
    if field is None:
        return unknown_key(str(key), section_name, sections)
    purpose = " ".join((field.description or "").split())
    if finding["type"] == "missing":
        return f"{section_name}.{key} is missing: {purpose}"
    finite = ", finite" if finding["type"] == "finite_number" else ""
    return f"{section_name}.{key}: got {_show(got)}; allowed: {allowed_values(field)}{finite}. {purpose}"


def _unknown_section(name: str, sections: dict[str, type[BaseModel]]) -> str:
    owners = [alias for alias, section in sections.items() if name in section.model_fields]
    if owners:
        return f"'{name}' stands outside the sections; it belongs in {owners[0]}"
    return f"unknown section '{name}'{nearest(name, sections)}; sections: {', '.join(sections)}"


def _show(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    kind = {str: "text", int: "number", float: "number", list: "list", tuple: "list", dict: "mapping"}
    return f"{text} ({kind.get(type(value), type(value).__name__)})"


def allowed_values(field: FieldInfo) -> str:
    """In words, what a field takes: `a whole number, at least 1, or null`."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        return _describe(inner, [*metadata, *more])
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(annotation))
    if origin in (types.UnionType, typing.Union):
        parts = [_describe(part, metadata) for part in typing.get_args(annotation) if part is not type(None)]
        return " or ".join(parts) + ", or null"
    if origin is tuple:
        item = _describe(typing.get_args(annotation)[0])
        kind, comma, bounds = item.partition(", ")
        return f"a list of {_PLURALS.get(kind, kind)}{comma}{bounds}"
    return ", ".join([_KINDS.get(origin or annotation, str(annotation)), *_bounds(metadata)])


def _bounds(metadata: Iterable[Any]) -> list[str]:
    words = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            words += _bounds(item.metadata)
        elif isinstance(item, annotated_types.Ge):
            words.append(f"at least {item.ge}")
        elif isinstance(item, annotated_types.Gt):
            words.append(f"more than {item.gt}")
        elif isinstance(item, annotated_types.Le):
            words.append(f"at most {item.le}")
        elif isinstance(item, annotated_types.MultipleOf):
            words.append(f"a multiple of {item.multiple_of}")
        elif isinstance(item, annotated_types.MinLen):
            words.append("not empty")
    return words
