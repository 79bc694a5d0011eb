"""`dataset: vision-arena-bench-v0.1`: a folder with dataset.jsonl (or one JSON file of the same rows) and its pictures.

The usual place is dataset/vision_arena_bench. A row has its question under messages, conversations, question, prompt,
text or turns[0][0].content, and its pictures under images or image: paths from the folder, or bytes.
"""

from pathlib import Path

from dataset.files import open_rows
from dataset.sample import Dataset
from executor.errors import UserError
from executor.host.env import REPO_ROOT, find_path
from executor.recipe.schema import DataSection

FOLDER = REPO_ROOT / "dataset" / "vision_arena_bench"
FILES = ("dataset.jsonl", "dataset.json")


def load(data: DataSection) -> Dataset:
    """The rows of the folder (or file) dataset_path, or of the usual place."""
    path = find_path(data.dataset_path) if data.dataset_path else FOLDER
    return open_rows(path if path.is_file() else _rows_file(path))


def _rows_file(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted([*folder.glob("*.jsonl"), *folder.glob("*.json")]) if folder.is_dir() else []
    if len(others) == 1:
        return others[0]
    found = f"it has {', '.join(path.name for path in others)}" if others else "it has neither"
    state = found if folder.is_dir() else "there is no such folder"
    raise UserError(
        f"vision-arena-bench-v0.1 needs {folder} with {' or '.join(FILES)} and its pictures: {state}. "
        "Put the data set there, or name its folder: --set data_config.dataset_path=FOLDER"
    )
