"""The process's surroundings: the repository's place and environment variables.

The only module (with the launcher) that reads `os.environ`. Knows nothing of recipes and models. Standard library
only, and importable on Python 3.8, because the doctor starts from here on machines where nothing else works yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[2]


def find_path(path: str | Path) -> Path:
    """`path` as the user meant it: below the working directory if it is there, else below the repository root.

    A path found in neither comes back as it was given, so that the caller's error shows what the user wrote.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError:  # ~ of nobody is a name like any other
        given = Path(path)
    if given.is_absolute() or given.exists():
        return given
    in_repository = REPO_ROOT / given
    return in_repository if in_repository.exists() else given


def environment() -> dict[str, str]:
    """A copy of all environment variables, for the doctor, which reports what is set and changes nothing."""
    return dict(os.environ)


@dataclass(frozen=True)
class RankPlace:
    """Where this process stands among the processes of its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def rank_place() -> RankPlace:
    """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; a world of one where no launcher has set them."""
    if "RANK" not in os.environ:
        return RankPlace()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return RankPlace(*(int(os.environ[name]) for name in names))


def set_where_unset(values: Mapping[str, str]) -> dict[str, str]:
    """Set environment variables of this process and its children; the user's own stay. Returns what was set."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    return missing


def set_always(values: Mapping[str, str]) -> None:
    """Set what the launcher itself hands to its ranks, whatever was there."""
    os.environ.update(values)


def code_digest() -> str:
    """Digest of every Python file that runs a model: two machines, or two runs, with the same one run the same code.

    The emulator and what trains the tiny checkpoints stand outside.
    """
    digest = hashlib.sha256()
    for folder in ("executor", "models", "dataset"):
        for path in sorted((REPO_ROOT / folder).rglob("*.py")):
            name = path.relative_to(REPO_ROOT).as_posix()
            if not name.startswith("models/tiny/"):
                digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Import torch in here, and its C++ part writes no warnings with stack frames, unless the user has set their level.

    For a launcher, which says itself what it finds wrong with the job's store; what it starts gets the variable not.
    """
    name = "TORCH_CPP_LOG_LEVEL"  # read once, when torch is imported
    if name in os.environ:
        yield
        return
    os.environ[name] = "FATAL"
    try:
        yield
    finally:
        del os.environ[name]


def calm_threads() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the user says otherwise. Must precede the import of torch.

    On a machine that does anything else a small step waits for a spinning thread's core: 4 ms a token became 100.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def hub_offline() -> bool:
    """Whether the user has forbidden downloads with HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE)."""
    return any(
        os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
