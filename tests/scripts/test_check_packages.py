"""Which packages an interpreter lacks: versions within bounds, files as this project has them, the exit status."""

import subprocess
import sys

import pytest

from executor.scripts.check_packages import meets, unmet
from tests.reference import REPO

SCRIPT = REPO / "executor" / "scripts" / "check_packages.py"


@pytest.mark.parametrize(
    "version, bounds, wanted",
    [
        ("2.13.0+cpu", ">=2.7.1,<2.15", True),
        ("2.7.1", ">=2.7.1,<2.15", True),
        ("2.7", ">=2.7.1", False),
        ("2.15.0", "<2.15", False),
        ("2.9.0rc1", ">=2.10", False),
        ("10.0", ">=9", True),
        ("1.0", "==1.0.0", True),
        ("1.0", "!=1.0", False),
        ("1.0", "", True),
    ],
)
def test_versions_within_bounds(version, bounds, wanted):
    assert meets(version, bounds) is wanted


def test_the_projects_own_requirements_are_met_here():
    assert unmet(REPO / "requirements.txt") == []


def test_what_is_missing_or_too_old_is_told(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# a comment\n\nno-such-package-of-anyone>=1  # why\npytest>=1,<2\npytest\n")
    missing, old = unmet(path)
    assert missing == "no-such-package-of-anyone is missing"
    assert old.startswith("pytest is ") and old.endswith("wanted >=1,<2")
    done = subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (1, [missing, old])
