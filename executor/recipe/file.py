"""From the text a user writes to plain values: a recipe's YAML file, and `section.key=value` overrides.

Knows the schema only as a pydantic class whose fields are the sections; checks no values.
"""

import re
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from executor.errors import UserError, nearest
from executor.host.env import find_path
from executor.recipe.place import find_recipe, split_override


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key given twice and reads `1e-6` as a number."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"a key must be text, got {key!r}", node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a point and a signed exponent; people write 1e-6 and 5e5.
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(
    path: str | Path, what: str = "the recipe", example: str = "config/quickstart.yaml is one to start from"
) -> dict[str, Any]:
    """The top-level mapping of a YAML file. UserError when it is missing, empty, not YAML or not a mapping; `what` it
    is and an `example` are for messages."""
    found = find_recipe(path)
    try:
        text = found.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from error
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_place(error)}: not valid YAML: {_problem(error)}") from error
    if tree is None:
        raise UserError(f"{what} {path} is empty; {example}")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {what} must be `key: value` lines, got a {type(tree).__name__}; {example}")
    return tree


def parse_override(text: str, schema: type[BaseModel]) -> tuple[str, str, Any]:
    """`section.key=value` as (section, key, value). UserError for another form or a name the schema lacks.

    The value is read as YAML, except that a text field takes the words as they stand ("Where is it: left?"), and so
    does a list of texts where the value is one file or has no brackets.
    """
    name, raw = split_override(text)
    section_name, dot, key = name.partition(".")
    sections = {field.alias: field.annotation for field in schema.model_fields.values()}
    if not dot:
        owners = [alias for alias, section in sections.items() if section_name in section.model_fields]
        wanted = f"{owners[0]}.{section_name}={raw}" if owners else "section.key=value"
        raise UserError(f"--set {text}: the section is missing; write --set {wanted}")
    section = sections.get(section_name)
    if section is None:
        hint = nearest(section_name, sections)
        raise UserError(f"--set {text}: unknown section '{section_name}'{hint}; sections: {', '.join(sections)}")
    field = section.model_fields.get(key)
    if field is None:
        raise UserError(f"--set {text}: {unknown_key(key, section_name, sections)}")
    return section_name, key, _parse_value(raw, field, text)


def unknown_key(key: str, section_name: str, sections: dict[str, type[BaseModel]]) -> str:
    """What to say of a key that a section does not have: where it belongs, or what it looks like."""
    keys = sections[section_name].model_fields
    owners = [alias for alias, section in sections.items() if key in section.model_fields]
    if owners:
        return f"'{key}' is no key of {section_name}; it belongs in {owners[0]}"
    return f"unknown key '{key}' in {section_name}{nearest(key, keys)}; its keys: {', '.join(keys)}"


def _parse_value(raw: str, field: FieldInfo, text: str) -> Any:
    kinds = _kinds(field.annotation)
    is_list_of_texts = any(get_origin(kind) is tuple and str in _kinds(get_args(kind)[0]) for kind in kinds)
    stripped = raw.strip()
    if str in kinds or is_list_of_texts:
        if stripped in ("null", "~") and type(None) in kinds:
            return None
        if _is_file(raw) or is_list_of_texts and stripped[:1] == "[" and _is_file(stripped[1:-1]):
            return raw if _is_file(raw) else stripped[1:-1]  # whatever marks of YAML its name has
        is_quoted = stripped[:1] in ("'", '"') and stripped[:1] == stripped[-1:] and len(stripped) > 1
        if not is_quoted and not (is_list_of_texts and stripped[:1] == "["):
            return raw
    try:
        value = yaml.load(raw, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {text}: the value is not valid YAML: {_problem(error)}{_quoting(text, kinds)}"
        ) from error
    if is_list_of_texts and isinstance(value, list) and not all(_is_whole_text(item) for item in value):
        raise UserError(f"--set {text}: YAML reads this list as {value}{_quoting(text, kinds)}")
    return value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type, without what pydantic's Annotated adds to them."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (types.UnionType, Union):
        return tuple(kind for part in get_args(annotation) for kind in _kinds(part))
    return (annotation,)


def _is_file(text: str) -> bool:
    try:
        return find_path(text).exists()
    except (OSError, ValueError):  # too long, or a NUL byte
        return False


def _is_whole_text(item: Any) -> bool:
    """Not a number or mapping that was meant as a text, nor a data URL that was cut at its comma."""
    return isinstance(item, str) and not re.fullmatch(r"data:[^,]*;base64", item)


def _quoting(text: str, kinds: tuple[Any, ...]) -> str:
    """How to write what YAML takes for marks of its own."""
    name = text.partition("=")[0]
    if any(get_origin(kind) is tuple for kind in kinds):
        return f"""; put each item in quotes, and all of it for the shell: --set '{name}=["a, #1.png", "b.png"]'"""
    return f"""; put it in quotes, for the shell too: --set '{name}="..."'"""


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]
