"""Texts that an answer may not hold: which tokens would complete one, told by the few tokens before.

A word is barred as the tokenizer writes it at the beginning of a text and behind a space (as in vLLM); written with
other tokens it is not recognised.
Invariant: what is barred follows from the answer's last tokens alone, as many as the longest word has; nothing is kept
between steps, so preemption and steps of several tokens change nothing.
"""

from collections.abc import Iterable, Sequence
from typing import Any


class BadWords:
    """The token sequences of some words."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        # How many tokens come before the last one -> these -> what may not follow them.
        self._barred: dict[int, dict[tuple[int, ...], set[int]]] = {}
        for sequence in sequences:
            *before, last = sequence
            self._barred.setdefault(len(before), {}).setdefault(tuple(before), set()).add(last)

    @classmethod
    def of(cls, tokenizer: Any, words: Sequence[str]) -> "BadWords | None":
        """None without words. A special token in a word is one: it can be barred, too."""
        sequences = set()
        for word in words:
            rest = word.lstrip()
            for text in (word, rest, f" {rest}") if rest else (word,):
                sequences.add(tuple(tokenizer.encode(text, add_special_tokens=False)))
        return cls(sequences - {()}) if sequences else None

    def after(self, token_ids: Sequence[int], count: int) -> set[int]:
        """What may not come behind the first `count` tokens of an answer."""
        found: set[int] = set()
        for length, barred in self._barred.items():
            if length <= count:
                found.update(barred.get(tuple(token_ids[count - length : count]), ()))
        return found
