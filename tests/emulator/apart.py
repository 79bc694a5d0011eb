"""Runs tests in an emulating process of their own, several files in one: importing torch_npu takes seconds.

Emulation stays in a process for good (torch_npu patches torch), so these tests never share one with the others.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.reference import REPO

_COMMAND = [sys.executable, "-m", "pytest", "-q", "-rf", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]


@dataclass
class Outcome:
    """What became of one file's tests; `problems` names those that failed or did not start, with their reports."""

    num_passed: int = 0
    problems: list[str] = field(default_factory=list)

    def check(self, least: int = 1) -> None:
        """Every test has passed or was skipped, and at least so many have passed."""
        assert not self.problems, "\n\n".join(self.problems)[-8000:]
        assert self.num_passed >= least, f"{self.num_passed} tests have passed, {least} are expected"


def run_apart(*paths: str, options: tuple[str, ...] = (), timeout_s: float = 1200) -> dict[str, Outcome]:
    """The outcome of every test file in `paths`, which are files and folders relative to the repository, by its name.

    Raises AssertionError where pytest ended otherwise than with passed or failed tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*_COMMAND, "-p", "tests.emulator.emulating", f"--junit-xml={report}", *options, *paths]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode in (0, 1), f"{done.stdout[-8000:]}\n{done.stderr[-3000:]}"
        outcomes: dict[str, Outcome] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            # A module that cannot be imported has its path as its name and no class.
            module = next(part for part in (case.get("classname") or case.get("name", "")).split(".")[::-1] if part)
            outcome = outcomes.setdefault(f"{module}.py", Outcome())
            problem = next((part for part in case if part.tag in ("failure", "error")), None)
            if problem is not None:
                outcome.problems.append(f"{case.get('name')}\n{problem.text}")
            elif case.find("skipped") is None:
                outcome.num_passed += 1
    assert bool(done.returncode) == any(outcome.problems for outcome in outcomes.values()), done.stdout[-8000:]
    return outcomes
