"""CANN's compressor for W8A8S weights, as the executable that msmodelslim's sources build: one tensor at a time.

The executable is called directly, not through msmodelslim's Compressor: that takes all tensors of a rank in memory,
stops without saying which of them failed, and wants msmodelslim's whole environment on the machine that compresses.
Source of the command line, the layout and the three files that it writes: msmodelslim 26.1.0,
pytorch/weight_compression (compress_utils.py, compress_graph/src/main.cpp).
Legend: k inputs and n outputs of a weight.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from executor.errors import UserError
from executor.quant.w8a8sc import INPUTS, OUTPUTS, TILE, index_bytes, weight_info

NAME = "compress_excutor"  # CANN's spelling
_BUILT = Path("pytorch/weight_compression/compress_graph/build") / NAME
_TIGHT, _K_VALUE, _N_VALUE, _LOW_SPARSITY, _NO_TILING = "1", "1", "1", "0", "0"
_PLAIN_PATH = re.compile(r"[a-zA-Z0-9_./-]+")  # others are refused by the executable
_MOST_LINES = 12


@dataclass(frozen=True)
class Packed:
    """A compressed weight as checkpoints have it."""

    values: Tensor  # int8 [c]
    index: Tensor  # int8, see w8a8sc.index_bytes
    info: Tensor  # int64 [5], see w8a8sc.weight_info

    @property
    def num_bytes(self) -> int:
        return self.values.numel() + self.index.numel()


def find_executable(named: str | None) -> Path:
    """The executable: the one that is named, else on PATH, else in an installed msmodelslim.

    Raises UserError, with how to build it, where there is none that can be run.
    """
    package = importlib.util.find_spec("msmodelslim")
    built = [Path(folder) / _BUILT for folder in (package.submodule_search_locations or ())] if package else []
    on_path = shutil.which(NAME)
    places = [Path(named).expanduser()] if named else [*([Path(on_path)] if on_path else []), *built]
    for path in places:
        if path.is_file() and os.access(path, os.X_OK):
            return path.resolve()
    looked = (
        ", ".join(map(str, places)) if named else f"PATH and {', '.join(map(str, built)) or 'msmodelslim (absent)'}"
    )
    raise UserError(
        f"{NAME}, CANN's compressor, is not here (looked at {looked}). It runs on a host with a 300I DUO and CANN, and "
        "is built there from msmodelslim's sources:\n"
        "  pip install --no-deps msmodelslim==26.1.0 && source /usr/local/Ascend/ascend-toolkit/set_env.sh\n"
        '  bash "$(pip show -f msmodelslim | sed -n "s/^Location: //p")'
        '/msmodelslim/pytorch/weight_compression/compress_graph/build.sh" "$ASCEND_HOME_PATH"\n'
        f"Another place: --executable PATH/{NAME}. The w8a8s weights also run as they are, uncompressed"
    )


def in_fractals(weight: Tensor) -> Tensor:
    """`[n, k]` int8 -> `[k / 32, n / 16, 16, 32]`, padded with zeros to whole fractals."""
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % INPUTS, 0, -n % OUTPUTS))
    return padded.unflatten(0, (-1, OUTPUTS)).unflatten(2, (-1, INPUTS)).permute(2, 0, 1, 3).contiguous()


def work_folder() -> "tempfile.TemporaryDirectory[str]":
    """A place for the executable's files, as it accepts it: owned, closed to others, no link, of plain characters."""
    root = Path(tempfile.gettempdir()).resolve()
    if not _PLAIN_PATH.fullmatch(str(root)):
        raise RuntimeError(f"{NAME} takes paths of the characters a-z A-Z 0-9 _ . / - only; set TMPDIR: it is {root}")
    return tempfile.TemporaryDirectory(prefix="compress_", dir=root)


class Running:
    """Executables at work, started by several threads; whoever stops ends them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, command: list[str]) -> "subprocess.CompletedProcess[str]":
        """The command, done. Raises RuntimeError behind `stop`, OSError where it cannot be started."""
        with self._lock:
            if self._stopped:
                raise RuntimeError(f"{NAME} was stopped")
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                umask=0o077,
                start_new_session=True,
            )
            self._children.add(child)
        try:
            out, err = child.communicate()
        finally:
            with self._lock:
                self._children.discard(child)
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    def stop(self) -> None:
        """End what runs; nothing is started after it."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # with what it has started; its files go with their folder


def compress(executable: Path, weight: Tensor, name: str, folder: Path, running: Running | None = None) -> Packed:
    """`weight [n, k]` int8, compressed. `folder`: an empty one of its own for the executable's files.

    running: where another thread may have to end it.

    Raises RuntimeError, with what the executable has said, where it fails. It ends with 0 after most of its failures:
    only its files tell.
    """
    n, k = weight.shape
    laid_out = in_fractals(weight)
    given, *made = (folder / f"{each}.bin" for each in ("weight", "values", "index", "info"))
    laid_out.numpy().tofile(given)
    dims = [str(size) for size in laid_out.shape[:2]]
    command = [
        str(executable),
        *dims,
        _TIGHT,
        _K_VALUE,
        _N_VALUE,
        _LOW_SPARSITY,
        _NO_TILING,
        str(given),
        *map(str, made),
    ]
    try:
        done = (running or Running()).run(command)
    except OSError as error:
        raise RuntimeError(f"{executable} cannot be started: {error.strerror or error}") from error
    given.unlink()
    if done.returncode or not all(path.is_file() and path.stat().st_size for path in made):
        raise RuntimeError(f"{NAME} failed for {name} [{n}, {k}] (exit status {done.returncode}){_said(done)}")
    values, index = (torch.from_numpy(np.fromfile(path, dtype=np.int8)) for path in made[:2])
    # Fractals of a tile along n and along k, and the bytes of the compressed weight.
    tile_n, tile_k, size, *_ = (*np.fromfile(made[2], dtype=np.uint32).tolist(), 0, 0, 0)
    if (tile_n, tile_k) != (TILE, TILE) or size != len(values) or len(index) != index_bytes(k, n):
        raise RuntimeError(
            f"{NAME} gave for {name} [{n}, {k}] {len(values)} bytes, {len(index)} of index and info "
            f"{tile_n, tile_k, size}; the index must have {index_bytes(k, n)}, and info be {TILE, TILE, len(values)}. "
            f"Is it built of msmodelslim 26.1.0?{_said(done)}"
        )
    for path in made:
        path.unlink()
    return Packed(values, index, torch.tensor(weight_info(k, n, (tile_k, tile_n))))


def _said(done: "subprocess.CompletedProcess[str]") -> str:
    """The end of both outputs; the executable reports its errors on stdout."""
    lines = [line.strip() for text in (done.stdout, done.stderr) for line in text.splitlines() if line.strip()]
    return "\n  " + "\n  ".join(lines[-_MOST_LINES:]) if lines else "; it said nothing"
