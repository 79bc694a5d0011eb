"""stdout as scripts and people read it: one JSON document at the end, and no noise when the reader has gone.

Standard library only, and importable on Python 3.8 (the doctor).
"""

from __future__ import annotations

import json
import os
import select
import sys
from typing import Any

READER_GONE = 128 + 13
"""Exit status of a process that SIGPIPE ended, as of any Unix tool before `| head -1`."""
WHOLE_CHARACTERS = 400
VALUE_CHARACTERS = 100


def print_document(document: dict[str, Any]) -> None:
    """The last line of a command: whole for pipes and files, shortened (and still JSON) for a terminal."""
    if sys.stdout is None:  # closed by whoever started this process
        return
    whole = json.dumps(document, ensure_ascii=False)
    if sys.stdout.isatty() and len(whole) > WHOLE_CHARACTERS:
        whole = json.dumps(shortened(document), ensure_ascii=False)
    print(whole, flush=True)


def shortened(document: dict[str, Any]) -> dict[str, Any]:
    """The document with every long value in few words. The error stays whole: it says what to do."""
    short = {key: value if key == "error" else _in_few_words(value) for key, value in document.items()}
    return {**short, "shortened": "for the terminal; a pipe or a file gets the whole document"}


def _in_few_words(value: Any) -> Any:
    if len(json.dumps(value, ensure_ascii=False)) <= VALUE_CHARACTERS:
        return value
    if isinstance(value, str):
        return value[:VALUE_CHARACTERS] + "..."
    return f"{len(value)} entries"


def reader_is_gone() -> bool:
    """Whether whoever read this process's stdout or stderr has closed the pipe."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)  # a closed reader is reported unasked
    return any(events & select.POLLERR for _, events in poll.poll(0))


def write_to_nobody() -> None:
    """From here on stdout and stderr lead nowhere, so that nothing complains of the closed pipe on the way out."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
