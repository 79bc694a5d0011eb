"""`python -m executor CONFIG [COMMAND] [--set section.key=value ...]`: what infer.sh runs.

Reads the recipe, runs the command, and keeps the contract of all commands: logs on stderr, results on stdout, the last
stdout line one JSON document, exit status 0 done, 2 the user's mistake, 1 anything else.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from executor.errors import UserError, nearest
from executor.host.env import calm_threads, environment

if TYPE_CHECKING:
    from executor.launch.rank import Rank
    from executor.recipe.schema import Recipe

COMMANDS = {
    "generate": "answer the recipe's questions (the default)",
    "serve": "an HTTP server with the OpenAI interface",
    "bench": "measure throughput and latency",
    "eval": "measure accuracy on a benchmark",
    "plan": "memory and speed of the recipe, by arithmetic",
    "check": "what the recipe needs of a chip, without weights",
}
MODULES = {  # the commands of this release
    "generate": "executor.commands.generate.run",
    "check": "executor.commands.check",
}
ONE_PROCESS = ("plan", "check")  # compute nothing on ranks, however many the recipe has

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
    command, rank, failed = "launch", None, True
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        rank = _rank()
        arguments = parse(argv)
        command = arguments.command
        document, status = run(arguments, argv, rank)
        failed = False
    except UserError as error:
        if rank is None or rank.shows_mistakes:
            print(f"error: {error}", file=sys.stderr)
        document, status = {"command": command, "error": str(error)}, 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        document, status = {"command": command, "error": "interrupted"}, 130
    except Exception as error:
        traceback.print_exc()
        document, status = {"command": command, "error": f"{type(error).__name__}: {error}"}, 1
    sys.stderr.flush()
    if rank is not None:
        return rank.finish(document, status, failed)
    print(json.dumps(document, ensure_ascii=False), flush=True)
    return status


def _rank() -> "Rank | None":
    """This process as a rank, where a launcher (ours, torchrun, Slurm) has made it one."""
    if not {"RANK", "SLURM_PROCID"} & environment().keys():
        return None
    from executor.launch.rank import Rank

    return Rank.of_this_process()


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
    if arguments.command not in COMMANDS | extra_commands():
        known = f"{', '.join(COMMANDS)}{nearest(arguments.command, COMMANDS)}"
        raise UserError(f"unknown command '{arguments.command}'; commands: {known}")
    if arguments.save is not None and arguments.command != "check":
        raise UserError(f"--save belongs to the command check, got {arguments.command}")
    return arguments


def run(arguments: argparse.Namespace, argv: Sequence[str], rank: "Rank | None" = None) -> tuple[dict[str, Any], int]:
    """The JSON document and the exit status of a parsed command line, which was `argv`.

    A rank runs the command; without a launcher a recipe of one rank is run right here, and a larger one is launched.
    """
    modules = MODULES | extra_commands()
    name = modules.get(arguments.command)
    if name is None:
        raise UserError(
            f"the command {arguments.command} is not part of this release yet; there is: {', '.join(MODULES)}"
        )
    from executor.recipe.schema import load_recipe  # pydantic takes a moment that --help need not wait for

    recipe = load_recipe(arguments.config, arguments.overrides)
    if arguments.command in ONE_PROCESS or (rank is None and recipe.parallel.world_size == 1):
        options = {} if arguments.save is None else {"save": arguments.save}
        return importlib.import_module(name).run(recipe, **options)

    from executor.recipe.settle import prepare, resolve_device

    def check(recipe: "Recipe", local_ranks: int) -> "Recipe":
        if arguments.command in MODULES:
            return prepare(recipe, local_ranks).recipe
        return importlib.import_module(name).check(recipe)

    if rank is None:
        from executor.launch.job import start_job

        return start_job(recipe, arguments.command, argv, check)

    from executor.launch.options import rank_options

    device = resolve_device(recipe).model.device
    rank.start(recipe, arguments.command, check, lambda: rank_options(recipe, device, rank.place.local_world_size))
    return importlib.import_module(name).run(recipe)


def extra_commands() -> dict[str, str]:
    """Commands beyond those of COMMANDS, as RECIPE_COMMANDS names them: `probe=package.module,...`.

    Such a module has `run(recipe)`, and `check(recipe)`, which settles the recipe of several ranks or raises UserError
    for what keeps a node from starting.
    """
    named = environment().get("RECIPE_COMMANDS", "")
    return dict(entry.split("=", 1) for entry in named.split(",") if "=" in entry)


def end(status: int) -> NoReturn:
    """End this process. A thread that still asks the job's store (which may never answer) comes back from C++ into an
    interpreter that is being taken down, and aborts it: then the status would be SIGABRT's."""
    if any(thread.name.startswith("store: ") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    end(main())
