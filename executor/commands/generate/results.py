"""The JSONL of answers that a long run writes as it goes, and goes on from.

Invariants: a row is whole or not there (a half-written last line is dropped); an answer stands beside the fingerprint
of its question and settings, so that a file of another run is refused, never continued or overwritten; a file that was
finished has one row for each request, in their order.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dataset.sample import Sample
from executor.errors import UserError
from executor.recipe.schema import Recipe

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


def fingerprint(sample: Sample, settings: str) -> str:
    """Digest of one question under `settings`."""
    return hashlib.sha256(f"{sample.fingerprint()} {settings}".encode()).hexdigest()[:16]


class ResultsFile:
    """Append-only while a run goes on, rewritten in order when it is done. Use as a context manager."""

    def __init__(self, path: str | Path, settings: str, samples: Iterable[Sample]) -> None:
        """Open or continue `path` for the answers to `samples`, which are read as far as rows come.

        UserError when the file holds something else, or cannot be written.
        """
        self.path = Path(path).expanduser()
        self.settings = settings
        self._samples = iter(samples)
        self._fingerprints: list[str] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115 (closed by __exit__)
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
                rows[row["index"]] = row
                row["fingerprint"], row["error"]  # noqa: B018 (a row of ours has them)
            except (ValueError, KeyError, TypeError) as error:
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
            expected = self._fingerprint(index)
            if expected is None:
                break
            if row["fingerprint"] != expected:
                raise UserError(
                    f"data_config.results_path: {self.path} holds the answers of another run: row {index} is not an "
                    f"answer to request {index} with these settings. Give another results_path, or delete the file"
                )
        return {index: {key: row[key] for key in row if key != "fingerprint"} for index, row in good.items()}

    def _fingerprint(self, index: int) -> str | None:
        """Of the sample at `index`; None behind the last."""
        for sample in self._samples if index >= len(self._fingerprints) else ():
            self._fingerprints.append(fingerprint(sample, self.settings))
            if index < len(self._fingerprints):
                break
        return self._fingerprints[index] if index < len(self._fingerprints) else None

    def append(self, row: dict[str, Any]) -> None:
        """Write one row through to the operating system; it replaces an earlier row of the same index."""
        row = {**row, "fingerprint": self._fingerprint(row["index"])}
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
