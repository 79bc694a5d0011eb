"""Drafts from the request's own tokens: what followed when its last tokens came before (prompt lookup).

Of each request there is an index of its n-grams. The prompt's part takes 12 to 20 bytes a token for each size of
n-grams, the answer's about 200. No n-gram reaches over a placeholder, and none is drafted.
Knows requests and rows only.
"""

from array import array
from collections.abc import Sequence

import numpy as np

from executor.engine.speculation.own_text import PLACEHOLDER, OwnTextProposer, copied

FACTOR = 0x9E3779B97F4A7C15  # odd, of 64 bits: the golden ratio's, which spreads well
WORD = 2**64 - 1


class NgramProposer(OwnTextProposer):
    """The continuation of the latest earlier place where the last `most` to `least` tokens are the same."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def _known(self, prompt: list[int]) -> "_Index":
        return _Index(self.least, self.most, prompt)


class _Index:
    """The tokens of a request, and where each of their n-grams ended last.

    An n-gram is found from the token behind it on, so that the last one does not find itself.
    """

    def __init__(self, least: int, most: int, prompt: Sequence[int]) -> None:
        self.tokens = list(prompt)
        self._num_prompt = len(prompt)
        self._sizes = range(most, least - 1, -1)
        self._of_prompt = {size: _PromptIndex(size, self.tokens) for size in self._sizes}
        self._of_answer: dict[tuple[int, ...], int] = {}

    def extend(self, output: Sequence[int]) -> None:
        tokens = self.tokens
        for token_id in output[len(tokens) - self._num_prompt :]:
            end = len(tokens)
            for size in self._sizes:
                if size <= end:
                    self._of_answer[tuple(tokens[end - size :])] = end
            tokens.append(token_id)

    def following(self, count: int) -> tuple[int, ...]:
        for size in self._sizes:
            ngram = tuple(self.tokens[-size:])
            if len(ngram) == size and PLACEHOLDER not in ngram:
                place = self._of_answer.get(ngram) or self._of_prompt[size].find(ngram)
                if place:
                    return copied(self.tokens, place, count)
        return ()


class _PromptIndex:
    """Where the n-grams of one size end in a prompt, the last one of all left out.

    Of each hash the latest place, and of each place the one before it with the same hash; n-grams are told apart by
    their tokens. A place is the number of tokens in front of it; 0 is none. A prompt may be long: it is built by
    columns, and holds no objects.
    """

    def __init__(self, size: int, tokens: list[int]) -> None:
        """`tokens`: begin with the prompt's, and may grow."""
        self._tokens = tokens
        self._factors = [pow(FACTOR, power, 2**64) for power in range(1, size + 1)]
        num_tokens = len(tokens)
        bits = max(1, num_tokens).bit_length() + 1
        self._shift = 64 - bits
        before, latest = np.zeros(num_tokens + 1, np.int32), np.zeros(2**bits, np.int32)
        if num_tokens > size:
            columns = np.lib.stride_tricks.sliding_window_view(
                np.asarray(tokens[:-1], np.int64).astype(np.uint64), size
            )
            totals = np.zeros(len(columns), np.uint64)
            for place, factor in enumerate(self._factors):
                totals += columns[:, place] * np.uint64(factor)
            ends = np.flatnonzero((columns != np.uint64(PLACEHOLDER & WORD)).all(axis=1))
            buckets = totals[ends] >> np.uint64(self._shift)
            order = np.argsort(buckets, kind="stable")
            ends, buckets = ends[order] + size, buckets[order]
            is_same = buckets[1:] == buckets[:-1]
            before[ends[1:][is_same]] = ends[:-1][is_same]
            is_last = np.append(~is_same, True)[: len(ends)]
            latest[buckets[is_last]] = ends[is_last]
        self._before, self._latest = array("i", before.tobytes()), array("i", latest.tobytes())

    def find(self, ngram: tuple[int, ...]) -> int:
        """The latest place; 0 where there is none."""
        total, size = 0, len(ngram)
        for token_id, factor in zip(ngram, self._factors, strict=True):
            total += token_id * factor
        place = self._latest[(total & WORD) >> self._shift]
        while place and tuple(self._tokens[place - size : place]) != ngram:
            place = self._before[place]
        return place
