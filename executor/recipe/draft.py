"""The draft model of a recipe (speculative_config), and whether it can draft for the recipe's own model.

It is settled as a deployment by itself, on one rank of the same device: the replica's leader runs it alone.
Knows sizes and settings, no tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.checkpoint.description import Description
from executor.checkpoint.files import find_weights
from executor.checkpoint.parts import part_folders
from executor.checkpoint.stored import StoredSizes
from executor.checkpoint.vocabulary import difference, read_vocabulary
from executor.errors import UserError
from executor.quant.sizes import MADE_AT_LOAD
from executor.recipe.schema import Recipe, SpeculativeSection
from executor.recipe.sizes import ModelShapes
from models.published import published_config, published_shapes
from models.registry import read_shapes

KEY = "speculative_config.model_path"
_PATCHES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}


@dataclass(frozen=True)
class Draft:
    """A draft model that can be loaded. `recipe`: of a deployment of it alone, settled."""

    recipe: Recipe
    shapes: ModelShapes
    config: Mapping[str, Any] = field(repr=False)  # config.json, with a tie_word_embeddings that the weights bear out
    folder: Path | None = None  # None: not on this machine, and planned for
    description: Description | None = field(default=None, repr=False)  # of quantized weights
    stored: StoredSizes | None = field(default=None, repr=False)  # theirs


def draft_recipe(recipe: Recipe, label: str = "none") -> Recipe:
    """The draft model's deployment: what the recipe says of types and sizes, on one rank, without drafts of its own.

    `recipe`: settled by its own model. `label`: what the draft's checkpoint calls its weights. Float ones are made
    int8 where the recipe's own are.
    """
    made = recipe.model.quantization in MADE_AT_LOAD and label == "none"
    model = {
        "model_path": recipe.speculative.model_path,
        "quantization": recipe.model.quantization if made else "auto",
        "kv_cache_dtype": "float" if recipe.model.kv_cache_dtype == "float" else "auto",
    }
    alone = {"world_size": 1, "attn_tp_size": 1, "moe_ep_size": 1}
    return recipe.replace(model=model, parallel=alone, speculative={"method": None, "model_path": None})


def section_findings(settings: SpeculativeSection) -> list[str]:
    """A draft model that is asked for and not named, or named and not asked for; bounds that leave nothing."""
    if settings.ngram_min > settings.ngram_max:
        return [
            f"speculative_config.ngram_min: got {settings.ngram_min}, but ngram_max is {settings.ngram_max}; allowed: "
            f"1 to {settings.ngram_max}, or raise ngram_max"
        ]
    if settings.method == "draft" and not settings.model_path:
        got = "null" if settings.model_path is None else "got ''"
        return [f"{KEY}: {got}, and method is draft; name the folder or hub id of a smaller model of the same family"]
    if settings.method != "draft" and settings.model_path is not None:
        method = settings.method or "null"
        return [
            f"{KEY}: got {settings.model_path}, but method is {method}, which reads none; set method: draft, or "
            "model_path: null"
        ]
    return []


def size_findings(shapes: ModelShapes, draft: ModelShapes) -> list[str]:
    """What of the draft model's architecture keeps it from reading what the recipe's own model reads."""
    if _kind(draft) != _kind(shapes):
        return [
            f"{KEY}: {draft.name} is a {_kind(draft)} model, and {shapes.name} a {_kind(shapes)} one; a draft model is "
            f"of the same family, such as {_smallest(_kind(shapes))}"
        ]
    apart = [
        f"{key} {getattr(draft.vision, name)} instead of {getattr(shapes.vision, name)}"
        for name, key in _PATCHES.items()
        if getattr(draft.vision, name) != getattr(shapes.vision, name)
    ]
    if not apart:
        return []
    return [
        f"{KEY}: the encoder of {draft.name} cuts pictures otherwise than that of {shapes.name}: {', '.join(apart)}; "
        "a draft model reads the same patches: give another one"
    ]


def folder_findings(folder: Path, draft: Path, name: str) -> list[str]:
    """What of the draft model's folder does not fit: another tokenizer, weights that were cut for several ranks.

    `name`: the draft's in messages.
    """
    findings = []
    try:
        num_parts = len(part_folders(draft))
        if num_parts > 1:
            findings.append(
                f"{KEY}: {name} was compressed for {num_parts} ranks, and a draft model runs on one; give the weights "
                "that it was compressed from, or compress them for 1"
            )
        apart = draft != folder and difference(read_vocabulary(folder), read_vocabulary(draft))
        if apart:
            findings.append(
                f"{KEY}: the tokenizer of {name} is another one: {apart}; a draft model has the same tokens: give one "
                "of the same release"
            )
    except UserError as error:
        findings.append(f"{KEY}: {error}")
    return findings


def weight_findings(draft: Path) -> list[str]:
    """What of the draft model's weights is not there, known before the recipe's own are read."""
    try:
        find_weights(next(iter(part_folders(draft)), draft))
    except UserError as error:
        return [f"{KEY}: {error}"]
    return []


def of_draft(finding: str) -> str:
    """What is said of a recipe's model, said of its draft model."""
    finding = finding.replace(" --set model_config.quantization=auto", "")
    for key in ("model_config.model_path", "model_config.quantization", "model_config.kv_cache_dtype"):
        finding = finding.replace(key, KEY)
    return finding if KEY in finding else f"{KEY}: {finding}"


def _kind(shapes: ModelShapes) -> str:
    """The family, a mixture of experts among its dense models."""
    return shapes.family.removesuffix("_moe")


def _smallest(kind: str) -> str:
    """The smallest published model of a kind."""
    found = (read_shapes(published_config(name), name) for name in published_shapes())
    return f"Qwen/{min((each for each in found if _kind(each) == kind), key=lambda each: each.parameters).name}"
