"""The engine: requests in, text out. The loop is `schedule, execute, update`; everything else is bookkeeping.

A device that computes behind the host's back is given the next step before the last one's tokens are read (`overlaps`):
`schedule, launch, schedule_ahead, launch, collect, update`. That step takes its tokens from the device, and what it has
computed of requests that have ended meanwhile is dropped.

Invariants: an output goes to whoever asked for its request, whoever runs the step; a call that raises leaves nothing
queued; a step that raises is taken back. One request's fault ends that request alone.
Knows requests, tokens and text; does not know models, devices, files or HTTP.
"""

import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from executor.engine.ahead import Launched
from executor.engine.bad_words import BadWords
from executor.engine.detokenize import Detokenizer
from executor.engine.grammar import GrammarFault
from executor.engine.matcher import Matchers
from executor.engine.noise import child_seed
from executor.engine.outputs import Collector, Completion, Output
from executor.engine.params import check_params, type_of, with_seed
from executor.engine.replica import Replica
from executor.engine.results import StepResult, without_void
from executor.engine.runner import FAULTS, Runner
from executor.engine.speculation.counts import SpeculationCounts
from executor.engine.writing import Answer, Piece, unreadable
from executor.errors import UserError
from executor.schedule.plan import Plan
from executor.schedule.prefix_cache import BlockDigests
from executor.schedule.request import GRAMMAR_ENDS, FinishReason, Prompt, Request, SamplingParams, Status
from executor.schedule.scheduler import Scheduler

logger = logging.getLogger(__name__)

Question = Prompt | str | Sequence[Mapping[str, Any]]
"""A prompt made by `engine.processor`, the text of a user's message, or the messages of a conversation."""


class Engine:
    """One rank of a replica: a processor, a scheduler and a runner. Use it as a context manager, or `close` it.

    One thread at a time calls it (RuntimeError for a second one; `abort` alone may come from anywhere);
    executor.engine.loop serves many. With several ranks the leader takes the requests; the others `follow` it.
    """

    def __init__(self, processor: Any, scheduler: Scheduler, runner: Runner, vocab_size: int) -> None:
        self.processor = processor
        self.scheduler = scheduler
        self.runner = runner
        self.vocab_size = vocab_size
        self.overlaps = runner.device.overlaps_steps
        self.matchers = Matchers(processor.tokenizer, vocab_size, processor.eos_token_ids)
        # Told of every plan that was computed, and of each row how many tokens of it have come to its answer.
        self.watch: Callable[[Plan, Sequence[int]], None] | None = None
        self._answers: dict[str, Answer] = {}
        self._answers_of: dict[str, dict[str, Answer]] = {}  # the same, by the id that their `n` share
        self._pieces: deque[Piece] = deque()  # of requests that were `add`ed: for the next `step`
        self._unreadable: deque[Answer] = deque()  # fail with the next step
        self._known_bytes: dict[int, bytes] = {}  # of the tokens that were read
        self._aborted: deque[str] = deque()
        self._under_way: Launched | None = None  # a step whose tokens have not been read
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to give."""
        return self.scheduler.has_work or bool(self._pieces)

    @property
    def speculation(self) -> SpeculationCounts:
        """What became of drafts until now; all 0 where none are made."""
        speculator = self.runner.speculator
        return SpeculationCounts() if speculator is None else replace(speculator.counts)

    @property
    def replica(self) -> Replica:
        """The ranks around this one. Only a rank that `leads` takes requests; the others `follow`."""
        return self.runner.replica

    def prompt(self, question: Question) -> Prompt:
        """The prompt of a question; UserError for what cannot be asked. From any thread."""
        if isinstance(question, Prompt):
            return question
        if isinstance(question, str):
            question = [{"role": "user", "content": question}]
        if isinstance(question, list | tuple) and question and all(isinstance(each, Mapping) for each in question):
            return self.processor.build(question)
        raise UserError(
            f"a prompt is {type_of(question)}; allowed: a Prompt (engine.processor.build makes it), a text, or a list "
            "of messages"
        )

    def fetch(self, prompt: Prompt, params: SamplingParams) -> None:
        """Read what the cache on disk has of a prompt; from any thread, before `add` does it."""
        cache, scheduler = self.runner.disk_cache, self.scheduler
        if cache is None or cache.has_fetched(prompt):
            return
        digests: list[bytes] = []
        if params.prompt_logprobs is None:  # else all of it is computed
            request = Request("", prompt, params)
            digests = BlockDigests(request, scheduler.pool.block_size).extend(len(prompt.token_ids) - 1)
        cache.fetch(prompt, digests, scheduler.num_known_blocks(digests), scheduler.knows_media)

    def check(self, params: SamplingParams) -> None:
        """What of parameters takes time to check: the grammar. UserError; from any thread, before `add` does it."""
        self.matchers.check(params)

    def add(self, question: Question, params: SamplingParams, request_id: str | None = None) -> str:
        """Queue a request; returns its id. Its outputs come out of `step`.

        Raises UserError for parameters or a prompt that cannot be served; nothing is queued then.
        """
        with self._exclusive():
            return self._queue([(self.prompt(question), params, request_id)], self._pieces)[0]

    def step(self) -> list[Output]:
        """Run one step; what it added to each answer of the requests that were `add`ed, and what steps that `stream`
        and `generate` ran meanwhile have added. Empty when there is nothing to do.

        A request that fails for its own reason ends with ERROR. What fails for another is raised, and the step is as
        if it had not been: call again, or abort.
        """
        return [piece.written() for piece in self.advance()]

    def advance(self) -> list[Piece]:
        """`step`, for whoever reads the texts later: all pieces of it before those of the next one."""
        with self._exclusive():
            self._run()
            pieces = list(self._pieces)
            self._pieces.clear()
            return pieces

    def stream(self, question: Question, params: SamplingParams) -> Iterator[Output]:
        """Outputs of one request as they come. A caller that stops iterating aborts it."""
        pieces: deque[Piece] = deque()
        with self._exclusive():
            (request_id,) = self._queue([(self.prompt(question), params, None)], pieces)
        running = params.n
        try:
            while running:
                while pieces:
                    output = pieces.popleft().written()
                    running -= output.finished
                    yield output
                if running:
                    with self._exclusive():
                        self._run()
        finally:
            if running:
                self.abort(request_id)

    def generate(
        self, questions: Sequence[Question] | Question, params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answer all questions together, in their order; one question may stand by itself.

        `params`: for all, or one for each. A request that fails has its reason in `Completion.error`. Raises UserError,
        before anything is answered, for what cannot be asked.
        """
        questions = _as_list(questions)
        each = _each(params, len(questions))
        collector, pieces, done = Collector(), deque(), {}
        with self._exclusive():
            prompts = [self.prompt(question) for question in questions]
            ids = self._queue([(*pair, None) for pair in zip(prompts, each, strict=True)], pieces)
        for request_id, one in zip(ids, each, strict=True):
            collector.expect(request_id, one.n)
        try:
            while len(done) < len(ids):
                with self._exclusive():
                    self._run()
                outputs = [piece.written() for piece in pieces]
                pieces.clear()
                done |= {completion.request_id: completion for completion in collector.feed(outputs)}
        finally:
            for request_id in collector.unfinished:
                self.abort(request_id)
        return [done[request_id] for request_id in ids]

    def abort(self, request_id: str) -> None:
        """Free everything of a request, at the latest when the step that runs now has ended; from any thread.

        Unknown ids are ignored (it may just have ended).
        """
        self._aborted.append(request_id)
        if self._lock.acquire(blocking=False):
            self._release()

    def assist(self) -> Iterator[None]:
        """After the last request: help the other replicas that need this one; yields between steps. `close` does it
        too, for whoever has nothing to do in between."""
        yield from self.runner.assist()

    def dismiss(self) -> None:
        """After `assist`: let this replica's other ranks go. An engine of one rank can still be used."""
        self.runner.dismiss()

    def follow(self) -> None:
        """Compute what this replica's leader plans, until it is closed."""
        self.runner.follow()

    def end_warm_up(self) -> None:
        """What comes from now on is recorded, and counts as looked for in the caches. Nothing may be unfinished."""
        self.runner.hold_profile(False)
        self.scheduler.count_anew()
        if self.runner.disk_cache is not None:
            self.runner.disk_cache.count_anew()

    def close(self) -> None:
        """Abort what is unfinished, help other replicas to their end, and let this replica's other ranks go.

        The engine cannot be used after that; its memory is freed with the object.
        """
        if self._is_closed:
            return
        with self._exclusive():
            for answer in list(self._answers.values()):
                self._drop(answer.parent_id)
            if self.replica.leads:
                for _ in self.runner.assist():
                    pass
            self.runner.close()
            self.matchers.close()
            self._is_closed = True

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is not None and not self.replica.is_alone:
            self._is_closed = True  # the others may be anywhere: their supervision ends them
        else:
            self.close()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """For the time of one call. RuntimeError in two threads at once, and after `close`."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "two threads use this engine at the same time; let one of them make all calls, or hand requests to an "
                "EngineLoop (executor.engine.loop)"
            )
        try:
            if self._is_closed:
                raise RuntimeError("this engine is closed; build another one")
            self.runner.begin_profile()
            yield
        finally:
            self._release()

    def _release(self) -> None:
        """End a call, and what was aborted during it."""
        while self._aborted:
            self._drop(self._aborted.popleft())
        self._lock.release()

    def _queue(self, asked: Sequence[tuple[Prompt, SamplingParams, str | None]], pieces: deque[Piece]) -> list[str]:
        """Take in all of these, or none: they are checked before the first is queued. Returns their ids."""
        answers: list[Answer] = []
        ids: list[str] = []
        given: set[str] = set()
        for prompt, params, request_id in asked:
            check_params(params, self.vocab_size)
            params = with_seed(params)
            ids.append(self._request_id(request_id, given))
            given.add(ids[-1])
            bad_words = BadWords.of(self.processor.tokenizer, params.bad_words)
            self._check_first_token(params, bad_words)
            for index in range(params.n):
                one = replace(params, n=1, seed=child_seed(params.seed, index))
                if index:  # the prompt's are the same
                    one = replace(one, prompt_logprobs=None)
                request = Request(f"{ids[-1]}/{index}", prompt, one, bad_words=bad_words)
                request.matcher = self.matchers.begin(one)
                self.scheduler.check_possible(request)
                detokenizer = Detokenizer(self.processor.tokenizer, one, known_bytes=self._known_bytes)
                answers.append(Answer(ids[-1], index, request, detokenizer, pieces, self._unreadable))
        for prompt, params, _ in asked:
            self.fetch(prompt, params)
        for answer in answers:
            self.scheduler.add(answer.request)
            self._answers[answer.request.id] = answer
            self._answers_of.setdefault(answer.parent_id, {})[answer.request.id] = answer
        return ids

    def _check_first_token(self, params: SamplingParams, bad_words: BadWords | None) -> None:
        """Raises UserError where no token at all may come first."""
        if params.allowed_token_ids is None:
            return
        barred = set() if bad_words is None else bad_words.after((), 0)
        if params.min_new_tokens:
            barred.update(params.stop_token_ids, () if params.ignore_eos else self.processor.eos_token_ids)
        if barred.issuperset(params.allowed_token_ids):
            raise UserError(
                "generation_config.allowed_token_ids holds only tokens that bad_words, or min_new_tokens with the end "
                "tokens, rule out; allow more tokens, or rule out fewer"
            )

    def _request_id(self, asked: str | None, given: set[str]) -> str:
        """The id that was asked for, or a new one, none of those just `given`. UserError where it cannot be had."""
        if asked is None:
            names = (f"request-{number}" for number in self._ids)
            return next(name for name in names if name not in self._answers_of and name not in given)
        if not isinstance(asked, str) or not asked:
            raise UserError(f"request_id is {asked!r}; allowed: a text that is not empty, or None for a new id")
        if asked in self._answers_of or asked in given:
            raise UserError(f"request id '{asked}' is in use by an unfinished request; choose another")
        return asked

    def _run(self) -> None:
        with self.runner.clock.stage("host"):
            self._run_step()

    def _run_step(self) -> None:
        """One step, its pieces to whoever asked.

        Texts are not waited for: see executor.engine.writing.
        """
        while self._unreadable:
            answer = self._unreadable.popleft()
            if answer.request.status is not Status.FINISHED:
                self.scheduler.fail(answer.request, answer.fault)
                self._emit(answer, (), text="")
        if not self.overlaps:
            plan = self.scheduler.schedule()
            with self._undone(plan):
                result = self.runner.execute(plan)
            self._take(plan, result)
            return
        step, self._under_way = self._under_way, None
        if step is None or all(row.request.finished for row in step.plan.rows):
            plan = self.scheduler.schedule()
            with self._undone(plan):
                step = self.runner.launch(plan)
        with self._undone(step.plan):
            following, is_last = self._launch_behind(step)
            result = self.runner.collect(step, is_last=is_last)
        if following is not None and not result.is_repeated:
            self._under_way = following.without({step.plan.rows[number].request for number in result.void})
        self._take(*without_void(step.plan, result))

    @contextlib.contextmanager
    def _undone(self, plan: Plan) -> Iterator[None]:
        """A step that raises is taken back."""
        try:
            yield
        except BaseException:
            self.scheduler.cancel(plan)
            raise

    def _launch_behind(self, step: Launched) -> tuple[Launched | None, bool]:
        """The next step, where it can be queued before the tokens of this one are read; and whether none was begun."""
        if step.drawn is None or step.void:
            return None, True
        plan = self.scheduler.schedule_ahead(step.plan)
        if plan is None:
            return None, True
        try:
            with self._undone(plan):
                return self.runner.launch(plan), False
        except FAULTS:
            if not self.replica.is_alone:
                raise
            logger.warning("a step failed and is begun again when the one before is read", exc_info=True)
            return None, False

    def _take(self, plan: Plan, result: StepResult) -> None:
        """A step's tokens into answers."""
        failed = [number for number in result.failures if not plan.rows[number].request.finished]
        for number in failed:
            self.scheduler.fail(plan.rows[number].request, result.failures[number])
        for number, scores in result.prompt_logprobs.items():
            plan.rows[number].request.prompt_logprobs += scores
        logprobs = {plan.rows[number].request.id: new for number, new in result.logprobs.items()}
        updated = self.scheduler.update(plan, result.token_ids, result.missing)
        if self.watch is not None:
            num_kept = {request: len(token_ids) for request, token_ids in updated}
            self.watch(plan, [num_kept.get(row.request, 0) for row in plan.rows])
        for request, token_ids in updated:
            answer = self._answers[request.id]
            if answer.is_plain and request.finish_reason is None:
                answer.pieces.append(Piece(answer, tuple(token_ids)))
                continue
            if request.id in logprobs:
                request.output_logprobs += logprobs[request.id][: len(token_ids)]
            if request.matcher is not None:
                self._follow_grammar(request, token_ids)
            self._advance(answer, token_ids)
        for number in failed:
            self._emit(self._answers[plan.rows[number].request.id], (), text="")
        if self.scheduler.has_to_keep and not self.scheduler.has_work:  # there may be no further step
            plan = self.scheduler.schedule()
            with self._undone(plan):
                self.runner.execute(plan)

    def _follow_grammar(self, request: Request, token_ids: list[int]) -> None:
        """The answer ends where its grammar must, and fails where that cannot be followed.

        Drafts do not go beyond that end, so all the tokens count.
        """
        if request.finished:
            return
        try:
            if request.matcher.take(token_ids):
                self.scheduler.finish(request, FinishReason.STOP)
        except GrammarFault as error:
            self.scheduler.fail(request, f"{GRAMMAR_ENDS}: {error}")

    def _advance(self, answer: Answer, token_ids: list[int]) -> None:
        """An answer's new tokens, up to a stop string, or to the token that has ended it."""
        request, num_silent = answer.request, 0
        if request.finish_reason is FinishReason.STOP and not request.params.include_stop_str_in_output:
            # Else its grammar has ended it.
            ends = token_ids[-1] in self.scheduler.eos_token_ids or token_ids[-1] in request.params.stop_token_ids
            num_silent = int(ends)
        if not request.params.stop:  # nothing in the text ends it
            self._emit(answer, tuple(token_ids), num_silent=num_silent)
            return
        text, detokenizer = "", answer.detokenizer
        try:
            for count, token_id in enumerate(token_ids[: len(token_ids) - num_silent], start=1):
                text += detokenizer.push((token_id,))
                if detokenizer.stopped:
                    num_kept = len(request.output_token_ids) - len(token_ids) + count
                    del request.output_token_ids[num_kept:], request.output_logprobs[num_kept:]
                    token_ids = token_ids[:count]
                    # A stop string counts also where the same token would have ended the answer anyway.
                    self.scheduler.finish(request, FinishReason.STOP, detokenizer.stop_string)
                    break
            else:
                text += detokenizer.finish() if request.finished else ""
        except FAULTS as error:
            self.scheduler.fail(request, unreadable(error))
        self._emit(answer, tuple(token_ids), text=text)

    def _emit(
        self, answer: Answer, token_ids: tuple[int, ...], *, text: str | None = None, num_silent: int = 0
    ) -> None:
        request = answer.request
        if request.status is Status.FINISHED:
            del self._answers[request.id]
            siblings = self._answers_of[answer.parent_id]
            del siblings[request.id]
            if not siblings:
                del self._answers_of[answer.parent_id]
            self.runner.forget(request)
        logprobs = tuple(request.output_logprobs[-len(token_ids) :]) if request.output_logprobs and token_ids else ()
        prompt_logprobs = None
        if request.prompt_logprobs and token_ids and not answer.is_begun:
            answer.is_begun = True
            prompt_logprobs = tuple(request.prompt_logprobs)
        answer.pieces.append(
            Piece(answer, token_ids, request.finish_reason, logprobs, prompt_logprobs, text, num_silent)
        )

    def _drop(self, request_id: str) -> None:
        """End a request at its caller's wish. Unread outputs of it go as well, all but the last of a `stream`."""
        for answer in list(self._answers_of.get(request_id, {}).values()):
            self.scheduler.abort(answer.request.id)
            self._emit(answer, (), text="")
        unread = [piece for piece in self._pieces if piece.answer.parent_id != request_id]
        self._pieces.clear()
        self._pieces.extend(unread)


def _as_list(questions: Any) -> list[Question]:
    """The questions of `generate`, where one may stand by itself."""
    if isinstance(questions, Prompt | str):
        return [questions]
    if not isinstance(questions, Sequence):
        raise UserError(f"prompts are {type_of(questions)}; allowed: a list of prompts, texts or conversations")
    if questions and all(isinstance(each, Mapping) for each in questions):
        return [questions]
    return list(questions)


def _each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """The parameters of every one of `count` questions."""
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple):
        raise UserError(f"params are {type_of(params)}; allowed: one SamplingParams(...) for all, or a list of them")
    if len(params) != count:
        raise UserError(f"{count} prompts and {len(params)} params; give one SamplingParams for all, or one for each")
    return list(params)
