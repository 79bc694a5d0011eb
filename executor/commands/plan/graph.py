"""The decode step of a plan from its own graph: converted at its true size by the emulator, as `check` does it."""

import logging
import time

from executor.capacity.answer import described_types
from executor.capacity.chips import Chip
from executor.capacity.converted import converted_cost
from executor.capacity.fits import Deployment
from executor.capacity.predict import DecodeStep
from executor.capacity.work import StepCost
from executor.commands.check import GRAPH_CHIPS, decode_graph
from executor.errors import UserError

logger = logging.getLogger(__name__)


def converted_step(deployment: Deployment, chip: Chip | None) -> DecodeStep:
    """Converts the recipe's decode step; this process emulates its chip from then on.

    One graph is enough: its nodes are the same for any number of rows. UserError where the recipe has no graph.
    """
    recipe = deployment.recipe
    if reason := _no_graph(deployment, chip):
        raise UserError(f"plan_config.from_graph: {reason} leave it out: the step is then counted by arithmetic")
    started = time.monotonic()
    paper = deployment.paper
    graph = decode_graph(recipe, paper.config)
    logger.info("the decode graph was converted in %.1f s", time.monotonic() - started)
    types = described_types(paper.description)

    def step(batch: int, context_tokens: float) -> StepCost:
        return converted_cost(graph, recipe, paper.shapes, batch, context_tokens, types)

    return step


def _no_graph(deployment: Deployment, chip: Chip | None) -> str:
    """Why the recipe's decode steps are no graph; empty: they are one."""
    if chip is None:
        return "a CPU's recipe has no graph to convert; name a chip, as in  --chip 910b4, or"
    if chip.soc not in GRAPH_CHIPS:
        return f"{chip.name} decodes eagerly and has no graph; name another chip, or"
    if deployment.recipe.model.exe_mode == "eager":
        return "model_config.exe_mode is eager, so this recipe has no graph; set ge_graph, or"
    return ""
