"""`dataset: jsonl`: a file of your own, an object a line (or a JSON list), in any form that entries.py knows.

The shortest: {"question": "What is this?", "image": "cat.png"}.
"""

from dataset.files import open_rows
from dataset.sample import Dataset
from executor.errors import UserError
from executor.host.env import find_path
from executor.recipe.schema import DataSection


def load(data: DataSection) -> Dataset:
    """The rows of its dataset_path; media are named from its folder."""
    if not data.dataset_path:
        raise UserError("data_config.dataset: jsonl needs data_config.dataset_path, the file with your questions")
    path = find_path(data.dataset_path)
    if not path.is_file():
        raise UserError(f"data_config.dataset_path: there is no file {data.dataset_path}")
    return open_rows(path)
