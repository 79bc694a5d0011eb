"""`python -m executor.commands.doctor [RECIPE.yaml] [--set section.key=value ...]`: what this machine has and lacks.

Needs the standard library alone (Python 3.8 is enough to be told that 3.11 is needed), changes nothing, and takes
seconds (with torch_npu installed up to a minute: it is imported once, in a process of its own). Prints a line for each
finding and, last, one JSON document. Exit status 0; 1 when a recipe is given and cannot run here; 2 when it cannot be
read. The recipe is read by a reader of its own (executor/doctor/recipe.py), because the standard library has no YAML.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from executor.doctor import demands, findings, hardware, host, software
from executor.doctor.facts import gather
from executor.doctor.recipe import RecipeError, Wish, read_recipe
from executor.host.env import REPO_ROOT
from executor.host.machine import Machine
from executor.host.streams import READER_GONE, print_document, reader_is_gone, write_to_nobody

CHECKS = (hardware, software, host, demands)


class _Parser(argparse.ArgumentParser):
    """Raises RecipeError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}\n{self.format_usage().strip()}")


def main(argv: list[str] | None = None, machine: Machine | None = None) -> int:
    """Examine `machine` (this one), print the report, return the exit status."""
    try:
        return _run(argv, machine or Machine())
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        write_to_nobody()
        return READER_GONE


def _run(argv: list[str] | None, machine: Machine) -> int:
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        wish = _read(machine, arguments.recipe, arguments.overrides) if arguments.recipe else None
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        print_document({"command": "doctor", "error": str(error)})
        return 2
    document = examine(machine, str(REPO_ROOT), wish)
    for line in findings.lines(findings.Finding(**row) for row in document["findings"]):
        print(line)
    recipe = arguments.recipe or "CONFIG.yaml"
    print(f"         memory and predicted speed on any chip:  bash infer.sh {recipe} plan")
    print_document(document)
    return 1 if wish and not document["ok"] else 0


def examine(machine: Machine, repo_root: str, wish: Wish | None = None) -> dict:
    """The JSON document about a machine and a wish."""
    facts = gather(machine, repo_root, wish)
    return findings.document(finding for check in CHECKS for finding in check.check(facts))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m executor.commands.doctor", description="What this machine has and lacks.")
    parser.add_argument("recipe", metavar="RECIPE.yaml", nargs="?", help="whether this recipe can run here")
    parser.add_argument(
        "--set",
        metavar="section.key=value",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        help="change a value of the recipe; may be repeated",
    )
    arguments = parser.parse_args(argv)
    if arguments.recipe is None and len(arguments.overrides) > 1 and "=" not in arguments.overrides[-1]:
        arguments.recipe = arguments.overrides.pop()  # it stood behind --set
    return arguments


def _read(machine: Machine, path: str, overrides: list[str]) -> Wish:
    places = [os.path.join(machine.cwd, os.path.expanduser(path)), os.path.join(str(REPO_ROOT), path)]
    text = next((text for text in map(machine.read, places) if text is not None), None)
    if text is None:
        raise RecipeError(f"there is no recipe {path}")
    try:
        return read_recipe(text, overrides)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
