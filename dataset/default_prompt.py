"""`dataset: default`: dataset/default_prompt.json, or another file of the same form.

A list of entries: a text, {"text": ...}, or {"prompt": ..., "media": [...]} with files named from the JSON's folder.
"""

from pathlib import Path

from dataset.files import open_rows
from dataset.sample import Dataset
from executor.errors import UserError
from executor.host.env import REPO_ROOT, find_path
from executor.recipe.schema import DataSection

PATH = REPO_ROOT / "dataset" / "default_prompt.json"


def load(data: DataSection) -> Dataset:
    """The prompts of its dataset_path, or of the file that comes with this project."""
    path = find_path(data.dataset_path) if data.dataset_path else PATH
    if not Path(path).is_file():
        raise UserError(f"data_config.dataset_path: there is no file {path}")
    return open_rows(path, strict=True)
