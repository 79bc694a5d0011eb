"""Answers taken apart: content, reasoning and calls, however the text was cut."""

import json
import random
import re
from collections.abc import Iterable

import pytest

from executor.serve.parser import AnswerParser, Piece

Parts = list[tuple[str, str | None, str]]  # (kind, name of a call, text)


def parts(pieces: Iterable[Piece]) -> Parts:
    """Pieces joined. A call's first piece has its id and name, and no other piece of it has."""
    joined: Parts = []
    ids = set()
    for piece in pieces:
        begins = piece.name is not None
        assert begins == (piece.call_id is not None)
        if begins:
            assert piece.kind == "tool_call" and piece.call_id.startswith("call_") and piece.call_id not in ids
            assert piece.call_index == len(ids)
            ids.add(piece.call_id)
        if joined and joined[-1][0] == piece.kind and not begins:
            kind, name, text = joined[-1]
            joined[-1] = kind, name, text + piece.text
        else:
            assert piece.kind != "tool_call" or begins
            joined.append((piece.kind, piece.name, piece.text))
    return joined


def parsed(text: str, cuts: Iterable[int] = (), **options: object) -> Parts:
    parser = AnswerParser(**options)
    pieces, last = [], 0
    for cut in (*cuts, len(text)):
        pieces += parser.push(text[last:cut])
        last = cut
    return parts([*pieces, *parser.finish()])


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TOOLS = {"takes_tools": True, "tool_names": ("f", "g")}
THINKS = {"thinks": True}
END = "(<(/(t(o(o(l(_(c(a(l(l(>)?)?)?)?)?)?)?)?)?)?)?)?"  # of a call, or what an answer that was cut off has of it
ARGUMENTS = '{"a": [1, {"b": "}"}],  "c": "</tool_call> \\" {"}'
CASES: dict[str, tuple[str, dict[str, object], Parts]] = {
    "plain": ("a <tool_call> b </think>\n", {}, [("content", None, "a <tool_call> b </think>\n")]),
    "no call": ("a\n\nb\n", TOOLS, [("content", None, "a\n\nb\n")]),
    "call": (call("f", ARGUMENTS), TOOLS, [("tool_call", "f", ARGUMENTS)]),
    "any name": (call("z", "{}"), {"takes_tools": True}, [("tool_call", "z", "{}")]),
    "text before": ("Hm.\n" + call("f", "{}"), TOOLS, [("content", None, "Hm."), ("tool_call", "f", "{}")]),
    "two": (
        call("f", "{}") + "\n" + call("g", ARGUMENTS) + "\n",
        TOOLS, [("tool_call", "f", "{}"), ("tool_call", "g", ARGUMENTS)],
    ),
    "text between": (
        call("f", "{}") + "\nand\n" + call("g", "{}") + "\nend\n",
        TOOLS,
        [("tool_call", "f", "{}"), ("content", None, "and"), ("tool_call", "g", "{}"), ("content", None, "end\n")],
    ),
    "compact": ('<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>', TOOLS, [("tool_call", "f", '{"x":1}')]),
    "escaped name": ('<tool_call>{"name":"\\u0066","arguments":{}}</tool_call>', TOOLS, [("tool_call", "f", "{}")]),
    "arguments first": (
        '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>',
        TOOLS, [("tool_call", "f", '{"x": 1}')],
    ),
    "quoted arguments": (
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>',
        TOOLS, [("tool_call", "f", '{"x": 1}')],
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', TOOLS, [("tool_call", "f", "{}")]),
    "unknown tool": ("x\n" + call("h", "{}") + "\ny", TOOLS, [("content", None, "x\n" + call("h", "{}") + "\ny")]),
    "no JSON": ("<tool_call>f()</tool_call>!", TOOLS, [("content", None, "<tool_call>f()</tool_call>!")]),
    "broken JSON": (
        '<tool_call>{"name": "f", }</tool_call>!',
        TOOLS, [("content", None, '<tool_call>{"name": "f", }</tool_call>!')],
    ),
    "arguments no object": (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        TOOLS, [("content", None, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>')],
    ),
    "broken, then right": (
        '<tool_call>{"name": "f}\n</tool_call>' + call("g", "{}"),
        TOOLS, [("content", None, '<tool_call>{"name": "f}\n</tool_call>'), ("tool_call", "g", "{}")],
    ),
    "mark in the mark": ("<tool_<tool_call>x", TOOLS, [("content", None, "<tool_<tool_call>x")]),
    "cut in the mark": ("ab<tool_ca", TOOLS, [("content", None, "ab<tool_ca")]),
    "cut in the name": ('<tool_call>\n{"name": "f', TOOLS, [("content", None, '<tool_call>\n{"name": "f')]),
    "cut in the arguments": (
        '<tool_call>\n{"name": "f", "arguments": {"a": "b',
        TOOLS, [("tool_call", "f", '{"a": "b')],
    ),
    "cut behind the arguments": (
        '<tool_call>\n{"name": "f", "arguments": {}}\n</too',
        TOOLS, [("tool_call", "f", "{}")],
    ),
    "end forgotten": (
        '<tool_call>\n{"name": "f", "arguments": {}}\n' + call("g", "{}"),
        TOOLS,
        [("tool_call", "f", "{}"), ("tool_call", "g", "{}")],
    ),
    "more keys": (
        '<tool_call>{"name": "f", "arguments": {}, "id": 3}</tool_call>',
        TOOLS, [("tool_call", "f", "{}"), ("content", None, ', "id": 3}</tool_call>')],
    ),
    "reasoning": (
        "\nHm\n\nso\n</think>\n\nred\n",
        THINKS, [("reasoning", None, "Hm\n\nso"), ("content", None, "red\n")],
    ),
    "reasoning that opens itself": (
        "<think>\nHm</think>red",
        THINKS, [("reasoning", None, "Hm"), ("content", None, "red")],
    ),
    "no reasoning": ("\n</think>\n\nred", THINKS, [("content", None, "red")]),
    "reasoning cut off": ("Hm </thi", THINKS, [("reasoning", None, "Hm </thi")]),
    "reasoning only": ("Hm</think>\n\n", THINKS, [("reasoning", None, "Hm")]),
    "reasoning of marks": (
        "a </thin <tool_call> </think>b",
        {**TOOLS, **THINKS}, [("reasoning", None, "a </thin <tool_call> "), ("content", None, "b")],
    ),
    "reasoning and calls": (
        "Hm\n</think>\n\nSo:\n" + call("f", "{}"),
        {**TOOLS, **THINKS}, [("reasoning", None, "Hm"), ("content", None, "So:"), ("tool_call", "f", "{}")],
    ),
    "reasoning, call": (
        "Hm\n</think>\n\n" + call("f", "{}"),
        {**TOOLS, **THINKS}, [("reasoning", None, "Hm"), ("tool_call", "f", "{}")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_taken_apart(name: str):
    text, options, expected = CASES[name]
    assert parsed(text, **options) == expected


@pytest.mark.parametrize("name", CASES)
def test_the_parts_do_not_depend_on_the_cuts(name: str):
    text, options, expected = CASES[name]
    dice = random.Random(name)
    assert parsed(text, range(len(text)), **options) == expected
    for cut in range(len(text)):
        assert parsed(text, (cut,), **options) == expected, cut
    for _ in range(20):
        cuts = sorted(dice.choices(range(len(text) + 1), k=dice.randint(1, 9)))
        assert parsed(text, cuts, **options) == expected, cuts


def frame(whole: Parts, *, thinks: bool) -> str:
    """A regular expression of the texts that have these parts: marks, and line breaks next to them, besides."""
    found = r"\n*(<think>)?\n*" if thinks else ""
    if thinks and (not whole or whole[0][0] != "reasoning"):
        found += "(</think>)?"
    for kind, name, part in whole:
        found += {
            "content": r"\n*" + re.escape(part),
            "reasoning": re.escape(part) + r"(\n*</think>)?",
            "tool_call": rf'\n*<tool_call>\n\{{"name": "{name}", "arguments": {re.escape(part)}[ \n]*\}}?[ \n]*{END}',
        }[kind]
    return found + r"\n*"


def test_random_answers_do_not_depend_on_the_cuts_and_lose_nothing():
    dice = random.Random(1)
    bits = (
        *("<tool_call>", "</tool_call>", "</think>", "<think>", "\n", "<", "a", "}", "{", '"', '"name"', ": ", '"f"'),
        *(call("f", '{"x": 1}'), call("h", "{}"), '<tool_call>\n{"name": "f", "arguments": {', "\\", " ", ", "),
    )
    for _ in range(400):
        text = "".join(dice.choices(bits, k=dice.randint(1, 14)))
        options = {"takes_tools": dice.random() < 0.8, "tool_names": ("f",), "thinks": dice.random() < 0.5}
        whole = parsed(text, **options)
        for cuts in (range(len(text)), sorted(dice.choices(range(len(text) + 1), k=5))):
            assert parsed(text, cuts, **options) == whole, (text, options)
        assert re.fullmatch(frame(whole, thinks=options["thinks"]), text), (text, whole)


def test_arguments_come_as_they_are_written():
    """The name first, then each piece of text at once, nothing held back until the end."""
    parser, said = AnswerParser(**TOOLS), []
    for character in call("f", '{"a": 1}'):
        said.append(parser.push(character))
    named = next(number for number, pieces in enumerate(said) if pieces)
    assert said[named][0].name == "f"
    text = "".join(piece.text for pieces in said for piece in pieces)
    assert text == '{"a": 1}' and json.loads(text) == {"a": 1}
    assert all(len(piece.text) == 1 for pieces in said[named + 1 :] for piece in pieces)
    assert parser.finish() == [] and parser.num_calls == 1


def test_plain_text_is_held_no_longer_than_a_mark_may_come():
    parser = AnswerParser(**TOOLS)
    assert parts(parser.push("x <tool")) == [("content", None, "x ")]
    assert parts(parser.push("s")) == [("content", None, "<tools")]
    assert parts(parser.push("\n")) == []
    assert parts(parser.push("y")) == [("content", None, "\ny")]
