"""The JSONL of answers that a long run writes as it goes, and goes on from.

Invariants: a row is whole or not there (a half-written last line is dropped); an answer stands beside the fingerprint
of its question and settings, so that a file of another run is refused, never continued or overwritten; a file that was
finished has one row for each request, in their order; one run at a time has the file (flock, which ends with its
process).
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from dataset.sample import Dataset, Sample
from executor.errors import UserError
from executor.recipe.schema import Recipe

logger = logging.getLogger(__name__)

# Where things lie and how many are answered at once change no answer.
_NOT_IN_ANSWERS = {"results_path", "limit", "dataset", "dataset_path", "prompt", "media"}


def settings_of(recipe: Recipe) -> str:
    """Digest of everything in a (settled) recipe that answers depend on."""
    settings = {
        "model": recipe.model.model_dump(include={"model_path", "dtype", "quantization"}),
        "generation": recipe.generation.model_dump(exclude={"draw"}),
        "data": recipe.data.model_dump(exclude=_NOT_IN_ANSWERS),
        "max_model_len": recipe.scheduler.max_model_len,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(asked: str, settings: str) -> str:
    """Digest of one question (`Sample.fingerprint`) under `settings`."""
    return hashlib.sha256(f"{asked} {settings}".encode()).hexdigest()[:16]


class ResultsFile:
    """Append-only while a run goes on, rewritten in order when it is done. Use as a context manager."""

    def __init__(self, path: str | Path, settings: str, samples: Sequence[Sample] | Dataset) -> None:
        """Open or continue `path` for the answers to `samples`, of which those answered already are read.

        UserError when the file holds something else, cannot be written, or another run is writing it.
        """
        self.path = Path(path).expanduser()
        self.settings = settings
        self._samples = samples
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._locked()
        except OSError as error:
            raise UserError(f"data_config.results_path: {self.path} cannot be written: {error}") from error
        try:
            self._rows = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _locked(self) -> IO[bytes]:
        """The file, open and locked. Raises OSError, or UserError while another run has it."""
        while True:
            file = open(self.path, "a+b")  # noqa: SIM115 (closed by __exit__)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UserError(
                    f"data_config.results_path: {self.path} is being written by another run; wait for its end, or give "
                    "another results_path"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                    file.close()
                    raise
                logger.warning("%s: this file system has no locks; start no second run with it", self.path)
                return file
            # Between opening and locking the run before may have put its sorted file in this one's place.
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                return file
            file.close()

    def _read(self) -> dict[int, dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        rows: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if type(row["index"]) is not int or row["index"] < 0:
                    raise TypeError(row["index"])
                row["fingerprint"], row["error"]  # noqa: B018 (a row of ours has them)
                rows[row["index"]] = row
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"data_config.results_path: {self.path} line {number} is no answer of an earlier run; "
                    "give another results_path"
                ) from error
        if content[whole:].strip() and not rows:
            raise UserError(f"data_config.results_path: {self.path} is no file of answers; give another results_path")
        self._file.truncate(whole)
        return rows

    def answered(self) -> dict[int, dict[str, Any]]:
        """The good rows of an earlier run by index. UserError if one answers another question than it does now.

        Rows beyond the last sample (data_config.limit) are left alone.
        """
        good = {index: row for index, row in sorted(self._rows.items()) if row["error"] is None}
        for index, row in good.items():
            if index >= len(self._samples):
                break
            if row["fingerprint"] != fingerprint(self._samples[index].fingerprint(), self.settings):
                raise UserError(
                    f"data_config.results_path: {self.path} holds the answers of another run: row {index} is not an "
                    f"answer to request {index} with these settings. Give another results_path, or delete the file"
                )
        return {index: {key: row[key] for key in row if key != "fingerprint"} for index, row in good.items()}

    def append(self, row: dict[str, Any], asked: str) -> None:
        """Write one row through to the operating system; it replaces an earlier row of the same index.

        `asked`: the fingerprint of the row's sample.
        """
        row = {**row, "fingerprint": fingerprint(asked, self.settings)}
        self._rows[row["index"]] = row
        self._file.write(_line(row))
        self._file.flush()

    def sort(self) -> None:
        """Put the rows into the order of the requests, one for each. All or nothing."""
        partial = self.path.with_name(self.path.name + ".partial")
        with open(partial, "wb") as file:
            file.writelines(_line(self._rows[index]) for index in sorted(self._rows))
        os.replace(partial, self.path)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
