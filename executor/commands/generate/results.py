"""The JSONL of answers that a long run writes as it goes, and goes on from.

Invariants: a row is whole or not there (a half-written last line is dropped); rows are checked by the types of their
fields (a text that somebody edited into another text is believed); an answer stands beside the fingerprint
of its question and settings, so that a file of another run is refused, never continued or overwritten; a file that was
finished has one row for each request, in their order; one run at a time has the file (flock, which ends with its
process).
"""

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from dataset.sample import Dataset, Sample
from executor.errors import UserError
from executor.host import locks
from executor.prompt.messages import describe
from executor.recipe.schema import Recipe

logger = logging.getLogger(__name__)

# Where things lie and how many are answered at once change no answer.
_NOT_IN_ANSWERS = {"results_path", "limit", "dataset", "dataset_path", "prompt", "media"}

_KINDS = {  # what a results_path may not be: nothing could be read back from it, or reading it never ends
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
_ROW_HEAD = b'{"index": 0, "id": "'  # how every row begins, but for the number
_COUNT, _TIME, _TEXT = (int, type(None)), (int, float, type(None)), (str, type(None))
_REQUIRED_FIELDS: dict[str, tuple[type, ...]] = {
    **{"index": (int,), "id": (str,), "media": (list,), "prompt": (str,), "text": _TEXT, "error": _TEXT},
    **{"fingerprint": (str,), "prompt_tokens": _COUNT, "vision_tokens": _COUNT, "completion_tokens": _COUNT},
}
_OTHER_FIELDS: dict[str, tuple[type, ...]] = {
    **{"finish_reason": _TEXT, "ttft_ms": _TIME, "tpot_ms": _TIME, "e2e_ms": _TIME, "prepare_ms": _TIME},
    **{"cached_tokens": _COUNT, "seed": _COUNT, "reference": _TEXT, "drawn": _TEXT},
    **{"media_sizes": (list,), "warnings": (list,), "texts": (list,), "logprobs": (list,)},
}
_LISTS_OF_TEXTS = ("media", "warnings", "texts")


def settings_of(recipe: Recipe) -> str:
    """Digest of everything in a (settled) recipe that answers depend on."""
    settings = {
        "model": recipe.model.model_dump(include={"model_path", "device", "dtype", "quantization", "kv_cache_dtype"}),
        "generation": recipe.generation.model_dump(exclude={"draw"}),
        "data": recipe.data.model_dump(exclude=_NOT_IN_ANSWERS),
        "max_model_len": recipe.scheduler.max_model_len,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(asked: str, settings: str) -> str:
    """Digest of one question (`Sample.fingerprint`) under `settings`."""
    return hashlib.sha256(f"{asked} {settings}".encode()).hexdigest()[:16]


def check_place(path: str | Path) -> None:
    """UserError where `path` is there and no regular file; OSError where that cannot be found out."""
    path = Path(path).expanduser()
    mode = path.stat().st_mode if path.exists() else stat.S_IFREG
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS.items() if is_kind(mode)), "something else")
        raise UserError(
            f"data_config.results_path: {path} cannot be written: it is {kind}, no regular file; "
            "give the path of a file"
        )


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
            check_place(self.path)
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

    def __exit__(self, kind: object, *exception: object) -> None:
        with nullcontext() if kind is None else suppress(OSError):  # what a full disk has refused is refused once more
            self._file.close()

    def _locked(self) -> IO[bytes]:
        """The file, open and locked. Raises OSError, or UserError while another run has it."""
        while True:
            file = open(self.path, "a+b")  # noqa: SIM115 (closed by __exit__)
            try:
                is_free = locks.take(file)
            except OSError:
                file.close()
                raise
            if not is_free:
                file.close()
                raise UserError(
                    f"data_config.results_path: {self.path} is being written by another run; wait for its end, or give "
                    "another results_path"
                )
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
                row["index"], row["fingerprint"], row["error"]  # noqa: B018 (a row of ours has them)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"data_config.results_path: {self.path} line {number} is no answer of an earlier run; "
                    "give another results_path"
                ) from error
            fault = _fault(row)
            if fault:
                raise UserError(
                    f"data_config.results_path: {self.path} line {number} was changed: {fault}. Mend that line, delete "
                    "it (its question is then answered again), or give another results_path"
                )
            rows[row["index"]] = row
        if not rows and not _is_cut_row(content[whole:]):
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
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise self._unwritten(error) from error

    def sort(self, rows: Mapping[int, dict[str, Any]]) -> None:
        """Put the rows into the order of the requests, one for each, as they are in `rows` where it has them. All or
        nothing."""
        for index, row in rows.items():
            self._rows[index] = {**row, "fingerprint": self._rows[index]["fingerprint"]}
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                file.writelines(_line(self._rows[index]) for index in sorted(self._rows))
            os.replace(partial, self.path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(
            f"data_config.results_path: {self.path} cannot be written any more ({error.strerror}). The answers before "
            "are in it: make room, and the same command goes on from there"
        )


def _is_cut_row(line: bytes) -> bool:
    """Whether a line without its end is the beginning of a row of ours, or nothing."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        head = re.sub(rb'^(\{"index": )\d+', rb"\g<1>0", line[: 2 * len(_ROW_HEAD)])
        return head.startswith(_ROW_HEAD) or _ROW_HEAD.startswith(head) or not line.strip()
    return isinstance(row, dict) and row.keys() >= _REQUIRED_FIELDS.keys()


def _fault(row: dict[str, Any]) -> str | None:
    """What a row cannot hold when a run has written it; None for one that may be ours."""
    for key, types in {**_REQUIRED_FIELDS, **_OTHER_FIELDS}.items():
        if key not in row:
            if key in _REQUIRED_FIELDS:
                return f"there is no {key}"
            continue
        if type(row[key]) not in types:
            return f"{key} is {describe(row[key])}"
        if key in _LISTS_OF_TEXTS and not all(isinstance(item, str) for item in row[key]):
            return f"{key} holds something else than texts"
    if row["index"] < 0:
        return f"index is {row['index']}"
    if row["error"] is None and (row["text"] is None or row["completion_tokens"] is None):
        return "there is neither an answer nor an error"
    return None


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
