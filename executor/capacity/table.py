"""All published models on all chips in all precisions: the fewest ranks, and what these give.

README's two tables are made here as well (`readme_tables`), and a test holds them equal. A row's bytes are those of
executor/recipe/memory.py. Knows no folder of weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from executor.capacity.chips import DEFAULT_CHIPS, Chip, chip_names, read_chip
from executor.capacity.fits import Deployment, deployment_on, fewest_ranks, holds_one, most_sequences
from executor.recipe.memory import GIB, weights_bytes
from executor.recipe.on_paper import OnPaper, settle_on_paper
from executor.recipe.schema import Recipe, build_recipe
from models.published import published_shapes

DUO = "atlas_300i_duo"
CONTEXTS = {DUO: 10240}
USUAL_CONTEXT = 32768
WORLDS = (1, 2, 4, 8, 16)
LEFT_OUT = ("Qwen3-VL-235B-A22B-Instruct",)  # sizes that are known and have no recipe
PRECISIONS = ("none", "w8a8", "w8a8_dynamic", "w8a8sc")
"""Of the weights, best first: float ones, then eight bits."""


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
        return self.quantization if self.quantization != "none" else float_type(self.chip)


def published_models() -> tuple[str, ...]:
    return tuple(name for name in published_shapes() if name not in LEFT_OUT)


def float_type(chip: Chip) -> str:
    """The 16-bit type that a chip's recipes use."""
    return "bfloat16" if "bfloat16" in chip.flops_per_s else "float16"


def precisions(chip: Chip, has_experts: bool) -> tuple[str, ...]:
    """Schemes of weights that a chip takes, of PRECISIONS: compressed ones only 300I DUO, and never of experts."""
    found = [word for word in PRECISIONS[:3] if word == "none" or "int8" in chip.flops_per_s]
    return (*found, *(("w8a8sc",) if chip.soc == DUO and not has_experts else ()))


def weights_path(model: str, quantization: str) -> str:
    """Where the recipes of config/ have the weights of a published model."""
    return f"Qwen/{model}" if quantization == "none" else f"weights/{model}-{quantization}"


def paper_of(model: str, chip: Chip, quantization: str, context_tokens: int) -> OnPaper:
    """A published model on one rank of a chip, as the recipes of config/ have it."""
    is_duo = chip.soc == DUO
    sections = {
        "model_config": {
            "model_path": weights_path(model, quantization),
            "device": "npu",
            "soc": chip.soc,
            "dtype": "auto",
            "exe_mode": "eager" if is_duo else "ge_graph",
            "quantization": quantization,
        },
        "parallel_config": {"vision_parallel": "data"},
        "scheduler_config": {"max_model_len": context_tokens},
    }
    return settle_on_paper(build_recipe(sections), "plan")


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
            for quantization in precisions(chip, "num_experts" in published_shapes()[model]["text"]):
                yield table_row(model, name, chip, quantization)


def with_workload(deployment: Deployment, recipe: Recipe) -> Deployment:
    """The same deployment, asked about what `recipe`'s plan_config says."""
    paper = deployment.paper
    asked = paper.recipe.model_copy(update={"plan": recipe.plan})
    return Deployment(OnPaper(asked, paper.shapes, paper.config, paper.pixels, paper.stored), deployment.free_bytes)


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
