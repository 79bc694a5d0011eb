"""The process's surroundings: the repository's place, environment variables, host memory.

The only module (with the launcher) that reads `os.environ`. Knows nothing of recipes and models. Standard library
only, and importable on Python 3.8, because the doctor starts from here on machines where nothing else works yet.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[2]


def find_path(path: str | Path) -> Path:
    """`path` as the user meant it: below the working directory if it is there, else below the repository root.

    A path found in neither comes back as it was given, so that the caller's error shows what the user wrote.
    """
    given = Path(path).expanduser()
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


def host_memory_bytes() -> int:
    """Memory this process may still take: the machine's available memory, bounded by the container's limit."""
    available = _meminfo_available_bytes() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _cgroup_limit_bytes()
    return min(available, limit) if limit else available


def process_memory_bytes() -> int:
    """Memory that this process holds already, code of libraries included; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _meminfo_available_bytes() -> int | None:
    """MemAvailable counts page cache that can be dropped, which sysconf's AVPHYS_PAGES does not."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_limit_bytes() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None
