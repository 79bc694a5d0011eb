"""A recipe settled for what needs no weights: checking, planning.

The checkpoint is read where it is on this machine; where it is not, a published model of that name gives the sizes.
Nothing is downloaded, no weight is read, and no device need be there.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.checkpoint.description import Description, read_description
from executor.checkpoint.folder import local_checkpoint
from executor.checkpoint.settings import read_max_pixels, read_min_pixels
from executor.checkpoint.stored import StoredSizes, read_sizes
from executor.errors import UserError, nearest
from executor.recipe.draft import (
    KEY,
    Draft,
    draft_recipe,
    folder_findings,
    of_draft,
    section_findings,
    size_findings,
)
from executor.recipe.kv_cache import has_cache_scales
from executor.recipe.schema import Recipe
from executor.recipe.schemes import word_findings
from executor.recipe.settle import check_chip, check_recipe, chip_findings, read_folder, refuse, resolve
from executor.recipe.sizes import ModelShapes
from executor.recipe.unused import warn_of_unused
from models.published import published_config, published_name, published_pixels, published_shapes
from models.registry import read_shapes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnPaper:
    """A recipe with every `auto` and null settled that a checkpoint settles, and what is known of that.

    `pixels`: least and most of a picture after the resize, by the recipe, the checkpoint or the published model.
    """

    recipe: Recipe
    shapes: ModelShapes
    config: Mapping[str, Any] = field(repr=False)
    pixels: tuple[int, int]
    stored: StoredSizes | None = field(default=None, repr=False)  # of quantized weights that are here
    description: Description | None = field(default=None, repr=False)  # theirs
    draft: Draft | None = None

    @property
    def largest_picture_tokens(self) -> int:
        return max(1, self.pixels[1] // self.token_side**2)

    @property
    def token_side(self) -> int:
        """Pixels of a visual token's side."""
        return self.shapes.vision.patch_size * self.shapes.vision.merge_size


def settle_on_paper(recipe: Recipe, command: str) -> OnPaper:
    """Settle and check everything but memory. `recipe.model.device` is named (not auto); `command` is for messages.

    Raises UserError for what contradicts itself, its chip or its model, and for a model that is not known here.
    """
    check_chip(recipe)
    folder = local_checkpoint(recipe.model.model_path, recipe.model.hub)
    config, quantization, shapes = find_config(recipe, command)
    description = None if folder is None else read_description(folder)
    recipe = resolve(recipe, shapes, quantization, has_scales=has_cache_scales(description))
    refuse(word_findings(recipe.model))
    check_recipe(recipe, shapes)
    least, most = published_pixels(shapes.family)
    if folder is not None:
        least, most = read_min_pixels(folder) or least, read_max_pixels(folder) or most
    pixels = recipe.data.min_pixels or least, recipe.data.max_pixels or most
    stored = read_sizes(folder, shapes.tied_embeddings) if description else None
    warn_of_unused(recipe)
    return OnPaper(recipe, shapes, config, pixels, stored, description, _draft(recipe, folder, shapes, command))


def _draft(recipe: Recipe, folder: Path | None, shapes: ModelShapes, command: str) -> Draft | None:
    """The draft model of a settled recipe that has one. Raises UserError as settle_on_paper does."""
    refuse(section_findings(recipe.speculative))
    if recipe.speculative.method != "draft":
        return None
    alone = draft_recipe(recipe)
    path = alone.model.model_path
    try:
        draft_folder = local_checkpoint(path, recipe.model.hub)
    except UserError as error:
        raise UserError(of_draft(str(error))) from error
    if draft_folder is None and path.rpartition("/")[2] not in published_shapes():
        raise UserError(f"{KEY}: {path} is not on this machine, and is none of {', '.join(published_shapes())}")
    try:
        config, quantization, draft_shapes = find_config(alone.replace(model={"quantization": "none"}), command)
        description = None if draft_folder is None else read_description(draft_folder)
        alone = draft_recipe(recipe, quantization)
        alone = resolve(alone, draft_shapes, quantization, has_scales=has_cache_scales(description))
        refuse([*word_findings(alone.model), *chip_findings(alone)])
    except UserError as error:
        raise UserError(of_draft(str(error))) from error
    findings = size_findings(shapes, draft_shapes)
    if folder is not None and draft_folder is not None:
        findings = findings or folder_findings(folder, draft_folder, draft_shapes.name)
    refuse(findings)
    stored = read_sizes(draft_folder, draft_shapes.tied_embeddings) if description else None
    return Draft(alone, draft_shapes, config, draft_folder, description, stored)


def find_config(recipe: Recipe, command: str) -> tuple[Mapping[str, Any], str, ModelShapes]:
    """config.json, quantization and sizes of the checkpoint if it is here, else of the published model of that name."""
    path = recipe.model.model_path
    folder = local_checkpoint(path, recipe.model.hub)
    if folder is not None:
        return read_folder(folder, path)
    folder_name = path.rstrip("/").rpartition("/")[2]
    name = published_name(path)
    if name is None:
        raise UserError(
            f"model_config.model_path: {path} is not on this machine, and the sizes that {command} has by itself are "
            f"those of {', '.join(published_shapes())}{nearest(folder_name, published_shapes())}"
        )
    quantization = "none" if folder_name == name else recipe.model.quantization
    if quantization == "auto":
        raise UserError(
            f"model_config.quantization: {path} is not on this machine and its name is not that of a published float "
            f"model, so {command} cannot know how its weights are quantized; name it, as in  "
            "--set model_config.quantization=w8a8 (none for float weights)"
        )
    assumed = "" if quantization == "none" else f", and the vendor's choice of what is {quantization}"
    logger.info("%s is not on this machine: its published sizes are taken%s", path, assumed)
    config = published_config(name)
    return config, quantization, read_shapes(config, name)
