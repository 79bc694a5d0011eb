"""Parametrisations that are too large for every run."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_long(cases: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """The values of a parametrisation: those of `always` in every run, the others with -m long."""
    cases = list(cases)
    assert all(each in cases for each in always), "what always runs is one of the cases"
    return [case if case in always else _long(case) for case in cases]


def _long(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
