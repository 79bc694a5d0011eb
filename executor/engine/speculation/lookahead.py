"""Drafts from a pool of n-grams that prompt, answer and the model's own expectations fill: lookahead decoding.

After Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding", with the parameters
as MindIE names them: n-grams of `level` tokens, found by their first one; at most `guess_set_size` of each first token;
`window` tokens further on that every step expects anew.

The published step has two branches under a mask of its own: the lookahead branch computes a window of guesses, and the
verification branch all n-grams of a guess set. The chips' attention takes causal rows of at most 16 tokens, so that a
step here is one chain, and differs thus:
- Verification: one candidate a step. First the text goes on whose n-gram was right last; where that was wrong, the
  n-gram that was seen last is tried, with what followed it, as long as drafts are wanted. An n-gram that has not been
  in the text is followed by that of its last token.
- Lookahead (Jacobi iteration): the chain ends with up to `window` tokens that the step before expected at those very
  places. What the model chooses behind them is the next step's expectation, and tokens at successive places out of
  successive steps are an n-gram, as in the paper. They stand behind the candidate, and without one behind the last
  token. `trailing` gives them apart from the drafts: they are seldom right, and are worth their time only where a step
  takes hardly longer with them.
Placeholders of pictures and videos are no text: no n-gram holds one.

Knows requests and rows only. Of a request: O(1) a token, at most guess_set_size n-grams for each token that is in it.
"""

from collections import deque
from collections.abc import Sequence

from executor.engine.speculation.own_text import PLACEHOLDER, OwnTextProposer, copied, text_of
from executor.engine.speculation.verify import num_right
from executor.schedule.plan import Row
from executor.schedule.request import Request

SEED_STRIDE = 31  # of places in the text: tokens that the first window begins with


class LookaheadProposer(OwnTextProposer):
    def __init__(self, level: int, window: int, guess_set_size: int) -> None:
        super().__init__()
        self.level, self.num_trailing, self.guess_set_size = level, window, guess_set_size
        self._windows: dict[str, _Window] = {}

    def _known(self, prompt: list[int]) -> "_Pool":
        return _Pool(self.level, self.guess_set_size, prompt)

    def trailing(self, row: Row, draft_ids: tuple[int, ...], count: int) -> tuple[int, ...]:
        request = row.request
        window = self._windows.get(request.id)
        if window is None:
            window = self._windows[request.id] = _Window(self.level, text_of(request.prompt))
        return window.expected(request.num_tokens + len(draft_ids), count)

    def observe(self, row: Row, chosen: Sequence[int]) -> None:
        """The pool learns from what the model chose behind wrong drafts; the rest is read from the request."""
        window = self._windows.get(row.request.id)
        if window is None:
            return
        first = num_right(row.draft_ids, chosen) + 1
        place = row.start + row.num_tokens + first
        pool = self._texts.get(row.request.id)
        for ngram in window.update(place, chosen[first:]):
            if pool is not None:
                pool.add(ngram)

    def forget(self, request: Request) -> None:
        super().forget(request)
        self._windows.pop(request.id, None)


class _Pool:
    """The text of a request and its n-grams by their first token, each set in order of use: the latest is the last.

    `_sets`: first token -> the other tokens -> where these stand in the text last; 0 of an expectation.
    `_next`: where the text goes on that the answer has followed until now; 0 where it follows none.
    """

    def __init__(self, level: int, guess_set_size: int, prompt: Sequence[int]) -> None:
        self.level, self.guess_set_size = level, guess_set_size
        self._sets: dict[int, dict[tuple[int, ...], int]] = {}
        self._tokens: list[int] = []
        self._num_prompt = len(prompt)
        self._next = 0
        for token_id in prompt:
            self._push(token_id)

    def extend(self, output: Sequence[int]) -> None:
        for token_id in output[len(self._tokens) - self._num_prompt :]:
            self._next = self._next + 1 if self._next and self._tokens[self._next] == token_id else 0
            self._push(token_id)

    def add(self, ngram: tuple[int, ...], place: int = 0) -> None:
        guesses = self._sets.setdefault(ngram[0], {})
        rest = ngram[1:]
        guesses.pop(rest, None)
        guesses[rest] = place
        if len(guesses) > self.guess_set_size:
            del guesses[next(iter(guesses))]

    def following(self, count: int) -> tuple[int, ...]:
        tokens = self._tokens
        if self._next:
            return copied(tokens, self._next, count)
        found: list[int] = []
        while len(found) < count:
            guesses = self._sets.get(found[-1] if found else tokens[-1])
            if not guesses:
                break
            rest, place = next(reversed(guesses.items()))
            if place:
                self._next = 0 if found else place
                found += copied(tokens, place, count - len(found))
                break
            found += rest
        return tuple(found[:count])

    def _push(self, token_id: int) -> None:
        tokens, size = self._tokens, self.level
        tokens.append(token_id)
        ngram = tuple(tokens[-size:])
        if len(ngram) == size and PLACEHOLDER not in ngram:
            self.add(ngram, len(tokens) - size + 1)


class _Window:
    """What the steps expected at places that the answer has not come to: Jacobi iteration."""

    def __init__(self, level: int, text: Sequence[int]) -> None:
        self._steps: deque[dict[int, int]] = deque(maxlen=level)  # place -> token, of each step; the last is the latest
        self._text = [token_id for token_id in text if token_id != PLACEHOLDER] or [0]

    def expected(self, place: int, count: int) -> tuple[int, ...]:
        """Tokens for `count` places from one on; where no step has come to yet, some of the prompt."""
        latest, text = self._steps[-1] if self._steps else {}, self._text
        return tuple(latest.get(each, text[SEED_STRIDE * each % len(text)]) for each in range(place, place + count))

    def update(self, place: int, chosen: Sequence[int]) -> list[tuple[int, ...]]:
        """What a step chose from `place` on, behind drafts that were wrong. Returns the n-grams that it completes."""
        self._steps.append({place + number: token_id for number, token_id in enumerate(chosen) if token_id >= 0})
        steps, size = self._steps, self._steps.maxlen
        if len(steps) < size:
            return []
        ngrams = []
        for end in steps[-1]:
            ngram = [each.get(end - size + 1 + number) for number, each in enumerate(steps)]
            if None not in ngram:
                ngrams.append(tuple(ngram))
        return ngrams
