"""Where a recipe's file lies. Standard library only: it is looked for before anything is installed."""

from __future__ import annotations

from pathlib import Path

from executor.errors import UserError, nearest
from executor.host.env import find_path


def find_recipe(path: str | Path) -> Path:
    """The file that `path` means, from here or from the repository. UserError where there is none."""
    found = find_path(path)
    if found.is_dir():
        raise UserError(f"{path} is a folder; a recipe is a YAML file, e.g. config/quickstart.yaml")
    if not found.exists():
        raise UserError(f"there is no recipe {path}{_neighbours(found)}")
    return found


def _neighbours(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    close = nearest(path.name, names)
    return close or (
        f"; {path.parent} has {', '.join(names)}" if names else "; config/ has the ones that come with this"
    )
