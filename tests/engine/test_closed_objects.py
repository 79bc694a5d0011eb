"""Objects without further properties: where they are closed, and where closing them would rule out too much."""

from typing import Any

import pytest

from executor.engine.closed_objects import closed

A = {"type": "object", "properties": {"a": {"type": "integer"}}}
B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
SHUT = {"additionalProperties": False}

CLOSED: dict[str, tuple[Any, Any]] = {  # (schema, as it is enforced)
    "an object": (A, A | SHUT),
    "without properties of its own": (A | {"properties": {}}, A | {"properties": {}} | SHUT),
    "in a property": (
        {"properties": {"x": {"items": A}}, "required": ["x"]},
        {"properties": {"x": {"items": A | SHUT}}, "required": ["x"]} | SHUT,
    ),
    "in a tuple": ({"prefixItems": [A, B], "items": B}, {"prefixItems": [A | SHUT, B | SHUT], "items": B | SHUT}),
    "in draft 7's tuple": ({"items": [A]}, {"items": [A | SHUT]}),
    "in a map": ({"additionalProperties": A}, {"additionalProperties": A | SHUT}),
    "in patterns": ({"patternProperties": {"^x": A}}, {"patternProperties": {"^x": A | SHUT}}),
    "beside patterns": (A | {"patternProperties": {"^x": A}}, A | SHUT | {"patternProperties": {"^x": A | SHUT}}),
    "in $defs": (
        {"$defs": {"a": A}, "definitions": {"b": B}, "anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/definitions/b"}]},
        {
            "$defs": {"a": A | SHUT},
            "definitions": {"b": B | SHUT},
            "anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/definitions/b"}],
        },
    ),
    "alternatives": ({"oneOf": [A, B], "type": "object"}, {"oneOf": [A | SHUT, B | SHUT], "type": "object"}),
    "allOf of one, as Pydantic writes it": (
        {"$defs": {"a": A}, "properties": {"x": {"allOf": [{"$ref": "#/$defs/a"}], "default": {}}}},
        {"$defs": {"a": A | SHUT}, "properties": {"x": {"allOf": [{"$ref": "#/$defs/a"}], "default": {}}}} | SHUT,
    ),
    "a property's name is no keyword": (
        {"properties": {"allOf": A, "$ref": B, "properties": A, "additionalProperties": B}},
        {
            "properties": {
                "allOf": A | SHUT, "$ref": B | SHUT, "properties": A | SHUT, "additionalProperties": B | SHUT,
            }
        } | SHUT,
    ),
    "in itself": (
        {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}} | SHUT,
    ),
}  # fmt: skip
OPEN: dict[str, Any] = {
    "any object": {"type": "object"},
    "no schema of objects": {"type": "string"},
    "further properties are allowed": A | {"additionalProperties": True},
    "further properties have a schema": A | {"additionalProperties": {"type": "null"}},
    "unevaluated properties": A | {"unevaluatedProperties": {"type": "null"}},
    "needs what it does not list": A | {"required": ["z"]},
    "needs more than it lists": A | {"minProperties": 2},
    "const": A | {"const": {"a": 1, "z": 2}},
    "enum": A | {"enum": [{"z": 2}]},
    "allOf": {"allOf": [A, B]},
    "alternatives beside its own": A | {"anyOf": [B, {"required": ["c"]}]},
    "deeper in parts that meet": {"allOf": [{"properties": {"x": A}}, {"properties": {"x": B}}]},
    "by reference": {"$defs": {"b": B}, "allOf": [A, {"$ref": "#/$defs/b"}]},
    "beside a reference": {"$defs": {"b": B}, **A, "$ref": "#/$defs/b"},
    "by references of references": {
        "$defs": {"a/b": B, "c": {"$ref": "#/$defs/a~1b"}},
        "allOf": [A, {"anyOf": [{"$ref": "#/$defs/c"}]}],
    },
    "by an anchor": {"$defs": {"b": B | {"$anchor": "here"}}, "allOf": [A, {"$ref": "#here"}]},
    "no value of the answer": {"not": A, "if": A, "contains": A, "propertyNames": A},
    "in a const": {"const": A, "default": A, "examples": [A]},
}


@pytest.mark.parametrize("name", CLOSED)
def test_what_is_written_of_an_object_is_all_it_holds(name: str):
    schema, enforced = CLOSED[name]
    assert closed(schema) == enforced


@pytest.mark.parametrize("name", OPEN)
def test_an_object_stays_open_where_more_is_needed_or_said(name: str):
    assert closed(OPEN[name]) == OPEN[name]
