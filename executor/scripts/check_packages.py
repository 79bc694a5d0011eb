"""Tells whether the interpreter that runs this file meets requirement files: `check_packages.py FILE...`.

Prints one line for each requirement that is not met (`name version is missing|is VERSION, wanted ...`) and exits 1;
prints nothing and exits 0 when all are. Standard library only: it runs where nothing is installed. Understands
`name>=1.0,<2` lines and comments, which is all that this project's files have.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*(.*)$")
BOUND = re.compile(r"^(>=|<=|==|!=|<|>)\s*([0-9][0-9.]*)$")
COMPARE = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: 2.13.0+cpu is (2, 13, 0), 2.9.0rc1 is (2, 9, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


def meets(version: str, bounds: str) -> bool:
    """Whether `version` lies within `>=1.0,<2`."""
    have = release(version)
    for bound in filter(None, (part.strip() for part in bounds.split(","))):
        operator, wanted = BOUND.match(bound).groups()
        want = release(wanted)
        width = max(len(have), len(want))
        left, right = (numbers + (0,) * (width - len(numbers)) for numbers in (have, want))
        if not COMPARE[operator](left, right):
            return False
    return True


def unmet(path: Path) -> list[str]:
    """A line for each requirement of the file that this interpreter does not meet."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if not requirement:
            continue
        name, bounds = REQUIREMENT.match(requirement).groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            lines.append(f"{name} is missing")
            continue
        if not meets(version, bounds):
            lines.append(f"{name} is {version}, wanted {bounds}")
    return lines


if __name__ == "__main__":
    problems = [line for name in sys.argv[1:] for line in unmet(Path(name))]
    print("\n".join(problems), end="\n" if problems else "")
    sys.exit(bool(problems))
