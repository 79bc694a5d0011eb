"""JSON schemas whose objects take no further properties: what is written of an object is all that it holds.

JSON Schema lets an object that lists `properties` hold any others besides, which the writers of schemas seldom mean and
a model may go on with for ever. Such an object is closed wherever its part of the schema stands alone.
Invariants: whatever satisfies the schema that comes out satisfies the one that went in, provided that the alternatives
of each oneOf exclude each other in that one; and no object is closed that needs what it does not list.
Does not know the library, tokens or requests.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

_OPENERS = ("additionalProperties", "unevaluatedProperties", "enum", "const")  # the schema says itself what more may be
_OF_OBJECTS = (
    *("properties", "patternProperties", "additionalProperties", "required", "propertyNames", "minProperties"),
    *("maxProperties", "enum", "const"),
)
_MAPS = ("properties", "patternProperties")
_DEFINITIONS = ("$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties")  # what not, if, contains take is no value of the answer


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a schema with `additionalProperties: false` wherever an object lists its properties and says no more.

    An object that is described in several parts (allOf, or a $ref or anyOf beside its own keywords) stays as it is, as
    does all inside it: each part knows the others' properties only together with them.
    """
    combined = _combined(schema)
    return _closed(schema, combined)


def _closed(part: Any, combined: set[int]) -> Any:
    if not isinstance(part, Mapping):
        return part
    copy = dict(part)
    for key in (*_MAPS, *_DEFINITIONS):
        if isinstance(part.get(key), Mapping):
            copy[key] = {name: _closed(each, combined) for name, each in part[key].items()}
    for key in (*_LISTS, *_SINGLE):
        if isinstance(part.get(key), list):
            copy[key] = [_closed(each, combined) for each in part[key]]
        elif key in part:
            copy[key] = _closed(part[key], combined)
    if id(part) not in combined and _lists_all(part):
        copy["additionalProperties"] = False
    return copy


def _lists_all(part: Mapping[str, Any]) -> bool:
    """Whether the properties that an object lists are enough for it."""
    properties, required, least = part.get("properties"), part.get("required", ()), part.get("minProperties", 0)
    if not isinstance(properties, Mapping) or any(key in part for key in _OPENERS):
        return False
    is_enough = isinstance(least, int) and least <= len(properties)
    return is_enough and isinstance(required, list | tuple) and all(name in properties for name in required)


def _combined(schema: Mapping[str, Any]) -> set[int]:
    """The ids of all parts that hold for a value together with others."""
    todo = [part for part in _tree(schema, {}) if _num_conjuncts(part) > 1]
    found: set[int] = set()
    for part in todo:
        found.update(id(each) for each in _tree(part, found, schema))
    return found


def _num_conjuncts(part: Mapping[str, Any]) -> int:
    """How many descriptions of an object a part lays over each other."""
    all_of = part.get("allOf")
    number = len(all_of) if isinstance(all_of, list) else 0
    return number + any(key in part for key in _OF_OBJECTS) + sum(key in part for key in ("$ref", "anyOf", "oneOf"))


def _tree(part: Any, known: Any, root: Mapping[str, Any] | None = None) -> Iterator[Mapping[str, Any]]:
    """A part and all inside it; with `root` also what $ref names in there, but definitions only where they are named.

    `known`: ids that are left out, with all inside them.
    """
    todo, seen = [part], set(known)
    while todo:
        part = todo.pop()
        if not isinstance(part, Mapping) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        for key in (*_MAPS, *(_DEFINITIONS if root is None else ())):
            if isinstance(part.get(key), Mapping):
                todo += part[key].values()
        for key in (*_LISTS, *_SINGLE):
            todo += part[key] if isinstance(part.get(key), list) else [part.get(key)]
        if root is not None and "$ref" in part:
            todo.append(_target(part["$ref"], root))


def _target(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a `#/...` reference names; the whole schema where it is of another kind."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return {"allOf": [root, *[each for key in _DEFINITIONS for each in (root.get(key) or {}).values()]]}
    place: Any = root
    for step in reference[2:].split("/"):
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(place, Mapping):
            place = place.get(step)
        elif isinstance(place, list) and step.isdecimal() and int(step) < len(place):
            place = place[int(step)]
        else:
            return None
    return place
