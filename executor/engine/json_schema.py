"""JSON schemas before the grammar library has them: what it cannot see, or would take too long over, is refused here.

Invariant: the schema that comes out allows exactly the values of the one that went in; keywords that rule nothing out
are dropped where the library knows none of their kind. What JSON Schema says nothing about is an annotation.
Does not know the library, tokens or requests.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from math import lcm
from typing import Any

from executor.errors import UserError

MAX_DEPTH = 100  # of lists and objects in a schema
MAX_PROPERTIES = 2000  # of one object
MAX_OPTIONAL = 400  # of them not required: each may come next, and the library reads that many at a time
MAX_MULTIPLE = 10_000  # all multipleOf together: the automaton counts up to their least common multiple

KEYWORDS = (
    *("type", "enum", "const", "anyOf", "oneOf", "allOf", "not", "if", "then", "else", "$ref", "$defs", "definitions"),
    *("properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties"),
    *("maxProperties", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "items", "prefixItems"),
    *("additionalItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains", "maxContains"),
    *("unevaluatedItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength"),
    *("maxLength", "pattern", "format", "dependencies", "$anchor", "$dynamicRef", "$dynamicAnchor", "$id", "$schema"),
)
ANNOTATIONS = (
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"),
    *("contentEncoding", "contentMediaType", "contentSchema", "discriminator", "nullable", "strict", "name"),
)
FREE_FORMATS = ("password", "binary")  # of OpenAPI: how a text is shown or carried, not which texts there are
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = (
    *("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
_ALIKE = 0.86  # difflib's ratio from which a keyword is taken for a misspelt one


def checked_schema(source: str) -> dict[str, Any]:
    """A schema's JSON text, parsed, without what rules nothing out; `true` as an object. Raises UserError."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the schema is no JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise UserError(f"the schema is {type(schema).__name__} {str(schema)[:60]}; allowed: a JSON object")
    if schema is False:
        raise UserError("the schema is false, which nothing satisfies")
    if schema is True:
        return {}
    if _depth(schema) > MAX_DEPTH:
        raise UserError(f"the schema is nested more than {MAX_DEPTH} deep; move inner parts to $defs")
    multiples = {1}
    for part, place in _parts(schema, "schema"):
        _check_keys(part, place)
        _check_properties(part, place)
        multiples.add(_multiple(part, place))
        _drop_idle(part)
    if lcm(*multiples) > MAX_MULTIPLE:
        raise UserError(
            f"the schema's multipleOf have the least common multiple {lcm(*multiples)} (in units of their last digit); "
            f"at most {MAX_MULTIPLE} can be enforced"
        )
    schema.pop("x-guidance", None)  # options of the library are this server's
    return schema


def _depth(tree: Any) -> int:
    """How deep lists and objects lie in each other. Without recursion: what is too deep must not raise."""
    level, depth = [tree], 0
    while level:
        depth += 1
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return depth


def _parts(schema: Any, place: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The schema and all that stand in it, each with where it stands."""
    if not isinstance(schema, dict):
        return
    yield schema, place
    for key in _MAPS:
        if isinstance(schema.get(key), Mapping):
            for name, part in schema[key].items():
                yield from _parts(part, f"{place}.{key}.{name}")
    for key in (*_LISTS, *_SINGLE):
        value = schema.get(key)
        for number, part in enumerate(value if isinstance(value, list) else ()):
            yield from _parts(part, f"{place}.{key}[{number}]")
        yield from _parts(value, f"{place}.{key}")


def _check_keys(part: Mapping[str, Any], place: str) -> None:
    """A misspelt keyword rules nothing out, which nobody has wished."""
    for key in part:
        if key in KEYWORDS or key in ANNOTATIONS or key.startswith("x-"):
            continue
        alike = [known for known in KEYWORDS if known.lower() == key.lower()]
        alike += difflib.get_close_matches(key, KEYWORDS, 1, _ALIKE)
        if alike:
            raise UserError(f"{place} has the key '{key}', which JSON Schema does not know; '{alike[0]}' is meant?")


def _check_properties(part: Mapping[str, Any], place: str) -> None:
    properties, required = part.get("properties"), part.get("required")
    if not isinstance(properties, Mapping):
        return
    names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    num_optional = len(properties.keys() - set(names))
    if len(properties) > MAX_PROPERTIES or num_optional > MAX_OPTIONAL:
        raise UserError(
            f"{place} has {len(properties)} properties, {num_optional} of them not required; at most {MAX_PROPERTIES} "
            f"and {MAX_OPTIONAL} can be enforced"
        )


def _multiple(part: Mapping[str, Any], place: str) -> int:
    """multipleOf in units of its last digit that is not 0; 1 where there is none."""
    value = part.get("multipleOf")
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{place}.multipleOf is {value!r}; allowed: a number above 0")
    digits = Decimal(repr(value)).normalize().as_tuple().digits
    return int("".join(map(str, digits)))


def _drop_idle(part: dict[str, Any]) -> None:
    """Take out what rules nothing out."""
    if part.get("uniqueItems") is False:
        del part["uniqueItems"]
    if "propertyNames" in part and _takes_all_names(part["propertyNames"]):  # zod writes it for every record
        del part["propertyNames"]
    for key in ("dependentRequired", "dependentSchemas", "dependencies"):
        if part.get(key) == {}:
            del part[key]
    if part.get("format") in FREE_FORMATS:
        del part["format"]


def _takes_all_names(names: Any) -> bool:
    if not isinstance(names, dict):
        return names is True
    return not names.keys() - {"type", *ANNOTATIONS} and names.get("type", "string") == "string"
