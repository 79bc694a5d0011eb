"""What an unfinished quantization keeps in its folder, so that it goes on where it was stopped: with the same bytes.

    OUT/.quantize/lock            locked by the process that works on it
    OUT/.quantize/manifest.json   what this quantization is (identity.py), and how much of it is done; removed last
    OUT/.quantize/samples/        token ids and places of each prompt
    OUT/.quantize/states/N/       what each sample brings to stage N: two sets lie there at most
    OUT/.quantize/stages/N        the tensors of stage N, and their types beside them

A stage counts as done when the manifest says so; what lies there beyond it is made again.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from executor.calibrate.files import put_json, put_tensors
from executor.calibrate.identity import Identity, differences
from executor.calibrate.sample import Sample, sample_of
from executor.checkpoint.headers import TensorInfo, read_header
from executor.checkpoint.writing import Entry, make_folder
from executor.errors import UserError
from executor.host import locks

NAME = ".quantize"
LOCK, MANIFEST = "lock", "manifest.json"


class Work:
    """The unfinished work in `folder`, of this quantization. Nobody else has it while the context manager is open."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder = folder / NAME
        self.identity = json.loads(json.dumps(identity))  # as the manifest gives it back
        self.done = 0  # stages
        self.num_samples: int | None = None  # None: not gathered yet
        self.shards: dict[str, list[int]] = {}  # finished files of weights by name: bytes, time of the last change
        self.is_written = False  # whether the result is whole, and was looked at
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> "Work":
        """Begin, or take up what is there. UserError for a folder that holds anything else, or that another run has."""
        self._check_place()
        make_folder(self.folder)
        self._lock = (self.folder / LOCK).open("ab")
        try:
            if not locks.take(self._lock):
                raise UserError(
                    f"--save_directory: another run is writing {self.folder.parent}; wait for its end, or give another "
                    "folder"
                )
            self._take_up()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def _check_place(self) -> None:
        """UserError for a folder that holds anything, and no manifest that says what it is of."""
        out, manifest = self.folder.parent, self.folder / MANIFEST
        if out.is_dir() and not manifest.is_file() and any(path.name != NAME for path in out.iterdir()):
            raise UserError(
                f"--save_directory: {out} is not empty, and holds no unfinished quantization; name an empty "
                "folder, or one that is not there yet"
            )

    def _take_up(self) -> None:
        self._check_place()  # again: while the lock was not taken another run may have ended
        manifest = self.folder / MANIFEST
        if not manifest.is_file():  # what lies here was stopped before it was written, or after it was removed
            self._clear()
            self._save()
            return
        try:
            held = json.loads(manifest.read_text())
            before = held["identity"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--save_directory: {manifest} was changed or cut; empty {self.folder.parent}") from None
        if why := differences(before, self.identity):
            raise UserError(
                f"--save_directory: {self.folder.parent} holds an unfinished quantization with {why}; repeat the "
                "former, or empty the folder"
            )
        self.done, self.num_samples = held["done"], held["num_samples"]
        self.shards, self.is_written = held["shards"], held["is_written"]

    def _save(self) -> None:
        progress = {"done": self.done, "num_samples": self.num_samples}
        progress |= {"shards": self.shards, "is_written": self.is_written}
        put_json(self.folder / MANIFEST, {"identity": self.identity, **progress})

    # ---- samples and their states

    def keep_sample(self, number: int, sample: Sample, state: dict[str, Tensor]) -> None:
        self._keep(self.folder / "samples" / f"{number:05d}.safetensors", sample.tensors())
        self.keep_state(0, number, state)

    def samples_are_kept(self, count: int) -> None:
        self.num_samples = count
        self._save()

    def samples(self) -> Iterator[tuple[int, Sample]]:
        for number in range(self.num_samples or 0):
            yield number, sample_of(load_file(self.folder / "samples" / f"{number:05d}.safetensors"))

    def state(self, stage: int, number: int) -> dict[str, Tensor]:
        return load_file(self._state_file(stage, number))

    def keep_state(self, stage: int, number: int, state: dict[str, Tensor]) -> None:
        self._keep(self._state_file(stage, number), state)

    def _state_file(self, stage: int, number: int) -> Path:
        return self.folder / "states" / f"{stage:04d}" / f"{number:05d}.safetensors"

    def _keep(self, path: Path, tensors: dict[str, Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        except SafetensorError as error:  # its word for a disk that is full
            raise OSError(errno.EIO, f"cannot be written: {error}", str(path)) from error

    # ---- what is written

    def finish_stage(self, stage: int, entries: list[Entry], kinds: dict[str, str]) -> None:
        """The stage's tensors and their types; from here on it is done, and what led to it is dropped."""
        (self.folder / "stages").mkdir(exist_ok=True)
        put_json(self.folder / "stages" / f"{stage:04d}.json", kinds)
        put_tensors(self.stage_file(stage), entries)
        self.done = stage + 1
        self._save()
        shutil.rmtree(self.folder / "states" / f"{stage:04d}", ignore_errors=True)

    def stage_file(self, stage: int) -> Path:
        return self.folder / "stages" / f"{stage:04d}.safetensors"

    def stage_kinds(self, stage: int) -> dict[str, str]:
        return json.loads((self.folder / "stages" / f"{stage:04d}.json").read_text())

    def stage_tensors(self, stage: int) -> list[TensorInfo]:
        return read_header(self.stage_file(stage))

    def has_shard(self, path: Path) -> bool:
        """Whether this quantization has finished the file, and nobody has changed it."""
        return path.is_file() and self.shards.get(path.name) == _stamp(path)

    def keep_shard(self, path: Path) -> None:
        self.shards[path.name] = _stamp(path)
        self._save()

    def finish(self) -> None:
        """The result is whole: nothing of the work is needed any more. The manifest goes last."""
        if not self.is_written:
            self.is_written = True
            self._save()
        self._clear(but=(MANIFEST,))
        self._clear()
        (self.folder / LOCK).unlink()
        self.folder.rmdir()

    def _clear(self, but: tuple[str, ...] = ()) -> None:
        for path in self.folder.iterdir():
            if path.name in (LOCK, *but):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]
