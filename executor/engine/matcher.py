"""Where one answer stands in its grammar, and which tokens may come next.

After each token the next mask is computed by a thread beside the engine's, while the next step runs on the device; so
are the masks behind drafts, each by a copy of the library's matcher that has gone along the drafts.
Invariants: a mask depends on the answer's own tokens, and the drafts behind them, only; it stays as it is until the
answer has another token, so a step may be computed again, and a request preempted, as often as it must be. Drafts
change nothing for the answer, also where a grammar fails behind them.
Does not know logits: executor.engine.masks lays the masks over them.
"""

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import numpy as np
from llguidance import LLMatcher

from executor.engine.grammar import Compiled, GrammarFault, Grammars, one_line
from executor.schedule.request import SamplingParams

NUM_THREADS = 2
MASK_S = 2.0  # as long as a step waits for a mask that is being computed


class Matchers:
    """The grammars of an engine, and the threads that compute masks: both started with the first grammar."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.grammars = Grammars(tokenizer, vocab_size, eos_token_ids)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def check(self, params: SamplingParams) -> None:
        """Compiles the grammar, if there is one; from any thread. Raises UserError."""
        if params.grammar is not None:
            self.grammars.compiled(params.grammar)

    def begin(self, params: SamplingParams) -> "Matcher | None":
        """A new answer's. Raises UserError."""
        return None if params.grammar is None else Matcher(self, self.grammars.compiled(params.grammar), params)

    def submit(self, mask: "Mask") -> Future:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
            return self._pool.submit(mask)

    def close(self) -> None:
        """Ends the threads; waits for the masks that they are at."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None


class Mask:
    """Computes which tokens may not come next, bool [V]."""

    def __init__(self, matcher: LLMatcher, compiled: Compiled, params: SamplingParams, is_led: bool) -> None:
        self._matcher = matcher  # nobody else's
        self._compiled = compiled
        self._params = params
        self._is_led = is_led  # the token between reasoning and answer may still come

    def __call__(self) -> np.ndarray:
        vocab, bits = self._compiled.vocab, np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise GrammarFault(one_line(self._matcher.get_error()))
        barred = np.unpackbits(bits, count=vocab.size, bitorder="little") == 0
        ends = list(vocab.eos_token_ids)
        if not barred[ends[0]]:  # the grammar may end here
            if self._params.ignore_eos:
                barred[ends] = True
            barred[list(self._params.stop_token_ids)] = False
            if barred.all():
                barred[ends] = False
        if self._is_led:
            barred[self._compiled.lead_id] = False
        return barred


class _Pending:
    """A mask that a thread computes, or whoever asks for it first."""

    def __init__(self, matchers: Matchers, mask: Mask) -> None:
        self._mask = mask
        self._future = matchers.submit(mask)

    def result(self) -> np.ndarray:
        """Raises GrammarFault."""
        if self._future.cancel():  # no thread has come to it
            self._future = Future()
            try:
                self._future.set_result(self._mask())
            except GrammarFault as error:
                self._future.set_exception(error)
        try:
            return self._future.result(MASK_S)
        except FutureTimeout:
            raise GrammarFault(f"which tokens may come next is not known after {MASK_S:g} s; simplify it") from None

    def drop(self) -> None:
        """Nobody will ask for it."""
        self._future.cancel()


class _Course:
    """How far a line of tokens has come in a grammar."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self._is_reasoning = compiled.after_id is not None
        self._is_led = False
        self._bound: LLMatcher | None = None  # None where the text is free
        if not self._is_reasoning:
            self._bind(is_led=False)

    def copied(self) -> "_Course":
        other = copy.copy(self)
        if self._bound is not None:
            other._bound = self._bound.deep_copy()
        return other

    def takes(self, token_id: int) -> bool:
        """Whether the grammar allows it next."""
        if self._bound is None:
            is_bare = self._is_reasoning and not self.compiled.grammar.is_lazy
            return not (is_bare and self.compiled.vocab.is_control[token_id])
        return (self._is_led and token_id == self.compiled.lead_id) or self._bound.validate_tokens([token_id]) == 1

    def take(self, token_id: int) -> bool:
        """Go on with a token. True when the grammar must end behind it. Raises GrammarFault."""
        if self._is_reasoning:
            if token_id == self.compiled.after_id:
                self._is_reasoning = False
                self._bind(is_led=self.compiled.lead_id is not None)
            return False
        if self._bound is None:  # free text of a lazy grammar
            if token_id != self.compiled.call_id:
                return False
            self._bound = self.compiled.begin()
        was_led, self._is_led = self._is_led, False
        if not (was_led and token_id == self.compiled.lead_id):
            self._bound.consume_token(token_id)
            if self._bound.is_error():
                raise GrammarFault(one_line(self._bound.get_error()))
            if self._bound.is_stopped():
                self._bound = None
                return not self.compiled.is_repeated
        return False

    def forced(self) -> tuple[int, ...]:
        """Tokens that must come next, as the text that the grammar leaves no choice of is usually cut."""
        if self._bound is None or self._is_led:
            return ()
        return tuple(self._bound.compute_ff_tokens())

    def mask(self, params: SamplingParams) -> Mask | np.ndarray | None:
        """What tells, or is, the tokens that may not come next; None where all may."""
        if self._bound is not None:
            return Mask(self._bound.deep_copy(), self.compiled, params, self._is_led)
        if self._is_reasoning and not self.compiled.grammar.is_lazy:
            return self.compiled.vocab.is_control
        return None

    def _bind(self, *, is_led: bool) -> None:
        """From here on the grammar holds; a lazy one from its first token on."""
        if self.compiled.grammar.is_lazy:
            return
        self._is_led = is_led
        self._bound = self.compiled.begin()


class Matcher:
    """One answer's. The engine's thread calls `take` with what each step has chosen, and `allowed` before a step with
    drafts of it; the sampler asks for what is `barred` in the step."""

    def __init__(self, matchers: Matchers, compiled: Compiled, params: SamplingParams) -> None:
        self._matchers = matchers
        self._params = params
        self._drafts: tuple[int, ...] = ()
        # Behind the answer's last token, and behind each draft.
        self._courses: list[_Course] = []
        self._masks: list[_Pending | np.ndarray | None] = []
        self._look_from(_Course(compiled))

    def take(self, token_ids: Sequence[int]) -> bool:
        """The answer has more tokens. True when its grammar must end behind the last of them. Raises GrammarFault."""
        course, is_over = self._courses[0], False
        self._forget(0)
        for token_id in token_ids:
            assert not is_over, "a draft ends the grammar, and another follows"
            try:
                is_over = course.take(token_id)
            except GrammarFault as error:
                raise self._fault(error, course) from error
        if not is_over:
            self._look_from(course)
        return is_over

    def forced(self) -> tuple[int, ...]:
        """Drafts for nothing: what the grammar leaves no choice of, in the tokens that it is usually cut into."""
        return self._courses[0].forced()

    def allowed(self, draft_ids: Sequence[int]) -> int:
        """How many of these, from the first on, may come next and do not end the answer.

        `barred` is asked for the masks behind them, which are computed from now on, until the next `take`. Asked again,
        it keeps the masks behind what the drafts begin with as before.
        """
        pairs = zip(draft_ids, self._drafts, strict=False)
        num_kept = next((place for place, (new, old) in enumerate(pairs) if new != old), len(self._drafts))
        num_kept = min(num_kept, len(draft_ids))
        self._forget(1 + num_kept)
        for token_id in draft_ids[num_kept:]:
            if not self._courses[-1].takes(token_id):
                break
            course = self._courses[-1].copied()
            try:
                if course.take(token_id):
                    break
            except GrammarFault:  # the answer's own, if it comes to that
                break
            self._look_from(course)
        self._drafts = tuple(draft_ids[: len(self._courses) - 1])
        return len(self._drafts)

    def barred(self, ahead: tuple[int, ...] = ()) -> np.ndarray | None:
        """bool [V]: tokens that may not come next; None where all may. Raises GrammarFault.

        `ahead`: tokens that are taken to come before, the first of those that were `allowed` last.
        """
        assert ahead == self._drafts[: len(ahead)], f"masks behind {self._drafts} are asked for behind {ahead}"
        mask = self._masks[len(ahead)]
        if not isinstance(mask, _Pending):
            return mask
        try:
            return mask.result()
        except GrammarFault as error:
            raise self._fault(error, self._courses[0]) from error

    def _look_from(self, course: _Course) -> None:
        """Begin with the mask of what comes next there."""
        mask = course.mask(self._params)
        self._courses.append(course)
        self._masks.append(_Pending(self._matchers, mask) if isinstance(mask, Mask) else mask)

    def _forget(self, num_kept: int) -> None:
        """Drop all but the first masks, and the drafts behind them."""
        for mask in self._masks[num_kept:]:
            if isinstance(mask, _Pending):
                mask.drop()
        del self._courses[num_kept:], self._masks[num_kept:]
        self._drafts = self._drafts[: max(0, num_kept - 1)]

    def _fault(self, error: GrammarFault, course: _Course) -> GrammarFault:
        """Nobody else begins from the same tables: they may be at their limits."""
        self._matchers.grammars.discard(course.compiled.grammar)
        return GrammarFault(str(error))
