"""Where one answer stands in its grammar, and which tokens may come next.

After each token the next mask is computed by a thread beside the engine's, while the next step runs on the device.
Invariants: a mask depends on the answer's own tokens only; it stays as it is until the answer has another token, so a
step may be computed again, and a request preempted, as often as it must be.
Does not know logits: executor.engine.masks lays the masks over them.
"""

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
        self._matcher = matcher
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


class Matcher:
    """One answer's. The engine's thread calls `take` after each step, the sampler `barred` before the next."""

    def __init__(self, matchers: Matchers, compiled: Compiled, params: SamplingParams) -> None:
        self._matchers = matchers
        self._compiled = compiled
        self._params = params
        self._is_reasoning = compiled.after_id is not None
        self._is_led = False
        self._bound: LLMatcher | None = None  # None where the text is free
        self._mask: Mask | None = None
        self._future: Future | None = None
        if not self._is_reasoning:
            self._bind(is_led=False)

    def take(self, token_id: int) -> bool:
        """The answer has another token. True when its grammar must end here. Raises GrammarFault."""
        self._mask = self._future = None
        if self._is_reasoning:
            if token_id == self._compiled.after_id:
                self._is_reasoning = False
                self._bind(is_led=self._compiled.lead_id is not None)
            return False
        if self._bound is None:  # free text of a lazy grammar
            if token_id != self._compiled.call_id:
                return False
            self._bound = self._compiled.begin()
        was_led, self._is_led = self._is_led, False
        if not (was_led and token_id == self._compiled.lead_id):
            self._bound.consume_token(token_id)
            if self._bound.is_error():
                raise self._fault(one_line(self._bound.get_error()))
            if self._bound.is_stopped():
                self._bound = None
                return not self._compiled.is_repeated
        self._start()
        return False

    def barred(self) -> np.ndarray | None:
        """bool [V]: tokens that may not come next; None where all may. Raises GrammarFault."""
        if self._mask is None:
            if self._is_reasoning and not self._compiled.grammar.is_lazy:
                return self._compiled.vocab.is_control
            return None
        if self._future.cancel():  # no thread has come to it
            self._future = Future()
            try:
                self._future.set_result(self._mask())
            except GrammarFault as error:
                self._future.set_exception(error)
        try:
            return self._future.result(MASK_S)
        except GrammarFault as error:
            raise self._fault(str(error)) from error
        except FutureTimeout:
            raise self._fault(f"which tokens may come next is not known after {MASK_S:g} s; simplify it") from None

    def _fault(self, reason: str) -> GrammarFault:
        """Nobody else begins from the same tables: they may be at their limits."""
        self._matchers.grammars.discard(self._compiled.grammar)
        return GrammarFault(reason)

    def _bind(self, *, is_led: bool) -> None:
        """From here on the grammar holds; a lazy one from its first token on."""
        if self._compiled.grammar.is_lazy:
            return
        self._is_led = is_led
        self._bound = self._compiled.begin()
        self._start()

    def _start(self) -> None:
        self._mask = Mask(self._bound, self._compiled, self._params, self._is_led)
        self._future = self._matchers.submit(self._mask)
