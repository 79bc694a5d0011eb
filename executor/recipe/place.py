"""Where a recipe's file lies, and the form of an override: what is said of both before anything is installed.

Standard library only, and importable on Python 3.8.
"""

from __future__ import annotations

from pathlib import Path

from executor.errors import UserError, nearest
from executor.host.env import REPO_ROOT, find_path


def find_recipe(path: str | Path) -> Path:
    """The file that `path` means, from here or from the repository. UserError where there is none."""
    found = find_path(path)
    if found.is_dir():
        raise UserError(f"{path} is a folder; a recipe is a YAML file, e.g. config/quickstart.yaml")
    if not found.exists():
        raise _missing(path, found)
    return found


def split_override(text: str) -> tuple[str, str]:
    """`section.key=value` as ("section.key", "value"). UserError for another form, and where there is no value."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--set {text}: the form is section.key=value, e.g. --set generation_config.max_new_tokens=64")
    if not value.strip(" \t"):
        raise UserError(
            f"--set {text}: there is no value (an unset variable of the shell?); write null for none, \"''\" for an "
            "empty text"
        )
    return name.strip(), value


def _missing(path: str | Path, found: Path) -> UserError:
    """Nearest is the recipe of this name without its folder or ending; then one of a name like it."""
    folder = found.parent if found.parent.is_dir() and found.parent != Path() else REPO_ROOT / "config"
    known = folder.relative_to(REPO_ROOT) if REPO_ROOT in folder.parents else folder
    names = sorted(p.name for p in folder.glob("*.y*ml"))
    same = next((name for name in names if found.name in (name, Path(name).stem)), None)
    if same:
        return UserError(f"there is no recipe {path} (did you mean '{known / same}'?)")
    close = nearest(found.name, names)
    more = f": {', '.join(names)}" if names and not close else ""
    if not names:
        return UserError(f"there is no recipe {path}; config/ has the ones that come with this")
    return UserError(f"there is no recipe {path}{close or f'; {known} has {len(names)}'}", more=more)
