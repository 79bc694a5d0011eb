"""Over HTTP with drafts, several tokens in a chunk: every reply, whole and streamed, is the one without drafts."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from executor.engine.engine import Engine
from executor.engine.speculation.speculator import Proposer
from tests.engines import engine_over
from tests.serve import test_chat, test_completions, test_generate, test_messages, test_responses, test_structured
from tests.serve.conftest import TINY, Running, start
from tests.serve.test_metrics import samples

LONG = {"ignore_eos": True, "temperature": 1.0, "seed": 3}
BY_CHANCE = {"id", "created", "created_at", "completed_at", "item_id", "call_id"}
NGRAM = {"method": "ngram", "ngram_min": 1, "num_speculative_tokens": 7, "adaptive": False}


class Recall(Proposer):
    """What was answered to the same prompt with the same seed before."""

    def __init__(self) -> None:
        self.answers: dict[Any, list[int]] = {}

    def propose(self, plan, wanted):
        rows = zip(plan.rows, wanted, strict=True)
        return [tuple(self._known(row.request)[len(row.request.output_token_ids) :][:count]) for row, count in rows]

    def forget(self, request):
        self.answers[self._key(request)] = request.output_token_ids

    def _known(self, request):
        return self.answers.get(self._key(request), [])

    @staticmethod
    def _key(request):
        return tuple(request.prompt.token_ids), request.params


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with engine_over(TINY, speculative=NGRAM) as engine:
        yield engine


@pytest.fixture(scope="module", params=["ngram", "recall"])
def server(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Running]:
    speculator = engine.runner.speculator
    before = speculator.proposer
    if request.param == "recall":
        speculator.proposer = Recall()
    with start(engine) as running:
        yield running
    speculator.proposer = before


def chat(server: Running, **fields: Any) -> list[Any]:
    """Whole, what the stream adds up to, and the stream's own count of tokens."""
    fields = {"max_completion_tokens": 40} | fields
    whole = test_chat.ask(server, **fields)
    *chunks, last = test_chat.stream(server, **fields, stream_options={"include_usage": True})
    joined = [test_chat.joined(chunks, index) for index in range(len(whole["choices"]))]
    assert joined == whole["choices"]
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    return [whole["choices"], whole["usage"]["completion_tokens"]]


def bound(server: Running, **fields: Any) -> Any:
    whole, (streamed, _) = test_structured.chat(server, **fields), test_structured.streamed(server, **fields)
    assert test_structured.same(whole, streamed)
    return whole


def completion(server: Running, **fields: Any) -> Any:
    whole, chunks = test_completions.complete(server, **fields), test_completions.streamed(server, **fields)
    assert [test_completions.joined(chunks[:-1], index) for index in range(len(whole["choices"]))] == whole["choices"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    return whole["choices"]


def message(server: Running, **fields: Any) -> Any:
    asked = [{"role": "user", "content": "Describe the picture."}]
    whole, events = test_messages.ask(server, asked, **fields), test_messages.streamed(server, asked, **fields)
    deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
    texts = "".join(delta.get("text", delta.get("partial_json", "")) for delta in deltas)
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    return [whole["content"], whole["stop_reason"], whole["usage"]["output_tokens"], texts]


def response(server: Running, **fields: Any) -> Any:
    whole = test_responses.respond(server, "Describe the picture.", **fields)
    *_, last = test_responses.streamed(server, "Describe the picture.", **fields)
    assert test_responses.text_of(last["response"]) == test_responses.text_of(whole)
    return [whole["output"], whole["usage"]["output_tokens"]]


def mindie(server: Running, **fields: Any) -> Any:
    texts = test_generate.streamed(server, "Describe the picture.", **fields)
    joined = ["".join(column) for column in zip(*texts, strict=True)]
    return [test_generate.generate(server, "Describe the picture.", **fields), joined]


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "chat": (chat, {**LONG, "n": 2, "logprobs": True, "top_logprobs": 2}),
    "chat, greedy": (chat, {"ignore_eos": True}),
    "chat, penalties": (chat, {**LONG, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": True}),
    "chat, a stop text": (chat, {**LONG, "stop": ["NN", "1"], "include_stop_str_in_output": True, "logprobs": True}),
    "chat, a stop token": (chat, {**LONG, "stop_token_ids": [16, 45], "min_tokens": 5}),
    "chat, a minimum": (chat, {"min_tokens": 20, "temperature": 1.0, "seed": 9, "logit_bias": {"488": 4}}),
    "schema": (bound, test_structured.FORMATS["schema"][0]),
    "schema, sampled": (bound, test_structured.FORMATS["schema, sampled"][0]),
    "a call that must be": (bound, {"tools": [test_structured.LOOK], "tool_choice": "required"}),
    "a call that may be": (bound, {"tools": [test_structured.PAINT], "logit_bias": {str(test_structured.CALL): 50}}),
    "completion": (completion, {"max_tokens": 30, **LONG, "logprobs": 2, "n": 2}),
    "completion, echo": (completion, {"max_tokens": 30, "ignore_eos": True, "echo": True, "logprobs": 1}),
    "messages": (message, {"max_tokens": 40, "temperature": 0, "stop_sequences": ["8"]}),
    "messages, a call": (message, {"max_tokens": 60, "tool_choice": {"type": "any"}, "tools": [{
        "name": "look", "input_schema": test_structured.LOOK["function"]["parameters"]}]}),
    "responses": (response, {"max_output_tokens": 40, "temperature": 0}),
    "MindIE": (mindie, {"max_tokens": 40, **LONG}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_replies_are_those_without_drafts(server: Running, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ask, fields = CASES[name]
    speculator = server.engine.runner.speculator
    with monkeypatch.context() as patch:
        patch.setattr(server.engine.scheduler, "max_yield", 1)
        expected = ask(server, **fields)
    before = speculator.counts.num_accepted_tokens
    assert alike(ask(server, **fields), expected)
    if isinstance(speculator.proposer, Recall):
        assert speculator.counts.num_accepted_tokens > before


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one.keys() - BY_CHANCE)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-4
    return one == other


def test_a_chunk_of_several_tokens_has_the_logprobs_and_the_count_of_each(server: Running) -> None:
    fields = {**LONG, "max_completion_tokens": 40, "logprobs": True}
    test_chat.ask(server, **fields)
    before = samples(server)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = test_chat.stream(server, **fields, stream_options=options)
    counts = [0, *(chunk["usage"]["completion_tokens"] for chunk in chunks)]
    lengths = [len(chunk["choices"][0]["logprobs"]["content"]) for chunk in chunks]
    assert lengths == [new - old for old, new in zip(counts, counts[1:], strict=False)] and sum(lengths) == 40
    if isinstance(server.engine.runner.speculator.proposer, Recall):
        assert max(lengths) > 3
    for chunk in chunks:
        choice = chunk["choices"][0]
        data = b"".join(bytes(each["bytes"]) for each in choice["logprobs"]["content"])
        assert data.decode(errors="replace") == "".join(each["token"] for each in choice["logprobs"]["content"])
    name = "vllm:inter_token_latency_seconds_count"
    assert samples(server)[name] - before[name] == 39
