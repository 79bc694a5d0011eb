#!/usr/bin/env bash
# xgrammar 0.2.9 compiles JSON schemas with keywords that it does not enforce (uniqueItems, contains, not, dependentRequired,
# oneOf of overlapping branches, pattern beside maxLength) without an error, and lets values through that the schema forbids;
# llguidance 1.9.1 refuses them by name, or enforces them (the last). Servers that hand schemas to either treat "compiled" as "enforced".
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment torch==2.13.0 numpy==2.4.2 xgrammar==0.2.9 llguidance==1.9.1 jsonschema==4.26.0

cat >"$folder/probe.py" <<'PYTHON'
import json
import sys

import jsonschema
import llguidance
import xgrammar

vocabulary = [bytes([byte]) for byte in range(256)] + [b"</s>"]
compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[256]), max_threads=1)

number = {"type": "integer"}
CASES = {  # schema, and a value that it forbids
    "uniqueItems": ({"type": "array", "items": number, "uniqueItems": True}, [1, 1]),
    "contains": ({"type": "array", "items": number, "contains": {"const": 3}}, [1, 2]),
    "not": ({"type": "string", "not": {"const": "a"}}, "a"),
    "dependentRequired": (
        {"type": "object", "properties": {"a": number, "b": number}, "dependentRequired": {"a": ["b"]}}, {"a": 1},
    ),
    "oneOf, overlapping": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, 1),
    "pattern with maxLength": ({"type": "string", "pattern": "^a+$", "maxLength": 2}, "aaa"),
}


def lets_through(schema, value):
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    return matcher.accept_string(json.dumps(value)) and matcher.accept_token(256)


def llguidance_says(schema):
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    return llguidance.LLMatcher.validate_grammar(grammar)


changed = False
for name, (schema, value) in CASES.items():
    forbidden = not jsonschema.Draft202012Validator(schema).is_valid(value)
    try:
        passed = lets_through(schema, value)
        seen = "compiles it and lets the value through" if passed else "compiles it and stops the value"
    except Exception as error:
        passed, seen = False, f"refuses it: {type(error).__name__}"
    refusal = " ".join(llguidance_says(schema).split())
    print(f"{name}: {json.dumps(value)} is {'forbidden' if forbidden else 'allowed'}; xgrammar {seen}; llguidance"
          f" {'refuses it: ' + refusal[:70] if refusal else 'takes it'}")
    changed |= not (forbidden and passed) or (not refusal and name != "pattern with maxLength")
sys.exit(changed)
PYTHON

"$python" "$folder/probe.py" && echo "as found: what is not enforced is not refused"
