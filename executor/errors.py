"""The three kinds of error, and the one that is the user's.

UserError: a recipe, checkpoint or input that cannot work; the command line exits with 2.
RuntimeError: the environment failed (exit 1). AssertionError: a defect of this project (exit 1).
"""

from __future__ import annotations

import difflib
import re
import struct
from collections.abc import Iterable


class UserError(ValueError):
    """The user can mend it. The message says what, got, allowed, and what to do.

    more: a long list for people, shown behind the message on the screen and left out of the JSON.
    where: the part of a request that is wrong, as in "messages[0].content[1]", where the message may not say it.
    """

    def __init__(self, message: str = "", *, more: str = "", where: str | None = None) -> None:
        super().__init__(message)
        self.more = more
        self.where = where


class EngineEnded(RuntimeError):
    """The engine that a command works with has ended, and its message says why: whoever raises this has no part in it,
    so that its traceback would say nothing."""


def nearest(name: str, allowed: Iterable[str], cutoff: float = 0.5) -> str:
    """`" (did you mean 'x'?)"` for the closest of `allowed`, or an empty string.

    cutoff: how alike they must be, from 0 to 1.
    """
    close = difflib.get_close_matches(name, list(allowed), n=5, cutoff=cutoff)
    return f" (did you mean '{min(close, key=lambda each: _distance(name, each))}'?)" if close else ""


def _distance(one: str, other: str) -> int:
    """How many characters to add, drop, exchange or swap with the next one make `one` of `other`."""
    before, last = [], list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            row.append(min(row[-1] + 1, last[j] + 1, last[j - 1] + (a != b)))
            if i > 1 and j > 1 and a == other[j - 2] and b == one[i - 2]:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


_NAMES = re.compile(r"'[^']*'|\bmodel\.[\w.]+|(?<![\w.])-?\d[\d.e+-]*(?!\w)")
_MOST_ALIKE = 3


def folded(lines: Iterable[str]) -> list[str]:
    """The lines, of more than three that differ in names and numbers alone only the first, with how many follow it."""
    alike: dict[str, list[str]] = {}
    lines = list(dict.fromkeys(lines))
    for line in lines:
        alike.setdefault(_NAMES.sub("", line), []).append(line)
    found = []
    for line in lines:
        group = alike[_NAMES.sub("", line)]
        if len(group) <= _MOST_ALIKE:
            found.append(line)
        elif line == group[0]:
            last = _NAMES.search(group[-1])
            of = f", the last of '{last[0].strip(chr(39))}'" if last else ""
            found.append(f"{line} (and {len(group) - 1} more of this kind{of})")
    return found


# What data of an odd form can make readers of it raise: json, Pillow, FFmpeg, Jinja, tokenizers, torch, and arithmetic
# on numbers nobody thought of. Caught around one row of a data set or one file, never around a step of the engine.
# AssertionError is not among them: that is a defect of this project.
ODD_DATA_ERRORS = (
    ArithmeticError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)


SHOWN_CHARACTERS = 400


def shortened(text: str) -> str:
    """One line of not too many characters, of what somebody else says: what a terminal would obey is written out."""
    line = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in " ".join(text.split())
    )
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]} ..."


def printable(text: str) -> str:
    """`text` with halves of characters (lone surrogates: file names that are no UTF-8, cut JSON) written out."""
    return text.encode("utf-8", "backslashreplace").decode()
