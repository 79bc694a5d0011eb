"""From a recipe's data_config to the requests it asks."""

from dataset import default_prompt, jsonl, vision_arena
from dataset.entries import ask
from dataset.sample import Dataset
from executor.host.env import REPO_ROOT
from executor.recipe.schema import DataSection

DATASETS = {
    "default": default_prompt.load,
    "vision-arena-bench-v0.1": vision_arena.load,
    "jsonl": jsonl.load,
}


def load_dataset(data: DataSection) -> Dataset:
    """The requests of `data`: its own prompt and media, or its data set; at most `limit` of them.

    Raises UserError when the data set is not there or holds nothing. Single bad rows are samples with an error.
    """
    if data.prompt is None and not data.media:
        return DATASETS[data.dataset](data).first(data.limit)
    return Dataset(REPO_ROOT, ask(data.prompt, data.media)).first(data.limit)
