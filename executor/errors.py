"""The three kinds of error, and the one that is the user's.

UserError: a recipe, checkpoint or input that cannot work; the command line exits with 2.
RuntimeError: the environment failed (exit 1). AssertionError: a defect of this project (exit 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user can mend it. The message says what, got, allowed, and what to do."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `allowed`, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
