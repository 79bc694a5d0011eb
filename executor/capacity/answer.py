"""A recipe's plan: what fits on its chip, and what speed is predicted there. One recipe, one workload, one answer.

Joins the memory (executor/capacity/fits.py) and the prediction (executor/capacity/predict.py); adds no arithmetic.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from executor.capacity.chips import Chip, chip_names, chip_of_soc, read_chip
from executor.capacity.fits import Deployment, Fit, deployment_on, fit
from executor.capacity.predict import DecodeStep, Prediction, predict
from executor.capacity.products import TypeOf
from executor.capacity.workload import Workload
from executor.checkpoint.description import Description
from executor.device.table import named
from executor.errors import UserError
from executor.recipe.on_paper import settle_on_paper
from executor.recipe.schema import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """`chip`: what a rank computes on, None: this machine's CPU, of which no figures are known and nothing is
    predicted. `prediction`: None there, and for requests longer than the model was made for. `decode_step`: where the
    recipe's own graph was converted, and says what a decode step costs."""

    chip: Chip | None
    fit: Fit
    prediction: Prediction | None
    decode_step: DecodeStep | None = None

    @property
    def deployment(self) -> Deployment:
        return self.fit.deployment

    @property
    def counts_from(self) -> Literal["ge_graph", "table"] | None:
        """What counted the decode step that is predicted."""
        if self.prediction is None:
            return None
        return "ge_graph" if self.decode_step else "table"


def settled(recipe: Recipe) -> tuple[Deployment, Chip | None]:
    """The recipe on the chip of plan_config.chip, else of its own soc, else on this machine's CPU.

    Raises UserError for what contradicts itself, the chip or the model.
    """
    chip = _chip_of(recipe)
    if chip is None:
        paper = settle_on_paper(recipe.replace(model={"device": "cpu"}), "plan")
        return deployment_on(paper), None
    if recipe.model.soc not in (None, chip.soc):
        logger.info("plan_config.chip: %s is of %s, in place of %s", chip.name, chip.soc, recipe.model.soc)
    recipe = recipe.replace(model={"device": "npu", "soc": chip.soc})
    return deployment_on(settle_on_paper(recipe, "plan"), chip.usable_bytes), chip


def _chip_of(recipe: Recipe) -> Chip | None:
    model = recipe.model
    if model.device not in ("auto", "cpu", *named(npu=True)):
        raise UserError(
            f"model_config.device: plan knows no {model.device}; name a chip (--chip 910b4), or set device: cpu"
        )
    if model.device == "cpu" and recipe.plan.chip is None:
        return None
    if recipe.plan.chip is not None:
        chip = read_chip(recipe.plan.chip)
        if chip.soc is None:
            raise UserError(f"plan_config.chip: {chip.name} has no soc, so it is no NPU; set device: cpu instead")
        return chip
    if model.soc is not None:
        return chip_of_soc(model.soc)
    if model.device in named(npu=True):
        raise UserError(
            "model_config.soc: plan asks no driver which chip it is; name it by --chip: one of "
            f"{', '.join(chip_names())}"
        )
    return None


def answer(
    deployment: Deployment, chip: Chip | None, workload: Workload, decode_step: DecodeStep | None = None
) -> Answer:
    """What the deployment says to the workload; no speed of requests that the model cannot take."""
    found = fit(deployment, workload)
    if chip is None or workload.request_tokens > deployment.paper.shapes.max_position_embeddings:
        return Answer(chip, found, None)
    types = described_types(deployment.paper.description)
    shapes = deployment.paper.shapes
    predicted = predict(deployment.recipe, shapes, chip, workload, types=types, decode_step=decode_step)
    return Answer(chip, found, predicted, decode_step)


def described_types(description: Description | None) -> TypeOf | None:
    """The types that a quantized folder gives its linears; None for float weights and for folders that are not here."""
    if description is None:
        return None

    def type_of(name: str) -> str:
        names = (f"{name}.weight", f"{name}.gate_up_proj", f"{name}.0.gate_proj.weight")  # the last two: of experts
        return description.type_of(next((each for each in names if each in description.types), names[0]))

    return type_of
