"""JSON schemas before the grammar library has them: what it cannot see, or would take too long over, is refused here.

Invariant: the schema that comes out allows exactly the values of the one that went in (but for whole numbers beyond
2**53, see `_check_numbers`); keywords that rule nothing out are dropped where the library knows none of their kind, and
well-known patterns that it cannot read are written otherwise. What JSON Schema says nothing about is an annotation.
Does not know the library, tokens or requests.
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
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
FORMATS = (
    *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri"),
    *(
        "uri-reference",
        "iri",
        "iri-reference",
        "uuid",
        "uri-template",
        "json-pointer",
        "relative-json-pointer",
        "regex",
    ),
)
"""Those of JSON Schema. Another name beside a pattern (zod's "ulid") names what the pattern says."""
SAME_PATTERNS = {
    # Pydantic's Decimal: a number with one digit or more.
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$",
    # zod's email: no dot at the beginning of the local part or at its end, nor two that follow each other.
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^([A-Za-z0-9_'+-]+\.)*[A-Za-z0-9_'+-]*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    ),
}
"""Patterns with look-around, which the library does not read, that schema writers put out -> the same without."""
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
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
        _check_numbers(part, place)
        _drop_idle(part)
        _list_names(part, schema)
        if isinstance(part.get("pattern"), str):
            part["pattern"] = SAME_PATTERNS.get(part["pattern"], part["pattern"])
    common = math.lcm(*multiples)
    if common > MAX_MULTIPLE:
        raise UserError(
            f"the schema's multipleOf have the least common multiple {common} (in units of their last digit); "
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


def _check_numbers(part: dict[str, Any], place: str) -> None:
    """The library takes numbers as float64. A bound between two of them becomes the one inside; a value is refused."""
    for key in ("const", "enum"):
        for number in _whole_numbers(part.get(key)):
            if _float_near(number) != number:
                raise UserError(
                    f"{place}.{key} holds {str(number)[:40]}, which is no exact float64, and numbers are read as such; "
                    "give it as a text"
                )
    for key in _BOUNDS:
        value = part.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and _float_near(value) != value:
            near, is_lower = _float_near(value), key in ("minimum", "exclusiveMinimum")
            if math.isfinite(near) and (near < value) == is_lower:
                near = math.nextafter(near, math.inf if is_lower else -math.inf)
            if not math.isfinite(near):
                raise UserError(f"{place}.{key} is {str(value)[:40]}...; allowed: numbers that a float64 can hold")
            part[key] = int(near)


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(each)


def _float_near(value: int) -> float:
    """Infinite where float64 has nothing as large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _drop_idle(part: dict[str, Any]) -> None:
    """Take out what rules nothing out."""
    if part.get("uniqueItems") is False:
        del part["uniqueItems"]
    if "propertyNames" in part and _takes_all_names(part["propertyNames"]):  # zod writes it for every record
        del part["propertyNames"]
    for key in ("dependentRequired", "dependentSchemas", "dependencies"):
        if part.get(key) == {}:
            del part[key]
    if part.get("format") in FREE_FORMATS or ("pattern" in part and part.get("format", FORMATS[0]) not in FORMATS):
        del part["format"]


def _list_names(part: dict[str, Any], root: Mapping[str, Any]) -> None:
    """A map whose names are listed (zod's record of an enum, Pydantic's dict of one) as an object with these names."""
    names = part.get("propertyNames")
    if isinstance(names, dict) and isinstance(names.get("$ref"), str) and not names.keys() - {"$ref", *ANNOTATIONS}:
        where, _, name = names["$ref"].rpartition("/")
        definitions = root.get(where.removeprefix("#/"))
        names = definitions.get(name) if isinstance(definitions, dict) else None
    if (
        not isinstance(names, dict)
        or names.keys() - {"type", "enum", "const", *ANNOTATIONS}
        or "patternProperties" in part
    ):
        return
    listed = names.get("enum", [names["const"]] if "const" in names else None)
    properties = part.get("properties", {})
    if not isinstance(listed, list) or not isinstance(properties, dict) or names.get("type", "string") != "string":
        return
    others = part.get("additionalProperties", True)
    part["properties"] = {name: properties.get(name, others) for name in listed if isinstance(name, str)}
    part["additionalProperties"] = False
    del part["propertyNames"]


def _takes_all_names(names: Any) -> bool:
    if not isinstance(names, dict):
        return names is True
    return not names.keys() - {"type", *ANNOTATIONS} and names.get("type", "string") == "string"
