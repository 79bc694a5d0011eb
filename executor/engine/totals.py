"""Numbers that add up: those of several engines into one, and what has come to them since a moment.

Plain data that other processes may be sent. Knows nothing of what is counted.
"""

from dataclasses import fields
from itertools import zip_longest
from typing import Any, Self


class Totals:
    """Parent of a dataclass whose fields are numbers, tuples of numbers by place (one that is not there is 0), or
    dataclasses of this kind."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        return self._joined(other, 1)

    def since(self, before: Self) -> Self:
        """What has come to them after `before` was taken."""
        return self._joined(before, -1)

    def _joined(self, other: Self, sign: int) -> Self:
        names = [each.name for each in fields(self)]
        return type(self)(*(_joined(getattr(self, name), getattr(other, name), sign) for name in names))


def _joined(ours: Any, others: Any, sign: int) -> Any:
    if isinstance(ours, Totals):
        return ours._joined(others, sign)
    if isinstance(ours, tuple):
        return tuple(a + sign * b for a, b in zip_longest(ours, others, fillvalue=0))
    return ours + sign * others
