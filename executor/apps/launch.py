"""`python -m executor.apps.launch CONFIG [COMMAND] [--set section.key=value ...]`: what infer.sh runs.

Reads the recipe, runs the command, and keeps the contract of all commands: logs on stderr, results on stdout, the last
stdout line one JSON document, exit status 0 done, 2 the user's mistake, 1 anything else.
"""

import argparse
import importlib
import json
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from executor.env import calm_threads
from executor.errors import UserError, nearest

COMMANDS = {
    "generate": "answer the recipe's questions (the default)",
    "serve": "an HTTP server with the OpenAI interface",
    "bench": "measure throughput and latency",
    "eval": "measure accuracy on a benchmark",
    "plan": "memory and speed of the recipe, by arithmetic",
    "check": "what the recipe needs of a chip, without weights",
}
MODULES = {"generate": "executor.apps.generate", "check": "executor.apps.check"}  # the commands of this release

EXAMPLES = """examples:
  bash infer.sh config/quickstart.yaml
  bash infer.sh config/quickstart.yaml --set data_config.prompt="What do you see?" --set data_config.media=[a.png,b.mp4]
"""


class _Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{self.format_usage().strip()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Everything a command raises ends here."""
    calm_threads()  # before anything imports torch
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(name)s: %(message)s", stream=sys.stderr)
    command = "launch"
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        command = arguments.command
        document, status = run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        document, status = {"command": command, "error": str(error)}, 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        document, status = {"command": command, "error": "interrupted"}, 130
    except Exception as error:
        traceback.print_exc()
        document, status = {"command": command, "error": f"{type(error).__name__}: {error}"}, 1
    sys.stderr.flush()
    print(json.dumps(document, ensure_ascii=False), flush=True)
    return status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as (config, command, overrides). UserError for anything else."""
    commands = "\n".join(f"  {name:<10}{purpose}" for name, purpose in COMMANDS.items())
    parser = _Parser(
        prog="bash infer.sh",
        usage="bash infer.sh CONFIG.yaml [COMMAND] [--set section.key=value ...]",
        description=f"Run one recipe.\n\ncommands:\n{commands}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe, e.g. config/quickstart.yaml")
    parser.add_argument("command", metavar="COMMAND", nargs="?", default="generate", help="see above")
    parser.add_argument(
        "--set",
        metavar="section.key=value",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        help="change a value of the recipe; may be repeated",
    )
    parser.add_argument("--save", metavar="FILE", type=Path, help="check: write the decode graph there (GE, as text)")
    arguments = parser.parse_args(argv)
    if arguments.command not in COMMANDS:
        known = f"{', '.join(COMMANDS)}{nearest(arguments.command, COMMANDS)}"
        raise UserError(f"unknown command '{arguments.command}'; commands: {known}")
    if arguments.save is not None and arguments.command != "check":
        raise UserError(f"--save belongs to the command check, got {arguments.command}")
    return arguments


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """The JSON document and the exit status of a parsed command line."""
    module = MODULES.get(arguments.command)
    if module is None:
        raise UserError(
            f"the command {arguments.command} is not part of this release yet; there is: {', '.join(MODULES)}"
        )
    from executor.config import load_recipe  # pydantic takes a moment that --help need not wait for

    options = {} if arguments.save is None else {"save": arguments.save}
    return importlib.import_module(module).run(load_recipe(arguments.config, arguments.overrides), **options)


if __name__ == "__main__":
    sys.exit(main())
