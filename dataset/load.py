"""From a recipe's data_config to the requests it asks."""

import logging

from dataset import (
    chartqa,
    default_prompt,
    docvqa,
    jsonl,
    mmmu,
    ocrbench,
    random,
    refcoco,
    textvqa,
    tiny_world,
    video_mc,
    vision_arena,
)
from dataset.entries import ask
from dataset.sample import Dataset
from executor.errors import UserError
from executor.host.env import REPO_ROOT
from executor.recipe.schema import DataSection, Recipe

logger = logging.getLogger(__name__)

DATASETS = {
    "default": default_prompt.load,
    "vision-arena-bench-v0.1": vision_arena.load,
    "jsonl": jsonl.load,
    "tiny_world": tiny_world.load,
    "textvqa": textvqa.load,
    "docvqa": docvqa.load,
    "chartqa": chartqa.load,
    "mmmu": mmmu.load,
    "ocrbench": ocrbench.load,
    "refcoco": refcoco.load,
    "video_mc": video_mc.load,
}


def load_dataset(data: DataSection, recipe: Recipe | None = None) -> Dataset:
    """The requests of `data`: its own prompt and media, or its data set; at most `limit` of them.

    `recipe`: whose `data` it is. Only the data set random needs it: its prompts are counted in the checkpoint's tokens.
    Raises UserError when the data set is not there or holds nothing. Single bad rows are samples with an error.
    """
    if data.prompt is None and not data.media:
        if data.dataset == "random":
            if recipe is None:
                raise UserError("data_config.dataset: random is drawn for a recipe, whose tokenizer counts its tokens")
            return random.load(recipe)
        return _limited(DATASETS[data.dataset](data), data)
    return _limited(Dataset(REPO_ROOT, ask(data.prompt, data.media)), data)


def _limited(dataset: Dataset, data: DataSection) -> Dataset:
    """Its first `limit` samples, or all that there are, which is said."""
    if data.limit is not None and data.limit > len(dataset):
        logger.warning("data_config.limit is %d, but the data set has only %d", data.limit, len(dataset))
    return dataset.first(data.limit)
