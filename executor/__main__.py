"""`python -m executor CONFIG [COMMAND] [--set section.key=value ...]`: what infer.sh runs.

Reads the recipe, runs the command, and keeps the contract of all commands: logs on stderr, results on stdout, the last
stdout line one JSON document, exit status 0 done, 2 the user's mistake, 1 anything else.
"""

import argparse
import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from executor.command_line import MODULES, check, extra_commands, parse
from executor.errors import EngineEnded, UserError
from executor.host.env import calm_threads, environment, quiet_torch
from executor.host.streams import READER_GONE, print_document, reader_is_gone, write_to_nobody

if TYPE_CHECKING:
    from executor.launch.rank import Rank
    from executor.recipe.schema import Recipe

logger = logging.getLogger("executor")


def needs_ranks(arguments: argparse.Namespace, recipe: "Recipe") -> bool:
    """Whether a command computes on the recipe's ranks, however many these are. What starts a server leaves them to
    it."""
    if arguments.command in ("plan", "check") or arguments.compared is not None:
        return False
    return arguments.command != "bench" or recipe.bench.mode != "serve"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Everything a command raises ends here."""
    try:
        return _run(argv)
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        write_to_nobody()
        return READER_GONE


def _run(argv: Sequence[str] | None) -> int:
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
            print(f"error: {error}{error.more}", file=sys.stderr)
        document, status = {"command": command, "error": str(error)}, 2
    except KeyboardInterrupt as interrupt:
        words = f"interrupted{': ' if interrupt.args else ''}{interrupt}"
        print(words, file=sys.stderr)
        document, status = {"command": command, "error": words}, 130
    except EngineEnded as error:
        print(f"error: {error}", file=sys.stderr)
        document, status = {"command": command, "error": str(error)}, 1
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            if rank is None:
                raise
            document, status = {"command": command, "error": "nobody reads stdout any more"}, READER_GONE
        else:
            traceback.print_exc()
            document, status = {"command": command, "error": f"{type(error).__name__}: {error}"}, 1
    sys.stderr.flush()
    if rank is not None:
        return rank.finish(document, status, failed)
    print_document(document)
    return status


def _rank() -> "Rank | None":
    """This process as a rank, where a launcher (ours, torchrun, Slurm) has made it one."""
    if not {"RANK", "SLURM_PROCID"} & environment().keys():
        _end_with_starter()
        return None
    from executor.launch.rank import Rank

    return Rank.of_this_process()


def _end_with_starter() -> None:
    """A job on a cluster ends with the worker that has started it; its ranks end with their launcher."""
    starter = environment().get("RECIPE_PARENT")
    if starter is not None:
        from executor.launch.processes import die_with_parent

        die_with_parent(int(starter))


def run(arguments: argparse.Namespace, argv: Sequence[str], rank: "Rank | None" = None) -> tuple[dict[str, Any], int]:
    """The JSON document and the exit status of a parsed command line, which was `argv`.

    A rank runs the command; without a launcher a recipe of one rank is run right here, and a larger one is launched.
    """
    check(arguments)
    if arguments.compared is not None:
        name = f"executor.commands.{arguments.command}.compare"
    else:
        name = (MODULES | extra_commands())[arguments.command]
    from executor.recipe.schema import load_recipe  # pydantic takes a moment that --help need not wait for

    recipe = load_recipe(arguments.config, arguments.overrides)
    is_head = rank is None and recipe.num_jobs(arguments.command) > 1  # jobs on a cluster have the ranks
    is_alone = is_head or (rank is None and recipe.parallel.world_size == 1)
    if is_alone and not is_head and needs_ranks(arguments, recipe):
        _set_options(recipe, local_ranks=1)
    if rank is None and arguments.command == "serve":
        from executor.commands.serve.mistakes import check_mistakes

        # A job that a cluster has started attends the front door, and listens nowhere.
        check_mistakes(recipe, listens=is_alone and "RECIPE_FRONT" not in environment())
        logger.info("loading %s", recipe.model.model_path)
    if is_alone or not needs_ranks(arguments, recipe):
        options = {} if arguments.save is None else {"save": arguments.save}
        if arguments.compared is not None:
            options = {"compared": arguments.compared}
        return importlib.import_module(name).run(recipe, **options)

    from executor.recipe.settle import prepare

    def check_node(recipe: "Recipe", local_ranks: int) -> "Recipe":
        if arguments.command in MODULES:
            return prepare(recipe, local_ranks).recipe
        return importlib.import_module(name).check(recipe)

    if rank is None:
        with quiet_torch():
            from executor.launch.job import start_job

        return start_job(recipe, arguments.command, argv, check_node)

    rank.start(recipe, arguments.command, check_node, lambda: _set_options(recipe, rank.place.local_world_size))
    return importlib.import_module(name).run(recipe)


def _set_options(recipe: "Recipe", local_ranks: int) -> None:
    """Give this rank the variables that our launcher gives the ranks of a job, before anything imports torch."""
    from executor.launch.options import apply, rank_options
    from executor.recipe.settle import has_torch_npu, resolve_device

    device = resolve_device(recipe).model.device
    if device == "npu" and not has_torch_npu():  # which is refused in a moment
        return
    apply(rank_options(recipe, device, local_ranks))


def end(status: int) -> NoReturn:
    """End this process. A thread that still asks the job's store (which may never answer), reads a long video or
    computes a step comes back from C++ into an interpreter that is being taken down, and aborts it: then the status
    would be SIGABRT's."""
    if any(thread.name.startswith(("store: ", "prepare: ", "engine", "teller")) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    end(main())
