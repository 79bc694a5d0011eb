"""The `plan` command: whether a recipe fits its chip, the largest sizes that would, and a predicted speed.

Needs no weights and no device: sizes come from the checkpoint where it is here, else from the published model of that
name. Nothing here is measured; every printed prediction says so. A plan that does not fit is an answer: exit status 0,
`fits: false`. UserError is for what contradicts itself: a chip that cannot take the type, a model that does not divide.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from executor.capacity.answer import Answer, answer, settled
from executor.capacity.calibrate import calibrated, two_points
from executor.capacity.chips import chip_names
from executor.capacity.choices import published_models
from executor.capacity.demand import parse_demand
from executor.capacity.installation import Installation, assumed, install, measured
from executor.capacity.predict import Prediction
from executor.capacity.search import COST_ORDER, MOST_DIES, asked_again, changes, overrides, search
from executor.capacity.table import TableRow, table_rows
from executor.capacity.workload import Workload, asked_workload, picture_grid, replicas_of
from executor.commands.plan import charts, show
from executor.commands.plan.graph import converted_step
from executor.errors import UserError
from executor.recipe.schema import Recipe

logger = logging.getLogger(__name__)

Document = dict[str, Any]


def run(recipe: Recipe) -> tuple[Document, int]:
    """Answer what plan_config asks; the JSON document and the exit status."""
    plan = recipe.plan
    for key, others in {"table": ("demand", "dies", "from_graph"), "demand": ("from_graph",)}.items():
        for other in others:
            if getattr(plan, key) and getattr(plan, other):
                raise UserError(f"plan_config.{key}: it is given beside {other}; leave out one of them")
    _check_drafts(recipe)
    if plan.table:
        return _table(recipe), 0
    if plan.demand is not None:
        return _demand(recipe, plan.demand), 0
    deployment, chip = settled(recipe)
    decode_step = converted_step(deployment, chip) if plan.from_graph else None
    found = answer(deployment, chip, asked_workload(deployment.paper), decode_step)
    print(show.plan(found))
    document = _document(found)
    if recipe.plan.dies is not None:
        document["installation"] = _installation(found, recipe.plan.dies)
    if found.prediction is not None:
        print(f"\n{show.calibration(calibrated(), two_points())}")
    if recipe.plan.plot:
        document["plots"] = [str(path) for path in charts.of_plan(found)]
    return document, 0


def _check_drafts(recipe: Recipe) -> None:
    """UserError where plan_config.acceptance_probability is of nothing that is predicted."""
    plan, method = recipe.plan, recipe.speculative.method
    if plan.acceptance_probability is None:
        return
    if method is None:
        raise UserError(
            "plan_config.acceptance_probability: this recipe makes no drafts; name one of speculative_config.method, "
            "or leave it out"
        )
    if method == "draft":
        raise UserError(
            "plan_config.acceptance_probability: what the steps of a draft model take is not predicted; leave it out, "
            "or ask of ngram or lookahead"
        )
    for other in ("table", "from_graph"):
        if getattr(plan, other):
            raise UserError(f"plan_config.acceptance_probability: it is given beside {other}; leave out one of them")


@contextmanager
def _looking_through(what: str) -> Iterator[None]:
    """While many are tried, what the settling of each has to say is said once."""
    logger.info(
        "looking through %s; sizes of what is not on this machine are those of the published model, and what is "
        "quantized in it the vendor's choice",
        what,
    )
    talker = logging.getLogger("executor.recipe")
    level = talker.level
    talker.setLevel(logging.WARNING)
    try:
        yield
    finally:
        talker.setLevel(level)


def _document(found: Answer) -> Document:
    fit, recipe = found.fit, found.deployment.recipe
    predicted = found.prediction
    return {
        "command": "plan",
        "model": recipe.model.model_path,
        "device": found.chip.name if found.chip else "cpu",
        "soc": recipe.model.soc,
        "dtype": recipe.model.dtype,
        "quantization": recipe.model.quantization,
        "world_size": recipe.parallel.world_size,
        "attn_tp_size": recipe.attn_tp_size,
        "replicas": replicas_of(found.deployment.paper),
        "workload": _workload(fit.workload),
        "memory_bytes": fit.memory.by_part(),
        "memory_needed_bytes": fit.memory.total_bytes,
        "memory_allowed_bytes": fit.memory.budget_bytes,
        "fits": fit.fits,
        "faults": list(fit.faults),
        "max_num_seqs": fit.max_num_seqs,
        "max_model_len": fit.max_model_len,
        "max_users": fit.max_users,
        "predicted": _predicted(predicted) if predicted else None,
        "counts_from": found.counts_from,
        "decode_step": _step(predicted) if predicted else None,
        "calibration_error": dict(predicted.calibration_error) if predicted else None,
        "calibration_error_two_points": two_points().error if predicted else None,
        "note": show.NOT_MEASURED,
    }


def _workload(workload: Workload) -> Document:
    return {
        "users": workload.users,
        "text_tokens": workload.text_tokens,
        "pictures": workload.pictures,
        "picture_tokens": workload.picture_tokens if workload.pictures else 0,
        "output_tokens": workload.output_tokens,
        "request_tokens": workload.request_tokens,
    }


def _predicted(predicted: Prediction) -> Document:
    return {
        "ttft_ms": round(predicted.ttft_ms, 2),
        "tpot_ms": round(predicted.tpot_ms, 3),
        "tokens_per_s": round(predicted.tokens_per_s, 1),
        "ttft_all_ms": round(predicted.ttft_all_ms, 2),
        "tpot_host_ms": round(predicted.tpot_host_ms, 3),
        "tokens_per_s_per_user": round(1e3 / predicted.tpot_host_ms, 1),
        "drafts": predicted.drafts,
        "tokens_per_step": round(predicted.step_tokens, 3),
    }


def _step(predicted: Prediction) -> Document:
    """What the decode step costs one rank."""
    step = predicted.step
    names = ("collective_bytes", "flops", "int8_flops", "weight_bytes", "kv_bytes", "activation_bytes")
    return {
        "batch": predicted.batch,
        "kernels": step.kernels,
        "collectives": step.collectives,
        **{name: round(getattr(step, name)) for name in names},
    }


def _installation(found: Answer, dies: int) -> Document:
    """What `dies` give as jobs of this recipe. UserError for a CPU, for requests that the model does not take, and for
    fewer dies than one job has."""
    world = found.deployment.recipe.parallel.world_size
    if found.chip is None:
        raise UserError("plan_config.dies: a CPU has none; name a chip, as in  --chip 910b4")
    if found.prediction is None:
        raise UserError(f"plan_config.dies: no speed is predicted, as {'; '.join(found.fit.faults)}")
    if dies < world:
        raise UserError(f"plan_config.dies: {dies} hold no job of this recipe, which takes {world} ranks")
    side, workload = found.deployment.paper.token_side, found.fit.workload

    def installed(front_doors: int) -> Installation:
        return install(dies, world, found.chip, workload, found.prediction, side, front_doors=front_doors)

    one_door = installed(1)
    doors = installed(one_door.nodes)
    print(f"\n{show.installation(one_door, doors, workload)}")
    return {
        "dies": dies,
        "nodes": one_door.nodes,
        "jobs": one_door.replicas,
        "idle_dies": one_door.idle_dies,
        "tokens_per_s": round(one_door.tokens_per_s, 1),
        "bound_by": one_door.bound_by,
        "limits": {name: round(limit, 1) for name, limit in one_door.limits.items()},
        "tokens_per_s_with_a_front_door_on_each_node": round(doors.tokens_per_s, 1),
        "bound_by_with_a_front_door_on_each_node": doors.bound_by,
        "measured": measured(),
        "assumed": assumed(one_door.node),
    }


def _demand(recipe: Recipe, text: str) -> Document:
    """The cheapest recipe that holds a demand in words."""
    demand = parse_demand(text, published_models(), chip_names())
    with _looking_through("recipes"):
        result = search(recipe, demand)
    chosen = result.chosen or result.failed[-1]
    size = demand.picture_size or recipe.plan.picture_size
    changed = changes(recipe, asked_again(chosen, result.workload, size)) if result.chosen else {}
    changed.pop("plan_config.demand", None)
    print(show.found_recipe(result, text, overrides(changed), demand.most_dies or MOST_DIES))
    document = _document(chosen.answer)
    if recipe.plan.dies is not None and result.chosen is not None:
        document["installation"] = _installation(chosen.answer, recipe.plan.dies)
    print(f"\n{show.calibration(calibrated(), two_points())}")
    if result.chosen is None:
        document |= {"fits": False, "faults": list(chosen.faults)}
    document |= {
        "demand": text,
        "dies": chosen.candidate.dies,
        "chip": chosen.candidate.chip_name,
        "settings": changed,
        "overrides": overrides(changed),
        "cheaper": [show.in_short(verdict) for verdict in result.next_cheaper],
        "cost_order": COST_ORDER,
    }
    if recipe.plan.plot:
        document["plots"] = [str(path) for path in charts.of_plan(chosen.answer)]
    return document


def _table(recipe: Recipe) -> Document:
    """All models on all chips, or on the one of plan_config.chip, in all precisions."""
    names = None if recipe.plan.chip is None else (recipe.plan.chip,)
    with _looking_through("models"):
        rows = [(row, _row_prediction(row, recipe)) for row in table_rows(names)]
    plan = recipe.plan
    pictures = f" and {plan.pictures} pictures of {'x'.join(map(str, plan.picture_size))}" if plan.pictures else ""
    asked = (
        f"{plan.users or 1} requests at once, {plan.input_tokens} tokens of text{pictures}, {plan.output_tokens} out"
    )
    print(show.table(rows, asked))
    print(f"\n{show.calibration(calibrated(), two_points())}")
    document: Document = {"command": "plan", "table": [_row_document(row, found) for row, found in rows]}
    document |= {"counts_from": "table", "calibration_error": calibrated().error, "note": show.NOT_MEASURED}
    document["calibration_error_two_points"] = two_points().error
    if plan.plot:
        document["plots"] = [str(path) for path in charts.of_table(rows, recipe.model.output_path, asked)]
    return document


def _row_prediction(row: TableRow, recipe: Recipe) -> Prediction | None:
    """Of plan_config's requests, one at a time unless it names users; None where no ranks hold the model."""
    if row.deployment is None:
        return None
    plan = recipe.plan
    workload = Workload(
        plan.users or 1,
        plan.input_tokens,
        plan.pictures,
        picture_grid(row.deployment.paper, *plan.picture_size),
        plan.output_tokens,
    )
    return answer(row.deployment, row.chip, workload).prediction


def _row_document(row: TableRow, found: Prediction | None) -> Document:
    return {
        "model": row.model,
        "chip": row.chip_name,
        "quantization": row.quantization,
        "dtype": row.precision if row.quantization == "none" else None,
        "fewest_ranks": row.ranks,
        "weights_bytes_per_rank": row.weights_bytes,
        "max_model_len": row.context_tokens,
        "max_num_seqs": row.max_num_seqs,
        "predicted": _predicted(found) if found else None,
    }
