"""Answers bound by grammars: what a grammar allows, and that nothing else of an answer changes."""

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import AutoModelForImageTextToText

from executor.engine.grammar import GrammarFault, Grammars, Vocabulary
from executor.engine.json_schema import checked_schema
from executor.engine.matcher import Matcher
from executor.errors import UserError
from executor.schedule.request import THINK_END, FinishReason, Grammar, Request, SamplingParams
from tests.engines import engine_over
from tests.reference import REPO

TINY = REPO / "models" / "tiny" / "qwen3_vl"
THING = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{2,3}$"},
        "box": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2,
                "maxItems": 2},
        "tone": {"enum": ["light", "dark"]},
    },
    "required": ["name", "box", "tone"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def grammars(engine) -> Grammars:
    return engine.matchers.grammars


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def calls(*tools: dict[str, Any], parallel: bool = True, **more: Any) -> Grammar:
    is_lazy = more.pop("is_lazy", False)
    return Grammar("calls", json.dumps({"tools": tools, "parallel": parallel, **more}), is_lazy=is_lazy)


def bound(grammar: Grammar | None, max_new_tokens: int = 100, **params: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, grammar=grammar, **params)


def takes(grammars: Grammars, grammar: Grammar, text: str) -> bool:
    """Whether a grammar allows a text, token by token, and may end behind it."""
    matcher = grammars.compiled(grammar).begin()
    for token_id in grammars.vocab(text):
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if not mask[token_id]:
            return False
        matcher.consume_token(token_id)
    return matcher.is_accepting()


# What the grammars allow

SCHEMAS: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {  # (schema, allowed, not allowed)
    "nested": (
        {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}},
         "required": ["b"], "additionalProperties": False}}, "required": ["a"], "additionalProperties": False},
        ('{"a": {"b": 3}}', '{"a":{"b":3}}', '{\n  "a": {\n    "b": 3\n  }\n}'),
        ('{"a": {"b": "x"}}', '{"a": {}}', '{"a": {"b": 3}, "c": 1}', '{"a":   {"b": 3}}', '\n{"a": {"b": 3}}'),
    ),
    "array": ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
              ("[1, 2]", "[1, 2, 3]"), ("[1]", "[1, 2, 3, 4]")),
    "enum": ({"enum": ["a", 1, None]}, ('"a"', "1", "null"), ('"b"', "2")),
    "const": ({"const": {"k": "v"}}, ('{"k": "v"}',), ('{"k": "w"}',)),
    "anyOf": ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, ('"x"', "4"), ("true",)),
    "oneOf that excludes itself": (
        {"oneOf": [{"type": "object", "properties": {"t": {"const": kind}}, "required": ["t"]} for kind in "ab"]},
        ('{"t": "a"}', '{"t": "b"}'), ('{"t": "c"}', "{}"),
    ),
    "allOf": ({"allOf": [{"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
                         for name in "ab"]}, ('{"a": 1, "b": 2}',), ('{"a": 1}', '{"b": 1}')),
    "recursion": (
        {"$defs": {"n": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"anyOf": [
         {"$ref": "#/$defs/n"}, {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": False}},
         "$ref": "#/$defs/n"},
        ('{"v": 1, "next": {"v": 2, "next": null}}',), ('{"v": 1, "next": 3}', '{"v": 1}'),
    ),
    "pattern": ({"type": "string", "pattern": "^[a-c]{2}$", "maxLength": 2}, ('"ab"',), ('"abc"', '"xy"')),
    "range": ({"type": "integer", "minimum": 3, "exclusiveMaximum": 12}, ("3", "11"), ("2", "12", "3.5")),
    "multipleOf": ({"type": "number", "multipleOf": 0.25}, ("1.25", "3"), ("1.3",)),
    "no further properties": ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                              ('{"a": 1}',), ('{"a": 1, "z": "q"}', '{"a": "x"}', '{"z": 1}')),
    "further properties where they are asked for": (
        {"properties": {"a": {"type": "null"}}, "type": "object", "additionalProperties": True},
        ("{}", '{"a": null, "z": "q"}'), ('{"a": 1}',)),
    "any object": ({"type": "object"}, ("{}", '{"z": [1]}'), ("1",)),
    "an object of nothing": ({"type": "object", "properties": {}}, ("{}",), ('{"z": 1}',)),
    "format": ({"type": "string", "format": "date"}, ('"2024-02-03"',), ('"hello"',)),
    "unicode": ({"enum": ["日本", "Zoë 😀"]}, ('"日本"', '"Zoë 😀"'), ('"Zoe"',)),
    "pydantic's": (
        {"$defs": {"Color": {"enum": ["red", "blue"], "title": "Color", "type": "string"}},
         "properties": {"name": {"title": "Name", "type": "string", "format": "password"},
                        "color": {"$ref": "#/$defs/Color"},
                        "size": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "Size"}},
         "required": ["name", "color"], "title": "Thing", "type": "object"},
        ('{"name": "x", "color": "red"}', '{"name": "x", "color": "red", "size": null}'),
        ('{"name": "x", "color": "pink"}', '{"name": "x", "color": "red", "size": "x"}'),
    ),
    "zod's": (
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": {
         "n": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
         "r": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}}},
         "required": ["n", "r"], "additionalProperties": False},
        ('{"n": 5, "r": {"x": 1.5}}',), ('{"n": 5.5, "r": {}}', '{"n": 5, "r": {"x": "y"}}'),
    ),
    "zod's formats with their patterns": (
        {"type": "string", "format": "hex", "pattern": "^[0-9a-f]+$"}, ('"0af"',), ('"x"', '""')),
    "zod's record of an enum": (
        {"type": "object", "propertyNames": {"type": "string", "enum": ["a", "b"]},
         "additionalProperties": {"type": "integer"}, "required": ["a"]},
        ('{"a": 1}', '{"a": 1, "b": 2}'), ("{}", '{"a": "x"}', '{"a": 1, "c": 2}')),
    "pydantic's dict of an enum": (
        {"$defs": {"E": {"enum": ["a", "b"], "title": "E", "type": "string"}}, "type": "object",
         "propertyNames": {"$ref": "#/$defs/E"}, "additionalProperties": {"type": "integer"}},
        ("{}", '{"b": 2}'), ('{"c": 2}', '{"a": "x"}')),
    "names that some properties have": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "properties": {"a": {"type": "null"}, "c": {}}},
        ('{"a": null, "b": [1]}',), ('{"a": 1}', '{"c": 1}')),
    "pydantic's Decimal": (
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
        ('"1"', '"-1.5"', '"+.5"', '"5."', '"007"'), ('"."', '"+"', '""', '"1.2.3"', '"-+1"')),
    "zod's email": (
        {"type": "string", "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@"
         r"([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"},
        ('"a.b\'c+d@x-y.z.org"',), ('".a@x.org"', '"a..b@x.org"', '"a.@x.org"', '"a\'@x.org"', '"a@x.o"')),
    "whole numbers at float64's end": (
        {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**63 - 1},
        ("9007199254740994", "9223372036854774784"), ("9007199254740993", "9223372036854775807", "5")),
    "decomposed characters": ({"const": "e\u0301"}, ('"e\u0301"',), ('"\u00e9"',)),
    "what rules nothing out": ({"type": "array", "items": {"type": "null"}, "uniqueItems": False,
                                "x-order": 1, "examples": [[]]}, ("[]", "[null, null]"), ("[1]",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_allows_what_it_says(grammars, name: str):
    value, good, bad = SCHEMAS[name]
    assert [text for text in good if not takes(grammars, schema(value), text)] == []
    assert [text for text in bad if takes(grammars, schema(value), text)] == []


REFUSED: dict[str, tuple[Grammar, str]] = {
    **{
        name: (schema(value), words)
        for name, (value, words) in {
            "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
            "contains": ({"type": "array", "contains": {"const": 1}}, "contains"),
            "not": ({"not": {"type": "string"}}, "not"),
            "oneOf that overlaps": ({"oneOf": [{"minimum": 0}, {"maximum": 9}]}, "oneOf"),
            "if": ({"type": "object", "if": {}, "then": {"required": ["b"]}}, "if"),
            "property names": ({"type": "object", "propertyNames": {"pattern": "^[a-z]$"}}, "propertyNames"),
            "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
            "unknown format": ({"type": "string", "format": "color-hex"}, "color-hex"),
            "lookahead": ({"type": "string", "pattern": "^(?!ab)[a-z]+$"}, "look"),
            "remote": ({"$ref": "http://127.0.0.1:1/x.json"}, "127.0.0.1"),
            "missing $ref": ({"$ref": "#/$defs/x"}, "x"),
            "endless": ({"$ref": "#"}, "nothing satisfies it"),
            "nothing": (False, "false"),
            "nothing, in it": ({"type": "array", "items": False, "minItems": 1}, "nsatisfiable"),
            "empty enum": ({"enum": []}, "empty"),
            "contradiction": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
            "misspelt keyword": ({"type": "object", "properties": {"a": {"maxLenght": 3}}}, "maxLength"),
            "wrong case": ({"type": "string", "maxlength": 3}, "maxLength"),
            "unknown type": ({"type": "strng"}, "strng"),
            "options of the library": ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
            "no schema": ([1], "allowed: a JSON object"),
            "half a character": ({"enum": ["\ud800"]}, "no JSON"),
            "infinite": ({"maximum": float("inf")}, "no JSON"),
            "a bound beyond float64": ({"minimum": 10**400}, "float64"),
            "a value between float64's": ({"const": {"id": [2**53 + 1]}}, "float64"),
            "a number of any size": ({"default": 10**400}, "no JSON"),
            "a format that nobody describes": ({"type": "string", "format": "jwt"}, "jwt"),
        }.items()
    },
    "no JSON": (Grammar("json_schema", "{"), "no JSON"),
    "regex": (Grammar("regex", "(a"), "unclosed group"),
    "lookahead of a regex": (Grammar("regex", "(?=a)b"), "look-around"),
    "backreference": (Grammar("regex", r"(a)\1"), "backreferences"),
    "no choice": (Grammar("choice", "[]"), "texts"),
    "empty choice": (Grammar("choice", '["a", ""]'), "texts"),
    "grammar": (Grammar("ebnf", "root ::= ("), "cannot be read"),
    "rule that is not there": (Grammar("ebnf", "root ::= foo"), "foo"),
    "arguments no object": (calls({"name": "f", "parameters": {"type": "array"}}), "'f'"),
    "parameters": (calls({"name": "f", "parameters": {"type": "object", "not": {}}}), "not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused(grammars, name: str):
    grammar, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        grammars.compiled(grammar)
    with pytest.raises(UserError, match="^tools: .*"):
        grammars.compiled(replace(grammar, asked_by="tools"))


def nested(depth: int) -> str:
    return '{"type": "array", "items": ' * depth + "true" + "}" * depth


HOSTILE: dict[str, Grammar] = {
    "deep": Grammar("json_schema", nested(5000)),
    "deep in tools": Grammar("calls", f'{{"tools": [{{"name": "f", "parameters": {nested(90)}}}], "parallel": true}}'),
    "multipleOf": schema({"type": "integer", "multipleOf": 999983}),
    "multipleOf together": schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}),
    "multipleOf nan": Grammar("json_schema", '{"multipleOf": NaN}'),
    "optional properties": schema({"type": "object", "properties": {f"p{n}": {} for n in range(5000)}}),
    "cross product": schema({"allOf": [{"anyOf": [{"type": "object", "properties": {f"k{n}": {"const": m}},
                             "required": [f"k{n}"]} for m in range(10)]} for n in range(12)]}),
    "intersection": schema({"allOf": [{"pattern": f"[a-z]*{chr(97 + n)}.{{10}}", "type": "string"}
                                      for n in range(12)]}),
    "long regex": Grammar("regex", "a" * 500_000),
    "parentheses": Grammar("regex", "(" * 5000 + "a" + ")" * 5000),
    "rules in themselves": Grammar("ebnf", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000),
    "counts too far": Grammar("regex", "a{100000}"),
    "counts and counts": Grammar("regex", "(a{1000}){1000}"),
    "must go on for ever": Grammar("ebnf", 'root ::= "a" root'),
    "many choices": Grammar("choice", json.dumps([f"choice number {n}" for n in range(50_000)])),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_quickly(grammars, name: str):
    started = time.process_time()
    with pytest.raises(UserError):
        grammars.compiled(HOSTILE[name])
    assert time.process_time() - started < 1.5


def test_a_regex_that_grows_without_end_is_its_own_requests_fault(engine):
    """It compiles; its masks do not. Others of the batch do not notice."""
    started = time.process_time()
    bomb, plain = engine.generate(
        ["What is a square?"] * 2, [bound(Grammar("regex", "[0-9] ?(a{1000}){1000}")), bound(None)]
    )
    assert time.process_time() - started < 3
    assert bomb.finish_reason is FinishReason.ERROR and "grammar" in bomb.error
    assert plain == replace(engine.generate("What is a square?", bound(None))[0], **_times(plain))


def test_large_grammars_of_good_will_are_taken(grammars):
    assert takes(grammars, Grammar("choice", json.dumps([f"number {n}" for n in range(5000)])), "number 4711")
    properties = {f"p{n}": {"type": "string"} for n in range(300)}
    assert takes(grammars, schema({"type": "object", "properties": properties}), '{"p5": "a", "p299": "x"}')


def test_a_schemas_own_keywords_are_left_as_they_are():
    for value in (THING, {"properties": {"propertyNames": {"uniqueItems": True}, "maxlength": {"type": "null"}}}):
        assert checked_schema(json.dumps(value)) == value


def test_equal_grammars_are_compiled_once(grammars):
    one = grammars.compiled(Grammar("regex", "[0-9]+"))
    assert grammars.compiled(Grammar("regex", "[0-9]" + "+", asked_by="elsewhere")) is one
    assert grammars.compiled(Grammar("choice", '["a"]')) is not one


def test_added_tokens_come_only_where_the_grammar_names_them(grammars):
    vocab = grammars.vocab
    mask = Matcher(_NoThreads(grammars), grammars.compiled(Grammar("regex", "(.|\n)*")), bound(None)).barred()
    assert [token for token in vocab.special_token_ids if not mask[token]] == sorted(vocab.eos_token_ids)
    assert {vocab.tokens[token][0] for token in np.flatnonzero(mask[: min(vocab.special_token_ids)])} <= NO_BEGINNING
    call = Matcher(_NoThreads(grammars), grammars.compiled(calls({"name": "f"})), bound(None)).barred()
    assert np.flatnonzero(~call).tolist() == [vocab.added_id("<tool_call>")]


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar("choice", '["<|im_end|>"]'), "<|im_end|>"),
        (Grammar("choice", '["a <tool_call> b</think>"]'), "a <tool_call> b</think>"),
        (schema({"const": "<|vision_start|>e\u0301"}), '"<|vision_start|>e\u0301"'),
        (
            calls({"name": "<|endoftext|>", "parameters": {"properties": {"<|im_end|>": {"const": 1}},
                   "required": ["<|im_end|>"]}}, parallel=False),
            '<tool_call>\n{"name": "<|endoftext|>", "arguments": {"<|im_end|>":1}}\n</tool_call>',
        ),
    ],
)  # fmt: skip
def test_what_must_come_holds_added_tokens_as_text(engine, grammar: Grammar, text: str):
    """Where only one text can follow the library writes it with the tokenizer, which may see added tokens in it."""
    answer = engine.generate("What?", bound(grammar))[0]
    assert ("".join(answer.text.split()), answer.finish_reason) == ("".join(text.split()), FinishReason.STOP)


def test_logits_may_be_wider_than_the_vocabulary(engine):
    vocab = Vocabulary(engine.processor.tokenizer, 600, engine.processor.eos_token_ids)
    matcher = LLMatcher(vocab.tables, LLMatcher.grammar_from_regex("(.|\n)*"))
    mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), count=600, bitorder="little")
    assert {vocab.tokens[token][0] for token in np.flatnonzero(mask[:486] == 0)} <= NO_BEGINNING
    assert not mask[512:].any() and vocab.is_control[512:].all()


NO_BEGINNING = {*range(0x80, 0xC2), *range(0xF5, 0x100)}  # bytes that no UTF-8 begins with


class _NoThreads:
    """Computes each mask where it is asked for."""

    def __init__(self, grammars: Grammars) -> None:
        self.grammars = grammars

    def submit(self, mask):
        from concurrent.futures import Future

        return Future()


def _times(completion) -> dict[str, Any]:
    return {name: getattr(completion, name) for name in ("request_id", "ttft_s", "tpot_s", "e2e_s")}


# What it does to answers


def test_a_bound_greedy_answer_is_that_of_transformers_under_the_same_masks(engine):
    """The library reads the tokenizer by itself there, and masks a row of transformers' logits."""
    prompt = engine.processor.build([{"role": "user", "content": "What is a square?"}])
    (ours,) = engine.generate([prompt], bound(schema(THING)))
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32).eval()
    tables = from_tokenizer(engine.processor.tokenizer, n_vocab=engine.vocab_size, eos_token=488)
    options = {"whitespace_pattern": r"( |\n[ \t]{0,40})"}
    matcher = LLMatcher(tables, LLMatcher.grammar_from_json_schema(THING, overrides=options))
    token_ids = []
    while not matcher.is_stopped():
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt.token_ids, *token_ids]])).logits[0, -1].numpy()
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")[: len(logits)]
        token_ids.append(int(np.where(mask, logits, -np.inf).argmax()))
        assert matcher.consume_token(token_ids[-1])
    assert list(ours.token_ids[0]) == token_ids and len(token_ids) > 20
    assert ours.finish_reason is FinishReason.STOP
    thing = json.loads(ours.text)
    assert thing["tone"] in ("light", "dark") and len(thing["box"]) == 2


MIX: dict[str, SamplingParams] = {
    "free": bound(None, max_new_tokens=30),
    "schema": bound(schema(THING)),
    "regex, sampled": bound(Grammar("regex", "[0-9a-f]{30}"), temperature=2.0, seed=5),
    "choice": bound(Grammar("choice", '["a square is red", "blue"]')),
    "calls": bound(
        calls(
            {
                "name": "f",
                "parameters": {
                    "type": "object",
                    "properties": {"at": {"const": 1}},
                    "required": ["at"],
                    "additionalProperties": False,
                },
            },
            parallel=False,
        )
    ),
    "nucleus": bound(Grammar("regex", "(ab|cd){8}"), temperature=1.5, top_p=0.8, seed=9, repetition_penalty=1.2),
    "lazy": bound(calls({"name": "f"}, is_lazy=True), max_new_tokens=20),
}


@pytest.fixture(scope="module")
def alone(engine) -> dict[str, Any]:
    return {name: engine.generate("Is it red?", params)[0] for name, params in MIX.items()}


def test_a_batch_changes_no_answer(engine, alone):
    together = engine.generate(["Is it red?"] * len(MIX), list(MIX.values()))
    assert [each.token_ids for each in together] == [alone[name].token_ids for name in MIX]
    assert [each.finish_reason for each in together] == [alone[name].finish_reason for name in MIX]
    assert alone["lazy"].text == engine.generate("Is it red?", replace(MIX["lazy"], grammar=None))[0].text


def test_neither_chunks_nor_preemption_change_an_answer(alone):
    """Pairs that grow in step outgrow the blocks that there are."""
    tight = {"num_blocks": 5, "max_num_batched_tokens": 8, "enable_prefix_caching": False}
    names = [name for name in ("schema", "regex, sampled", "calls") for _ in range(2)]
    with engine_over(TINY, max_num_seqs=6, **tight) as engine:
        ids = [engine.add("Is it red?", MIX[name]) for name in names]
        found: dict[str, list[int]] = {name: [] for name in ids}
        preempted = set()
        while engine.has_work:
            for output in engine.step():
                found[output.request_id] += output.token_ids
                preempted.update([output.request_id] if output.request.num_preemptions else ())
    assert preempted
    assert list(found.values()) == [list(alone[name].token_ids[0]) for name in names]


def test_a_step_computed_again_row_by_row_changes_no_answer(engine, alone, monkeypatch):
    forward, count = engine.runner.forward, [0]

    def fails_now_and_then(plan):
        count[0] += len(plan.rows) > 1
        if len(plan.rows) > 1 and count[0] % 3 == 0:
            raise RuntimeError("a kernel refuses")
        return forward(plan)

    monkeypatch.setattr(engine.runner, "forward", fails_now_and_then)
    together = engine.generate(["Is it red?"] * len(MIX), list(MIX.values()))
    assert count[0] > 9
    assert [each.token_ids for each in together] == [alone[name].token_ids for name in MIX]


def test_several_answers_each_follow_the_grammar(engine):
    params = bound(Grammar("regex", "[0-9]{3}-[a-z]{3}"), temperature=3.0, seed=3, n=4)
    (completion,) = engine.generate("Is it red?", params)
    assert len(set(completion.texts)) > 1
    assert all(len(text) == 7 and text[:3].isdigit() and text[3] == "-" for text in completion.texts)
    single = engine.generate("Is it red?", replace(params, n=1))[0]
    assert single.texts[0] == completion.texts[0]


def test_logprobs_are_the_models_own(engine):
    prompt = engine.processor.build([{"role": "user", "content": "Is it red?"}])
    (free,) = engine.generate([prompt], bound(None, max_new_tokens=1, logprobs=5))
    (completion,) = engine.generate([prompt], bound(Grammar("regex", "~[a-z]"), logprobs=5))
    assert completion.text[0] == "~"
    assert completion.logprobs[0][0].top == free.logprobs[0][0].top
    assert completion.logprobs[0][0].logprob < free.logprobs[0][0].top[-1][1]


# Where it ends


def test_an_answer_ends_where_its_grammar_must(engine):
    (completion,) = engine.generate("Is it red?", bound(Grammar("regex", "ab"), min_new_tokens=50, ignore_eos=True))
    assert completion.text == "ab" and completion.finish_reason is FinishReason.STOP
    assert not set(completion.token_ids[0]) & set(engine.processor.eos_token_ids)


def test_the_end_may_come_only_where_the_grammar_may_end(engine):
    eos = {str(token): 100.0 for token in engine.processor.eos_token_ids}
    wish = {"logit_bias": tuple((int(token), bias) for token, bias in eos.items())}
    (completion,) = engine.generate("Is it red?", bound(Grammar("regex", "[0-9]{3}[0-9]*"), **wish))
    assert len(completion.text) == 3 and completion.finish_reason is FinishReason.STOP
    (longer,) = engine.generate("Is it red?", bound(Grammar("regex", "[0-9]{3}[0-9]*"), min_new_tokens=6, **wish))
    assert longer.completion_tokens == 7 and longer.text.isdigit()


def test_ignore_eos_goes_on_as_long_as_the_grammar_does(engine):
    wish = {"logit_bias": tuple((token, 100.0) for token in engine.processor.eos_token_ids)}
    (completion,) = engine.generate("Is it red?", bound(Grammar("regex", "[0-9]+"), 20, ignore_eos=True, **wish))
    assert completion.completion_tokens == 20 and completion.text.isdigit()
    assert completion.finish_reason is FinishReason.LENGTH


def test_a_stop_token_may_come_where_the_grammar_may_end(engine):
    token = engine.processor.tokenizer.encode("x")[0]
    stops = {"stop_token_ids": (token,), "logit_bias": ((token, 100.0),), "ignore_eos": True}
    (completion,) = engine.generate("Is it red?", bound(Grammar("regex", "[0-9]{2}[0-9]*"), **stops))
    assert completion.token_ids[0][-1] == token and completion.text[:2].isdigit()
    assert completion.completion_tokens == 3


def test_a_stop_string_ends_an_answer_inside_its_grammar(engine):
    (completion,) = engine.generate("Is it red?", bound(schema(THING), stop=('"box',)))
    assert completion.text.endswith(", ") or completion.text.endswith(",")
    assert completion.finish_reason is FinishReason.STOP


# Free text


def test_a_lazy_grammar_binds_calls_only(engine):
    token = engine.processor.tokenizer.convert_tokens_to_ids("<tool_call>")
    tool = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"const": "it"}}, "required": ["at"],
            "additionalProperties": False}}  # fmt: skip
    wish = {"logit_bias": ((token, 100.0),)}
    (once,) = engine.generate("Is it red?", bound(calls(tool, is_lazy=True, parallel=False), **wish))
    assert once.finish_reason is FinishReason.STOP
    assert once.text.count("<tool_call>") == once.text.count("</tool_call>") == 1
    body = once.text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(body) == {"name": "look", "arguments": {"at": "it"}}
    (often,) = engine.generate("Is it red?", bound(calls(tool, is_lazy=True), 55, **wish))
    assert often.text.startswith(once.text + "<tool_call>\n") and often.finish_reason is FinishReason.LENGTH


def test_reasoning_is_free_and_ends_before_the_answer_does(engine):
    end = engine.processor.tokenizer.convert_tokens_to_ids(THINK_END)
    eos = tuple((token, 90.0) for token in engine.processor.eos_token_ids)
    grammar = Grammar("regex", "[0-9]{3}", after=THINK_END)
    (completion,) = engine.generate("Is it red?", bound(grammar, logit_bias=((end, 12.0), *eos)))
    reasoning, _, answer = completion.text.partition(THINK_END)
    assert answer.strip("\n").isdigit() and len(answer.strip("\n")) == 3
    assert completion.finish_reason is FinishReason.STOP
    (whole,) = engine.generate("Is it red?", bound(grammar, max_new_tokens=8))
    assert whole.finish_reason is FinishReason.LENGTH  # it goes on thinking instead of ending


def test_either_a_call_or_an_answer_of_the_form(engine):
    grammar = calls({"name": "f"}, parallel=False, **{"else": json.dumps({"type": "integer", "maximum": 9})})
    (answer,) = engine.generate("Is it red?", bound(grammar))
    assert answer.text.lstrip("-").isdigit()
    call = engine.processor.tokenizer.convert_tokens_to_ids("<tool_call>")
    (other,) = engine.generate("Is it red?", bound(grammar, logit_bias=((call, 100.0),), max_new_tokens=30))
    assert other.text.startswith('<tool_call>\n{"name": "f", "arguments": {')


# Faults


def test_a_grammar_that_dies_is_that_requests_fault_alone(engine, alone, monkeypatch):
    taken = Matcher.take

    def dies(self, token_ids):
        if self._params.seed == 77:
            raise GrammarFault("the library fails")
        return taken(self, token_ids)

    monkeypatch.setattr(Matcher, "take", dies)
    bad = replace(MIX["regex, sampled"], seed=77)
    dead, *others = engine.generate(["Is it red?"] * 3, [bad, MIX["schema"], MIX["free"]])
    assert dead.finish_reason is FinishReason.ERROR and "the library fails" in dead.error
    assert [each.token_ids for each in others] == [alone["schema"].token_ids, alone["free"].token_ids]


def test_a_mask_that_fails_or_does_not_come_is_that_requests_fault_alone(engine, alone, monkeypatch):
    from executor.engine import matcher

    computed = matcher.Mask.__call__
    monkeypatch.setattr(matcher, "MASK_S", 0.2)

    def slow_or_broken(self):
        if self._params.seed == 77:
            raise GrammarFault("no mask")
        if self._params.seed == 78:
            time.sleep(0.6)
        return computed(self)

    monkeypatch.setattr(matcher.Mask, "__call__", slow_or_broken)
    asked = [
        replace(MIX["regex, sampled"], seed=77),
        replace(MIX["regex, sampled"], seed=78),
        MIX["schema"],
        MIX["free"],
    ]
    broken, slow, *others = engine.generate(["Is it red?"] * 4, asked)
    assert broken.finish_reason is slow.finish_reason is FinishReason.ERROR
    assert "no mask" in broken.error and "0.2 s" in slow.error
    assert [each.token_ids for each in others] == [alone["schema"].token_ids, alone["free"].token_ids]


def test_a_grammar_no_token_fits_is_that_requests_fault_alone(engine, alone):
    nothing = bound(Grammar("regex", "[0-9]+"), allowed_token_ids=(engine.processor.tokenizer.encode("x")[0],))
    dead, other = engine.generate(["Is it red?"] * 2, [nothing, MIX["schema"]])
    assert dead.finish_reason is FinishReason.ERROR and "grammar" in dead.error
    assert other.token_ids == alone["schema"].token_ids


def test_a_request_whose_grammar_is_refused_is_not_queued(engine):
    with pytest.raises(UserError, match="cannot be enforced"):
        engine.add("Is it red?", bound(Grammar("regex", "(")))
    assert not engine.has_work


@pytest.mark.parametrize("num_free", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_masks_hide_no_broken_logits_and_leave_all_as_they_were(engine, num_free: int, value: float):
    """A NaN at a token that the grammar bars is still the row's fault; the others are chosen as ever."""
    prompt = engine.processor.build([{"role": "user", "content": "Is it red?"}])
    grammars = [Grammar("regex", "[0-9]"), Grammar("choice", '["x", "yes"]'), *[None] * num_free]
    requests = [Request(str(number), prompt, bound(grammar)) for number, grammar in enumerate(grammars)]
    for request in requests:
        request.matcher = engine.matchers.begin(request.params)
    logits = torch.randn(len(requests), engine.vocab_size)
    logits[0, engine.processor.tokenizer.encode("x")[0]] = value
    logits[1:, engine.processor.tokenizer.encode("q")[0]] = 50.0
    before = logits.clone()
    sampled = engine.runner.sampler.sample(logits, requests)
    assert torch.equal(logits, before) or torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
    assert sampled.failures.keys() == {0} and "not finite" in sampled.failures[0]
    texts = [engine.processor.tokenizer.decode([token]) for token in sampled.token_ids[1:]]
    assert texts[0] in ("x", "y", "yes") and texts[1:] == ["q"] * num_free
