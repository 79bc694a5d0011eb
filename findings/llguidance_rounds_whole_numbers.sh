#!/usr/bin/env bash
# llguidance compiles `const` and `enum` of a JSON schema through float64: of a whole number beyond 2^53 (an identifier,
# say) the grammar lets through only its rounded neighbour, and forbids the value that the schema names. `minimum` lets
# through a number below the bound. Nothing is said; numbers up to 2^53 are as the schema says.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment llguidance==1.9.1

cat >"$folder/probe.py" <<'PYTHON'
import json
import sys

from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def takes(schema, text):
    """Whether a model that is held to the schema may write the text, and end there."""
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


small, large = 2**53 - 1, 2**53 + 1  # the second has no float64
cases = [  # schema, what is written, what JSON Schema says, what is seen
    ({"const": small}, small, True, True),
    ({"const": small}, small - 1, False, False),
    ({"const": large}, large, True, False),
    ({"const": large}, large - 1, False, True),
    ({"enum": [1, large]}, large, True, False),
    ({"enum": [1, large]}, large - 1, False, True),
    ({"type": "integer", "minimum": large}, large - 1, False, True),
]
changed = False
for schema, value, valid, expected in cases:
    seen = takes(schema, str(value))
    changed |= seen != expected
    print(f"{json.dumps(schema):<52} {value}: valid {valid!s:<5} taken {seen!s:<5} {'' if seen == valid else '<- differs'}")
sys.exit(changed)
PYTHON

"$python" "$folder/probe.py" && echo "as found"
