"""What the commands share that work on folders rather than on a recipe: `python -m executor.commands.NAME --flags`.

The contract is that of all commands: logs on stderr, results on stdout, the last stdout line one JSON document, exit
status 0 done, 2 the user's mistake, 1 anything else.
"""

import argparse
import contextlib
import io
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from executor.checkpoint.folder import is_hub_id, read_json
from executor.errors import UserError
from executor.host.env import find_path
from executor.host.streams import READER_GONE, print_document, reader_is_gone, write_to_nobody

Document = dict[str, Any]
FAREWELL_S = 2.0
"""How long a failed rank that does not speak stays: torchrun ends all others once one has ended, the speaker too."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program stood."""


STATUS = {KeyboardInterrupt: 128 + signal.SIGINT, Terminated: 128 + signal.SIGTERM}


def terminate_as_interrupt() -> None:
    """Let SIGTERM unwind as SIGINT does, so that the last words are said."""

    def stop(*_: Any) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


class ToolParser(argparse.ArgumentParser):
    """Takes `--model-path` for `--model_path`; raises UserError where argparse would print its usage and exit."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(prog=f"python -m executor.commands.{name}", description=description, allow_abbrev=False)

    def add(self, name: str, **options: Any) -> None:
        """A flag in both spellings."""
        self.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), dest=name, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{self.format_usage().strip()}")


def run_tool(
    command: str, work: Callable[[Sequence[str]], Document], argv: Sequence[str] | None = None, is_shown: bool = True
) -> int:
    """Do `work` of the words of the command line; returns the exit status. Everything it raises ends here.

    `is_shown`: whether this process speaks for the job; of several ranks one does.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(name)s: %(message)s", stream=sys.stderr)
    try:
        with contextlib.nullcontext() if is_shown else contextlib.redirect_stdout(io.StringIO()):
            document, status = _outcome(work, list(sys.argv[1:] if argv is None else argv), is_shown)
            print_document({"command": command, **document})
        if status and not is_shown:
            time.sleep(FAREWELL_S)
        return status
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        write_to_nobody()
        return READER_GONE


def _outcome(work: Callable[[Sequence[str]], Document], argv: Sequence[str], is_shown: bool) -> tuple[Document, int]:
    try:
        return work(argv), 0
    except UserError as error:
        if is_shown:
            print(f"error: {error}{error.more}", file=sys.stderr)
        return {"error": str(error)}, 2
    except KeyboardInterrupt as stop:
        told = f"interrupted{f': {stop}' if str(stop) else ''}"
        print(told, file=sys.stderr)
        return {"error": told}, STATUS[type(stop)]
    except BrokenPipeError:
        raise
    except RuntimeError as error:
        if is_shown:
            print(f"error: {error}", file=sys.stderr)
        return {"error": str(error)}, 1
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}, 1


def checkpoint_folder(model_path: str, what: str = "quantized", flag: str = "--model_path") -> Path:
    """The folder that `flag` names, of a checkpoint that is `what` (quantized, float).

    UserError where it is none, or no checkpoint.
    """
    folder = find_path(model_path)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist on this machine"
        hub = "; a hub id is not enough here, download it first" if is_hub_id(model_path) else ""
        raise UserError(f"{flag}: {model_path} {found}; give the folder of a {what} checkpoint{hub}")
    read_json(folder, "config.json")
    return folder
