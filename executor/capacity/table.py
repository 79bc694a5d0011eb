"""All published models on all chips in all precisions: the fewest ranks, and what these give.

README's two tables are made here as well (`readme_tables`), and a test holds them equal. A row's bytes are those of
executor/recipe/memory.py. Knows no folder of weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from executor.capacity.chips import DEFAULT_CHIPS, Chip, chip_names, read_chip
from executor.capacity.choices import DUO, float_type, precision_word, precisions, published_models, recipe_on
from executor.capacity.fits import Deployment, deployment_on, fewest_ranks, holds_one, most_sequences
from executor.recipe.memory import GIB, weights_bytes
from executor.recipe.on_paper import OnPaper, settle_on_paper
from executor.recipe.schema import build_recipe

CONTEXTS = {DUO: 10240}
USUAL_CONTEXT = 32768
WORLDS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class TableRow:
    """One model on one chip in one precision, on the fewest ranks that hold a request of `context_tokens`.

    `deployment`: on these ranks; None, and no numbers, where no number of ranks of a node holds it.
    """

    model: str
    chip_name: str
    chip: Chip
    quantization: str
    context_tokens: int
    deployment: Deployment | None
    max_num_seqs: int

    @property
    def ranks(self) -> int | None:
        return self.deployment.recipe.parallel.world_size if self.deployment else None

    @property
    def weights_bytes(self) -> int | None:
        """Of one rank."""
        return self.deployment.account().weights_bytes if self.deployment else None

    @property
    def precision(self) -> str:
        """The weights in a word: their 16-bit type, or the scheme."""
        return precision_word(self.chip, self.quantization)


def paper_of(model: str, chip: Chip, quantization: str, context_tokens: int) -> OnPaper:
    """A published model on one rank of a chip, as the recipes of config/ have it."""
    base = build_recipe({"model_config": {"model_path": f"Qwen/{model}"}})
    return settle_on_paper(recipe_on(base, chip, quantization, max_model_len=context_tokens), "plan")


def table_row(model: str, chip_name: str, chip: Chip, quantization: str) -> TableRow:
    """The row of a model on a chip; `quantization` is one that the chip takes."""
    context = CONTEXTS.get(chip.soc, USUAL_CONTEXT)
    alone = deployment_on(paper_of(model, chip, quantization, context), chip.usable_bytes)
    worlds = [world for world in WORLDS if world <= chip.dies_per_node]
    ranks = fewest_ranks(alone, holds_one, worlds)
    spread = alone.on_ranks(ranks) if ranks else None
    most = most_sequences(spread, context) if spread else 0
    return TableRow(model, chip_name, chip, quantization, context, spread, most)


def table_rows(names: Sequence[str] | None = None) -> Iterator[TableRow]:
    """Of all chips of config/device/ that are NPUs, or of those named."""
    for name in names or chip_names():
        chip = read_chip(name)
        if chip.soc is None:
            continue
        for model in published_models():
            for quantization in precisions(chip, f"Qwen/{model}"):
                yield table_row(model, name, chip, quantization)


def readme_tables() -> tuple[str, str]:
    """README's tables as Markdown: the fewest ranks by chip and precision, and GiB of weights per rank by ranks."""
    a2, duo = (read_chip(DEFAULT_CHIPS[soc]) for soc in ("atlas_800i_a2", DUO))
    names = {"atlas_800i_a2": "A2, A3", DUO: "300I DUO"}
    columns = [(chip, quantization) for chip in (a2, duo) for quantization in ("none", "w8a8")]
    heads = [
        f"{names[chip.soc]}: {float_type(chip) if quantization == 'none' else '8-bit weights'}"
        for chip, quantization in columns
    ]
    ranks = [f"| fewest ranks | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    sizes = ["| GiB per rank, 16-bit weights | 1 rank | 2 | 4 | 8 |", "|---|---|---|---|---|"]
    for model in published_models():
        cells = [str(table_row(model, "", chip, quantization).ranks or "-") for chip, quantization in columns]
        ranks.append(f"| {model.removesuffix('-Instruct')} | {' | '.join(cells)} |")
        alone = deployment_on(paper_of(model, a2, "none", USUAL_CONTEXT), a2.usable_bytes)
        spread = [alone.on_ranks(world) for world in (1, 2, 4, 8)]
        gib = [f"{weights_bytes(each.recipe, each.paper.shapes) / GIB:.1f}" if each else "-" for each in spread]
        sizes.append(f"| {model} | {' | '.join(gib)} |")
    return "\n".join(ranks), "\n".join(sizes)
