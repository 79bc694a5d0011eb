"""The engine: requests in, text out. The loop is `schedule, execute, update`; everything else is bookkeeping.

Knows requests, tokens and text; does not know models, devices, files or HTTP.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from executor.engine.detokenize import Detokenizer
from executor.engine.noise import child_seed
from executor.engine.params import check_params
from executor.engine.replica import Replica
from executor.engine.runner import Runner
from executor.schedule.request import FinishReason, Prompt, Request, SamplingParams
from executor.schedule.scheduler import Scheduler


@dataclass(frozen=True)
class Output:
    """What one step added to one answer."""

    request_id: str
    index: int  # which of the request's `n` answers
    text_delta: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    request: Request

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class Completion:
    """A finished request: its `n` answers, counts and times (seconds, of the first answer)."""

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

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def finish_reason(self) -> FinishReason:
        return self.finish_reasons[0]


@dataclass(eq=False)
class _Answer:
    """One of a request's `n` answers while it is being written."""

    parent_id: str
    index: int
    request: Request
    detokenizer: Detokenizer


class Engine:
    """One rank of a replica: a processor, a scheduler and a runner. Not thread-safe: one thread calls it.

    With several ranks the leader takes the requests and is closed in the end; the others follow it.
    """

    def __init__(self, processor: Any, scheduler: Scheduler, runner: Runner, vocab_size: int) -> None:
        self.processor = processor
        self.scheduler = scheduler
        self.runner = runner
        self.vocab_size = vocab_size
        self._answers: dict[str, _Answer] = {}
        self._ids = itertools.count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, prompt: Prompt, params: SamplingParams, request_id: str | None = None) -> str:
        """Queue a request; returns its id. Raises UserError for parameters or a prompt that cannot be served."""
        check_params(params, self.vocab_size)
        parent_id = request_id or f"request-{next(self._ids)}"
        for index in range(params.n):
            one = replace(params, n=1, seed=child_seed(params.seed, index))
            request = Request(f"{parent_id}/{index}", prompt, one)
            self.scheduler.add(request)
            detokenizer = Detokenizer(self.processor.tokenizer, one)
            self._answers[request.id] = _Answer(parent_id, index, request, detokenizer)
        return parent_id

    def step(self) -> list[Output]:
        """Run one step; what it added to each answer. Empty when there is nothing to do."""
        plan = self.scheduler.schedule()
        sampled = self.runner.execute(plan)
        logprobs = {
            row.request.id: value
            for row, value in zip((r for r in plan.rows if r.samples), sampled.logprobs or (), strict=False)
        }
        outputs = []
        for request in self.scheduler.update(plan, sampled.token_ids):
            if logprobs.get(request.id) is not None:
                request.output_logprobs.append(logprobs[request.id])
            outputs.append(self._advance(request))
        return outputs

    def _advance(self, request: Request) -> Output:
        answer = self._answers[request.id]
        new = request.output_token_ids[-1:]
        delta = answer.detokenizer.push(new)
        if answer.detokenizer.stopped:
            # A stop string counts also where the same token would have ended the answer anyway.
            if not request.finished:
                self.scheduler.finish(request, FinishReason.STOP, answer.detokenizer.stop_string)
            request.finish_reason, request.stop_reason = FinishReason.STOP, answer.detokenizer.stop_string
        elif request.finished:
            delta += answer.detokenizer.finish()
        if request.finished:
            del self._answers[request.id]
            self.runner.forget(request)
        return Output(answer.parent_id, answer.index, delta, tuple(new), request.finish_reason, request)

    @property
    def replica(self) -> Replica:
        """The ranks around this one. Only a rank that `leads` takes requests; the others `follow`."""
        return self.runner.replica

    def close(self) -> Iterator[None]:
        """After the last request: let the other ranks go, once no replica needs this one; yields while some do."""
        yield from self.runner.close()

    def follow(self) -> None:
        """Compute what this replica's leader plans, until it is closed."""
        self.runner.follow()

    def abort(self, request_id: str) -> None:
        """Free everything of a request; unknown ids are ignored (it may just have ended)."""
        for key in [key for key, answer in self._answers.items() if answer.parent_id == request_id]:
            answer = self._answers.pop(key)
            self.scheduler.abort(answer.request.id)
            self.runner.forget(answer.request)

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[Output]:
        """Outputs of one request as they come. A caller that stops iterating aborts it."""
        request_id = self.add(prompt, params)
        running = params.n
        try:
            while running:
                for output in self.step():
                    if output.request_id == request_id:
                        running -= output.finished
                        yield output
        finally:
            if running:
                self.abort(request_id)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answer all prompts together, in their order."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        collector = Collector()
        ids = []
        for prompt, one in zip(prompts, each, strict=True):
            ids.append(self.add(prompt, one))
            collector.expect(ids[-1], one.n)
        done: dict[str, Completion] = {}
        while len(done) < len(ids):
            for completion in collector.feed(self.step()):
                done[completion.request_id] = completion
        return [done[request_id] for request_id in ids]


class Collector:
    """Joins step outputs into completions."""

    def __init__(self) -> None:
        self._texts: dict[str, list[list[str]]] = {}
        self._finished: dict[str, dict[int, Request]] = {}

    def expect(self, request_id: str, n: int) -> None:
        self._texts[request_id] = [[] for _ in range(n)]
        self._finished[request_id] = {}

    def feed(self, outputs: Iterable[Output]) -> Iterator[Completion]:
        """The requests that these outputs complete. Outputs of requests not expected are left alone."""
        for output in outputs:
            texts = self._texts.get(output.request_id)
            if texts is None:
                continue
            texts[output.index].append(output.text_delta)
            finished = self._finished[output.request_id]
            if output.finished:
                finished[output.index] = output.request
            if len(finished) == len(texts):
                requests = [finished[index] for index in range(len(texts))]
                yield _completion(output.request_id, requests, ["".join(pieces) for pieces in texts])
                del self._texts[output.request_id], self._finished[output.request_id]


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
    )


def random_seed() -> int:
    """For a request that names no seed."""
    return random.SystemRandom().getrandbits(62)
