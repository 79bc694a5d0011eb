"""What an unfinished quantization keeps in its folder, so that it goes on where it was stopped: with the same bytes.

    OUT/.quantize/manifest.json   whose settings these are, and how many stages are done
    OUT/.quantize/samples/        token ids and places of each prompt
    OUT/.quantize/states/N/       what each sample brings to stage N: two sets lie there at most
    OUT/.quantize/stages/N        the tensors of stage N, and their types beside them

A stage counts as done when the manifest says so; what lies there beyond it is made again.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from executor.calibrate.files import put_json, put_tensors
from executor.calibrate.sample import Sample, sample_of
from executor.checkpoint.headers import TensorInfo, read_header
from executor.checkpoint.writing import Entry
from executor.errors import UserError

NAME = ".quantize"


class Work:
    """The unfinished work in `folder`, of a quantization with this digest."""

    def __init__(self, folder: Path, digest: str, settings: dict[str, Any]) -> None:
        self.folder = folder / NAME
        self.digest, self.settings = digest, json.loads(json.dumps(settings))  # as the manifest gives them back
        self.done = 0  # stages
        self.num_samples: int | None = None  # None: not gathered yet

    def open(self) -> None:
        """Begin, or take up what is there. UserError for a folder that holds anything else."""
        out = self.folder.parent
        manifest = self.folder / "manifest.json"
        if not self.folder.is_dir():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(
                    f"--save_directory: {out} is not empty, and holds no unfinished quantization; name an empty "
                    "folder, or one that is not there yet"
                )
            self.folder.mkdir(parents=True)
            self._save()
            return
        if not manifest.is_file():  # stopped before it was written
            self._save()
            return
        held = json.loads(manifest.read_text())
        if held.get("digest") != self.digest:
            before = held.get("settings", {})
            changed = [key for key, value in self.settings.items() if before.get(key) != value]
            why = f"other settings ({', '.join(changed)})" if changed else "another checkpoint or calibration set"
            raise UserError(
                f"--save_directory: {out} holds an unfinished quantization with {why}; repeat those, or "
                "empty the folder"
            )
        self.done, self.num_samples = held["done"], held["num_samples"]

    def _save(self) -> None:
        content = {"digest": self.digest, "settings": self.settings}
        put_json(self.folder / "manifest.json", {**content, "done": self.done, "num_samples": self.num_samples})

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
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

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

    def remove(self) -> None:
        shutil.rmtree(self.folder)
