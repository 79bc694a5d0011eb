"""What runs in a Ray worker: starts one job as a process of its own, and says how it ends.

Sent to the node as it stands here, so at its top it imports nothing of this project; the repository is looked for at
the head's path.
"""

import os
import sys
from typing import Any


class Worker:
    """An actor of Ray, which calls it in its main thread."""

    def __init__(self, root: str) -> None:
        if not os.path.isfile(os.path.join(root, "executor", "__main__.py")):
            raise RuntimeError(f"{os.uname().nodename} has no copy of this repository at {root}: put one there")
        sys.path.insert(0, root)
        from executor.cluster.process import JobProcess

        self._root = root
        self._job = JobProcess()

    def start(
        self, cwd: str, recipe: str, command: str, variables: dict[str, str], folder: str, name: str
    ) -> str:  # fmt: skip
        """`cwd` is the head's: relative paths of a recipe mean the same here, or the repository's."""
        os.chdir(cwd if os.path.isdir(cwd) else self._root)
        return self._job.start(recipe, command, variables, folder, name)

    def end(self) -> tuple[Any, ...] | None:
        """Fields of executor.cluster.process.End; None while it runs."""
        end = self._job.end()
        return None if end is None else (end.status, end.words, end.tail)

    def stop(self, patience_s: float) -> None:
        self._job.stop(patience_s)
