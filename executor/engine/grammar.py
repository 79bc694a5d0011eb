"""Grammars of answers, compiled: from a schema, a regular expression, texts to choose from, EBNF, or calls of tools.

The library is llguidance: it says which tokens may come next. It computes masks when they are asked for, so compiling
takes a few milliseconds, and it refuses what it cannot enforce. Here its limits are set, and what they do not bound.
Invariant: an added token ("<|im_end|>", "<tool_call>", "<think>") comes in no text that a grammar describes, only
where the grammar names it.
Does not know requests; where each answer stands in its grammar is a Matcher's (executor.engine.matcher).
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from executor.engine.closed_objects import closed
from executor.engine.detokenize import word_bytes
from executor.engine.json_schema import checked_schema
from executor.errors import UserError
from executor.schedule.request import CALL_BEGIN, CALL_END, Grammar

MAX_CHARACTERS = {"json_schema": 1 << 18, "regex": 1 << 14, "choice": 1 << 18, "ebnf": 1 << 16, "calls": 1 << 18}
MAX_CACHED = 32
WHITESPACE = r"( |\n[ \t]{0,40})"
"""Between the parts of JSON: none, a space, or a new line with its indentation. Without a bound a model may go on with
spaces for ever."""
LEAD = "\n\n"  # what Qwen's templates write between reasoning and answer
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,  # a fifth of the library's: (a{1000}){1000} is given up after 0.2 s instead of 1.5
    max_lexer_states=50_000,  # 1 to 2 kB each
    verbose_errors=False,  # its errors are told to clients
)
_SPECIAL = b"\xff"  # before the text of an added token: the library's mark, no byte of UTF-8


class GrammarFault(RuntimeError):
    """An answer cannot go on as its grammar asks."""


@dataclass(frozen=True)
class Compiled:
    """A grammar that the library has taken. `begin` gives each answer its own."""

    grammar: Grammar
    start: LLMatcher
    vocab: "Vocabulary"
    after_id: int | None  # the token that ends the free text before it
    lead_id: int | None  # a token that may stand between that and what is bound
    call_id: int | None  # of a lazy grammar: the token that begins what is bound
    is_repeated: bool  # of a lazy grammar: what is bound may come again

    def begin(self) -> LLMatcher:
        return self.start.deep_copy()


class Vocabulary:
    """A tokenizer as the library knows it. Built from 151,936 tokens in about a second."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size`: the width of the logits, which may be more than the tokenizer has tokens."""
        self.size = vocab_size
        self.eos_token_ids = tuple(sorted(token_id for token_id in eos_token_ids if token_id < vocab_size))
        self._tokenizer = tokenizer
        added = {token_id: token for token_id, token in tokenizer.added_tokens_decoder.items() if token_id < vocab_size}
        self._ids = {token.content: token_id for token_id, token in added.items()}
        self.is_control = np.zeros(vocab_size, dtype=bool)  # special tokens, and ids without a token
        words = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocab_size))))
        self.tokens: list[bytes] = []
        for token_id, word in enumerate([*words, *[None] * (vocab_size - len(words))]):
            is_added = token_id in added
            self.is_control[token_id] = word is None or (is_added and added[token_id].special)
            if word is None:  # every id has its place in the masks
                self.tokens.append(_SPECIAL + f"<[{token_id}]>".encode())
            else:
                self.tokens.append(_SPECIAL + word.encode() if is_added else word_bytes(word))
        self.special_token_ids = [token_id for token_id, text in enumerate(self.tokens) if text[:1] == _SPECIAL]
        self.eos_token_id, self.bos_token_id = self.eos_token_ids[0], None
        self.is_tokenizer_wrapper = True  # as the library asks a tokenizer that is not one of its own
        self.tables = LLTokenizer(self, eos_token=list(self.eos_token_ids))

    def __call__(self, text: str) -> list[int]:
        """For the library, which writes with these tokens what can only go on in one way.

        The text as it stands: no added token is seen in it, and nothing is normalised.
        """
        backend = self._tokenizer.backend_tokenizer
        words = backend.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for word, _ in words for token in backend.model.tokenize(word)]

    def added_id(self, text: str) -> int | None:
        return self._ids.get(text)

    def single_id(self, text: str) -> int | None:
        """The token that is `text`, if there is one."""
        ids = self(text)
        return ids[0] if len(ids) == 1 else None


class Grammars:
    """The grammars of one engine, compiled once each; from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._parts = tokenizer, vocab_size, eos_token_ids
        self._vocab: Vocabulary | None = None
        self._cache: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._building = threading.Lock()

    @property
    def vocab(self) -> Vocabulary:
        """Built when it is first asked for."""
        with self._building:
            if self._vocab is None:
                self._vocab = Vocabulary(*self._parts)
            return self._vocab

    def compiled(self, grammar: Grammar) -> Compiled:
        """Raises UserError for what is no grammar, cannot be enforced, or is too large."""
        with self._lock:
            if grammar in self._cache:
                self._cache.move_to_end(grammar)
                return self._cache[grammar]
        try:
            compiled = _compile(grammar, self.vocab)
        except UserError as error:
            if not grammar.asked_by:
                raise
            raise UserError(f"{grammar.asked_by}: {error}") from error
        with self._lock:
            self._cache[grammar] = compiled
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return compiled

    def discard(self, grammar: Grammar) -> None:
        """Its tables are at their limits: whoever comes with it next begins anew."""
        with self._lock:
            self._cache.pop(grammar, None)


def _compile(grammar: Grammar, vocab: Vocabulary) -> Compiled:
    most = MAX_CHARACTERS[grammar.kind]
    if len(grammar.source) > most:
        raise UserError(f"the {grammar.kind} has {len(grammar.source)} characters; at most {most} can be enforced")
    after_id = lead_id = call_id = None
    is_repeated = False
    if grammar.after is not None:
        after_id, lead_id = _added(vocab, grammar.after), vocab.single_id(LEAD)
    if grammar.kind == "calls":
        call_id = _added(vocab, CALL_BEGIN)
        _added(vocab, CALL_END)
    start = _start(grammar, vocab)
    if grammar.is_lazy:
        is_repeated = json.loads(grammar.source)["parallel"]
    return Compiled(grammar, start, vocab, after_id, lead_id, call_id, is_repeated)


def _start(grammar: Grammar, vocab: Vocabulary) -> LLMatcher:
    """Raises UserError. Schemas are read twice: as they are written, which finds what cannot be enforced (alternatives
    of a oneOf that overlap), and closed, which is what an answer follows."""
    try:
        text = _SOURCES[grammar.kind](grammar, dict)
        closed_text = _SOURCES[grammar.kind](grammar, closed)
    except RecursionError as error:
        raise UserError(f"the {grammar.kind} is nested too deeply") from error
    start, fault = _loaded(text, vocab)
    if fault is not None:
        raise UserError(f"the {_WORDS[grammar.kind]} cannot be enforced: {one_line(fault)}")
    if closed_text != text:
        closed_start, fault = _loaded(closed_text, vocab)
        start = closed_start if fault is None else start
    return start


def _loaded(text: str, vocab: Vocabulary) -> tuple[LLMatcher, str | None]:
    """The library's matcher for one of its grammars, and why it cannot be followed; None where it can."""
    start = LLMatcher(vocab.tables, text, log_level=0, limits=LIMITS)
    faults = [start.get_error()] if start.is_error() else start.get_grammar_warnings()
    if faults:
        return start, faults[0]
    first = start.deep_copy()
    mask = np.frombuffer(first.compute_bitmask(), dtype=np.uint8)
    if first.is_error() or not mask.any():
        return start, f"nothing satisfies it ({one_line(first.get_error())})"
    forced = first.compute_ff_tokens()
    if forced and not first.is_error():  # what can only go on in one way may do so without an end
        first.consume_token(forced[0])
        first.compute_bitmask()
    return start, first.get_error() if first.is_error() else None


def one_line(message: str) -> str:
    """An error of the library, without its state."""
    return " ".join(message.split("<state>")[0].split())[:300] or "no reason is given"


def _added(vocab: Vocabulary, text: str) -> int:
    token_id = vocab.added_id(text)
    if token_id is None:
        raise UserError(f"this checkpoint's tokenizer has no token '{text}', without which this cannot be enforced")
    return token_id


# From each kind's source to the library's. `finish` takes a schema that was checked and gives the one that is enforced.

Finish = Callable[[dict[str, Any]], dict[str, Any]]


def _json_schema(grammar: Grammar, finish: Finish) -> str:
    schema = finish(checked_schema(grammar.source))
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_json_options())
    except ValueError as error:  # Python reads more than JSON: halves of characters, NaN, numbers of any size
        raise UserError(f"the schema is no JSON: {one_line(str(error))}") from error


def _json_options() -> dict[str, Any]:
    return {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}


def _regex(grammar: Grammar, finish: Finish) -> str:
    return LLMatcher.grammar_from_regex(grammar.source)


def _choice(grammar: Grammar, finish: Finish) -> str:
    try:
        choices = json.loads(grammar.source)
    except ValueError as error:
        raise UserError(f"the choices are no JSON: {error}") from error
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
        raise UserError("the choices are no list of texts; allowed: one text or more, none of them empty")
    # One terminal: as alternatives of a rule each would be read by itself.
    return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, choices))}")


def _ebnf(grammar: Grammar, finish: Finish) -> str:
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(grammar.source))
    except Exception as error:
        # llguidance 1.9.1 tells some of its faults (a rule that is not there) by plain Exceptions.
        if type(error) not in (Exception, GbnfToLarkError):
            raise
        raise UserError(f"the grammar cannot be read: {one_line(str(error))}") from error


def _calls(grammar: Grammar, finish: Finish) -> str:
    """Lark for calls in Qwen's form, those of Hermes: a JSON object of name and arguments between two tokens.

    A lazy grammar describes one call, begun by its first token.
    """
    asked = json.loads(grammar.source)
    rules, names = [], []
    for number, tool in enumerate(asked["tools"]):
        schema = _arguments_schema(tool, finish)
        head = json.dumps(f'{{"name": {json.dumps(tool["name"], ensure_ascii=False)}, "arguments": ')
        rules.append(f'tool_{number}: {head} %json {json.dumps(schema)} "}}"')
        names.append(f"tool_{number}")
    more = ' ("\\n" call)*' if asked["parallel"] and not grammar.is_lazy else ""
    start = f"start: call{more}"
    if "else" in asked:
        start += " | answer"
        rules.append(f"answer: %json {json.dumps(_with_options(finish(checked_schema(asked['else']))))}")
    lines = [start, f'call: {CALL_BEGIN} "\\n" ({" | ".join(names)}) "\\n" {CALL_END}', *rules]
    return LLMatcher.grammar_from_lark("\n".join(lines))


def _arguments_schema(tool: Mapping[str, Any], finish: Finish) -> dict[str, Any]:
    """The schema of a tool's arguments, always of an object."""
    name, parameters = tool["name"], tool.get("parameters")
    try:
        schema = checked_schema(json.dumps(parameters if parameters is not None else {}))
    except (UserError, RecursionError) as error:
        raise UserError(f"the parameters of the tool '{name}' cannot be enforced: {error}") from error
    if schema.get("type", "object") != "object":
        raise UserError(f"the parameters of the tool '{name}' are no schema of an object; give type: object")
    return _with_options(finish({**schema, "type": "object"}))


def _with_options(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema inside of Lark, with what `_json_schema` hands over beside it."""
    return {**schema, "x-guidance": _json_options()}


_SOURCES = {"json_schema": _json_schema, "regex": _regex, "choice": _choice, "ebnf": _ebnf, "calls": _calls}
_WORDS = {
    "json_schema": "schema", "regex": "regular expression", "choice": "list of choices", "ebnf": "grammar",
    "calls": "tools' parameters",
}  # fmt: skip
