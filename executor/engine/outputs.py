"""What the engine gives: the outputs of its steps, and the completions they add up to.

Knows requests and text; nothing of how they come about.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from executor.schedule.request import FinishReason, Request


class Output(NamedTuple):
    """What one step added to one answer: text that is certain, and one or more tokens (none when it failed)."""

    request_id: str
    index: int  # which of the request's `n` answers
    text_delta: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    request: Request
    logprobs: tuple[Any, ...] = ()  # TokenLogprobs of `token_ids`, where they were asked for
    prompt_logprobs: tuple[Any, ...] | None = None  # with the first tokens of the first answer, where asked for

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def error(self) -> str | None:
        """Why the answer could not be written to its end, where `finish_reason` is ERROR."""
        return self.request.error


@dataclass(frozen=True)
class Completion:
    """A finished request: its `n` answers, counts and times (seconds, of the first answer).

    `seed`: the one of the request's SamplingParams, else the one that was drawn for it; asked with it again, the same
    prompt gets the same answers. It changes nothing for greedy ones: theirs is 0 where none was asked for.
    """

    request_id: str
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    logprobs: tuple[Any, ...]
    prompt_tokens: int
    vision_tokens: int
    cached_tokens: int
    completion_tokens: int  # of all answers
    ttft_s: float
    tpot_s: float  # 0 for an answer of one token
    e2e_s: float
    seed: int
    warnings: tuple[str, ...] = ()  # what is not there of damaged pictures and videos
    prompt_logprobs: tuple[Any, ...] | None = None  # None for the first token, then TokenLogprobs, where asked for
    error: str | None = None  # of the first answer that failed; the texts are what there was until then

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def finish_reason(self) -> FinishReason:
        return self.finish_reasons[0]


class Collector:
    """Joins step outputs into completions."""

    def __init__(self) -> None:
        self._texts: dict[str, list[list[str]]] = {}
        self._finished: dict[str, dict[int, Request]] = {}

    @property
    def unfinished(self) -> list[str]:
        """Ids that are expected and not complete."""
        return list(self._texts)

    def expect(self, request_id: str, n: int) -> None:
        self._texts[request_id] = [[] for _ in range(n)]
        self._finished[request_id] = {}

    def forget(self, request_id: str) -> None:
        """Expect nothing more of a request; nothing happens when nothing is expected."""
        self._texts.pop(request_id, None)
        self._finished.pop(request_id, None)

    def feed(self, outputs: Iterable[Output]) -> Iterator[Completion]:
        """The requests that these outputs complete. Outputs of requests not expected are left alone."""
        for output in outputs:
            completion = self.take(output)
            if completion is not None:
                yield completion

    def take(self, output: Output) -> Completion | None:
        """The completion of the request that this output completes."""
        texts = self._texts.get(output.request_id)
        if texts is None:
            return None
        texts[output.index].append(output.text_delta)
        if output.finish_reason is None:
            return None
        finished = self._finished[output.request_id]
        finished[output.index] = output.request
        if len(finished) < len(texts):
            return None
        requests = [finished[index] for index in range(len(texts))]
        del self._texts[output.request_id], self._finished[output.request_id]
        return _completion(output.request_id, requests, ["".join(pieces) for pieces in texts])


def _completion(request_id: str, requests: Sequence[Request], texts: Sequence[str]) -> Completion:
    first = requests[0]
    num_tokens = len(first.output_token_ids)
    started = first.first_token_s if first.first_token_s is not None else first.finish_s
    return Completion(
        request_id=request_id,
        texts=tuple(texts),
        token_ids=tuple(tuple(request.output_token_ids) for request in requests),
        finish_reasons=tuple(request.finish_reason for request in requests),
        logprobs=tuple(request.output_logprobs for request in requests),
        prompt_tokens=len(first.prompt.token_ids),
        vision_tokens=first.prompt.num_vision_tokens,
        cached_tokens=first.num_cached_tokens,
        completion_tokens=sum(len(request.output_token_ids) for request in requests),
        ttft_s=started - first.arrival_s,
        tpot_s=(first.finish_s - started) / (num_tokens - 1) if num_tokens > 1 else 0.0,
        e2e_s=max(request.finish_s for request in requests) - first.arrival_s,
        seed=first.params.seed,
        warnings=tuple(warning for item in first.prompt.media for warning in item.warnings),
        prompt_logprobs=tuple(first.prompt_logprobs) or None,
        error=next((request.error for request in requests if request.error is not None), None),
    )
