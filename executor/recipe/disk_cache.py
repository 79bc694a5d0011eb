"""A recipe's prefix cache on disk: what contradicts it, and whether its folder can be this user's, known before weights
are read.

Makes nothing and knows no entries: executor.engine.disk_cache does.
"""

import os
import stat
from pathlib import Path

from executor.recipe.schema import Recipe, SchedulerSection

KEY = "scheduler_config.prefix_cache_path"
ENTRIES = "prefix-"  # what the names of folders with entries begin with
MEMORY = "checkpoints.json"  # digests of checkpoints' files
TRIM_LOCK = "trim.lock"
FILES = (MEMORY, "checkpoints.lock", TRIM_LOCK)  # beside those folders


def root_of(path: str | Path) -> Path:
    """The folder that a recipe names, absolute."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:  # ~ of nobody is a name like any other
        return Path(path).absolute()


def without_disk_cache(recipe: Recipe) -> Recipe:
    """The recipe without a prefix cache on disk, nor a bound of one."""
    bound = SchedulerSection.model_fields["prefix_cache_gb"].default
    return recipe.replace(scheduler={"prefix_cache_path": None, "prefix_cache_gb": bound})


def disk_cache_findings(recipe: Recipe) -> list[str]:
    """What of a recipe contradicts a prefix cache on disk."""
    scheduler, findings = recipe.scheduler, []
    if scheduler.prefix_cache_path is None:
        return []
    key = f"{KEY}: got {scheduler.prefix_cache_path!r}"
    if not scheduler.enable_prefix_caching:
        findings.append(f"{key} beside enable_prefix_caching: false; set that to true, or the path to null")
    if recipe.attn_tp_size > 1:
        findings.append(
            f"{key} with an attn_tp_size of {recipe.attn_tp_size}: the ranks of a replica do not agree yet on what "
            "each has on its disk; set parallel_config.attn_tp_size: 1, or the path to null"
        )
    if recipe.model.soc == "atlas_300i_duo":
        findings.append(
            f"{key} on atlas_300i_duo, whose KV cache lies in a storage format that is not cut into blocks here; set "
            "it to null"
        )
    return findings


def root_findings(path: str | None) -> list[str]:
    """Why this user cannot keep a cache below the folder that a recipe names, on this machine."""
    if path is None:
        return []
    root = root_of(path)
    try:
        there = next(each for each in (root, *root.parents) if os.path.lexists(each))
        if not there.is_dir():
            return [unusable(root, f"{there} is no folder")]
        if not os.access(there, os.W_OK | os.X_OK | (os.R_OK if there == root else 0)):
            return [unusable(root, f"this user may not write to {there}")]
        for file in (root / name for name in FILES):
            if os.path.lexists(file) and (fault := _file_fault(os.lstat(file))):
                return [unusable(root, f"{file.name} in it {fault}")]
        for folder in sorted(root.glob(f"{ENTRIES}*")) if there == root else ():
            found = os.lstat(folder)
            if stat.S_ISDIR(found.st_mode) and found.st_uid != os.geteuid():
                return [unusable(root, f"{folder.name} in it is a folder of another user")]
    except OSError as error:
        return [unusable(root, str(error.strerror or error))]
    return []


def _file_fault(found: os.stat_result) -> str | None:
    """Why a file of the cache's own is not opened."""
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    return None if found.st_uid == os.geteuid() else "is a file of another user"


def unusable(root: Path, reason: str) -> str:
    """What is said of a folder that a cache cannot be kept in."""
    return (
        f"{KEY}: {root} cannot be written to ({reason}); name a folder of a local disk that this user may write to, or "
        "null to keep nothing"
    )
