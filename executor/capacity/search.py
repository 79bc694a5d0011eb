"""The cheapest recipes of a model that hold a demand, and what stops the cheaper ones.

Cheaper is: fewer dies; of as many, the chip with less memory bandwidth, with fewer operations a second, with less
memory; float weights before 8-bit ones; fewer ranks in a replica. No prices are known here. All recipes of up to
MOST_DIES dies are gone through in that order, one model on one kind of chip each.
TPOT is a user's: with the host and the prefills of others; TTFT that of a request which comes while others decode.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from executor.capacity.answer import Answer, answer
from executor.capacity.chips import Chip, chip_names, read_chip
from executor.capacity.choices import PRECISIONS, float_type, precision_word, precisions, recipe_on, weights_path
from executor.capacity.demand import Demand
from executor.capacity.fits import Fit, deployment_on, fit
from executor.capacity.workload import MARKS, Workload, picture_grid
from executor.errors import UserError
from executor.recipe.memory import GIB
from executor.recipe.on_paper import OnPaper, settle_on_paper
from executor.recipe.schema import Recipe
from executor.recipe.settle import degree_findings

MOST_DIES = 64
REPLICA_RANKS = (1, 2, 4, 8, 16)
COST_ORDER = "fewest dies, then the slower chip (bandwidth, then operations), less memory, float weights, fewer ranks"
CHEAPER_SHOWN = 4


@dataclass(frozen=True)
class Candidate:
    """One recipe on one chip: `dies` ranks in replicas of `replica_ranks`."""

    chip_name: str
    chip: Chip
    quantization: str
    replica_ranks: int
    dies: int

    @property
    def cost(self) -> tuple[float, ...]:
        """What candidates are ordered by; see the module."""
        order = PRECISIONS.index(self.quantization) if self.quantization in PRECISIONS else 0
        speed = self.chip.bandwidth_bytes_per_s, max(self.chip.flops_per_s.values())
        return self.dies, *speed, self.chip.memory_bytes, order, self.replica_ranks

    def __str__(self) -> str:
        replicas = self.dies // self.replica_ranks
        dealt = f" in {replicas} replicas" if replicas > 1 else ""
        dies = f"{self.dies} dies" if self.dies > 1 else "1 die"
        return f"{dies} of {self.chip_name}{dealt}, {precision_word(self.chip, self.quantization)}"


@dataclass(frozen=True)
class Verdict:
    """`faults`: what keeps a candidate from holding the demand, in few words; none: it holds it."""

    candidate: Candidate
    answer: Answer
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Search:
    """`chosen`: the cheapest that holds the demand, None where none does; `failed`: those before it, cheapest first."""

    workload: Workload
    chosen: Verdict | None
    failed: tuple[Verdict, ...]

    @cached_property
    def next_cheaper(self) -> tuple[Verdict, ...]:
        """The dearest of those that do not hold it, one for each number of dies and kind of chip, dearest first."""
        found: dict[tuple[int, str | None], Verdict] = {}
        for verdict in reversed(self.failed):
            found.setdefault((verdict.candidate.dies, verdict.candidate.chip.soc), verdict)
        return tuple(found.values())[:CHEAPER_SHOWN]


def search(base: Recipe, demand: Demand) -> Search:
    """Of the model of `base` (or the demand's), on all chips or the demand's or the recipe's plan_config.chip.

    UserError for what contradicts itself. A chip that cannot take the recipe is left out where another can.
    """
    if demand.model is not None:
        base = base.replace(model={"model_path": f"Qwen/{demand.model}"})
    chips = _chips(demand, base.plan.chip)
    papers, refused = {}, []
    for name, chip in chips.items():
        for quantization in _quantizations(base, chip, demand):
            try:
                papers[name, quantization] = settle_on_paper(recipe_on(base, chip, quantization), "plan")
            except UserError as error:
                refused.append(error)
    if refused and not papers:
        raise refused[0]
    if not papers:
        wanted = demand.float_type or demand.quantization
        raise UserError(
            f"plan_config.demand: no chip of {', '.join(chips)} takes {wanted} weights of {base.model.model_path}"
        )
    workload = demanded_workload(next(iter(papers.values())), demand)
    failed = []
    for candidate in _candidates(papers, chips, demand, workload.users):
        verdict = _judge(candidate, papers[candidate.chip_name, candidate.quantization], workload, demand)
        if verdict is None:
            continue
        if not verdict.faults:
            return Search(workload, verdict, tuple(failed))
        failed.append(verdict)
        if workload.request_tokens > verdict.answer.deployment.paper.shapes.max_position_embeddings:
            break  # no chip makes the model's own bound larger
    return Search(workload, None, tuple(failed))


def demanded_workload(paper: OnPaper, demand: Demand) -> Workload:
    """What is asked: the demand's words, and plan_config for what it does not say."""
    plan = paper.recipe.plan
    grid = picture_grid(paper, *(demand.picture_size or plan.picture_size))
    pictures = plan.pictures if demand.pictures is None else demand.pictures
    output, text = demand.output_tokens or plan.output_tokens, demand.text_tokens or plan.input_tokens
    if demand.total_tokens is not None:
        seen = pictures * (grid[0] * grid[1] + MARKS)
        text = demand.total_tokens - output - seen
        if text < 1:
            raise UserError(
                f"plan_config.demand: {demand.total_tokens} tokens in all leave none for text: pictures take {seen}, "
                f"the answer {output}"
            )
    users = demand.users or plan.users or paper.recipe.scheduler.max_num_seqs
    return Workload(users, text, pictures, grid, output)


def _chips(demand: Demand, recipes: str | None) -> dict[str, Chip]:
    """Those to look through; `recipes`: the chip of plan_config.chip. UserError where the two leave none."""
    if demand.chip is not None and recipes is not None and read_chip(demand.chip) != read_chip(recipes):
        raise UserError(
            f"plan_config.demand: it names {demand.chip}, plan_config.chip {recipes}; leave out one of them"
        )
    named = demand.chip or recipes
    chips = {name: read_chip(name) for name in (chip_names() if named is None else (named,))}
    found = {name: chip for name, chip in chips.items() if chip.soc is not None and demand.soc in (None, chip.soc)}
    if not found:
        raise UserError(f"plan_config.demand: {named} is no chip of {demand.soc or 'an NPU'}; leave out one of them")
    return found


def _quantizations(base: Recipe, chip: Chip, demand: Demand) -> list[str]:
    found = precisions(chip, base.model.model_path, base.model.hub)
    if demand.float_type not in (None, float_type(chip)):
        return []
    return [word for word in found if demand.quantization in (None, word)]


def _candidates(
    papers: dict[tuple[str, str], OnPaper], chips: dict[str, Chip], demand: Demand, users: int
) -> Iterator[Candidate]:
    """Cheapest first: every number of dies up to 16, above that multiples of eight; no replica is without users."""
    most = demand.most_dies or MOST_DIES
    for dies in [count for count in range(1, most + 1) if count <= 16 or count % 8 == 0]:
        some = [
            Candidate(name, chips[name], quantization, ranks, dies)
            for name, quantization in papers
            for ranks in REPLICA_RANKS
            if dies % ranks == 0 and ranks <= chips[name].dies_per_node and dies // ranks <= users
        ]
        yield from sorted(some, key=lambda candidate: candidate.cost)


def _judge(candidate: Candidate, paper: OnPaper, workload: Workload, demand: Demand) -> Verdict | None:
    """None where the model does not divide so."""
    recipe = sized(paper.recipe, candidate, workload, paper.shapes.max_position_embeddings)
    if degree_findings(recipe, paper.shapes):
        return None
    deployment = deployment_on(replace(paper, recipe=recipe), candidate.chip.usable_bytes)
    held = fit(deployment, workload)
    if not held.fits:  # how fast it would be is not asked then
        return Verdict(candidate, Answer(candidate.chip, held, None), tuple(_memory_faults(held)))
    found = answer(deployment, candidate.chip, workload)
    return Verdict(candidate, found, tuple(_time_faults(found, demand)))


def sized(recipe: Recipe, candidate: Candidate, workload: Workload, longest: int) -> Recipe:
    """The recipe of a candidate, as large as the workload wants it; `longest`: what the model was made for."""
    block = recipe.scheduler.block_size
    users = workload.users_of_replica(candidate.dies // candidate.replica_ranks)
    length = max(workload.request_tokens, min(-(-workload.request_tokens // block) * block, longest))
    sizes = {"max_num_seqs": users, "max_model_len": length}
    degrees = {"world_size": candidate.dies, "attn_tp_size": candidate.replica_ranks}
    path = weights_path(recipe.model, candidate.quantization, candidate.replica_ranks)
    return recipe.replace(model={"model_path": path}, parallel=degrees, scheduler=sizes)


def _memory_faults(held: Fit) -> list[str]:
    """In few words: the list of candidates is long."""
    memory = held.memory
    of_sizes = [fault for fault in held.faults if not fault.startswith("memory:")]
    if of_sizes:
        return of_sizes
    return [f"memory: {memory.total_bytes / GIB:.1f} GiB of {memory.budget_bytes / GIB:.1f} a rank"]


def _time_faults(found: Answer, demand: Demand) -> list[str]:
    predicted = found.prediction
    assert predicted is not None, "chips have figures"
    faults = []
    if demand.tpot_ms is not None and predicted.tpot_host_ms > demand.tpot_ms:
        faults.append(f"TPOT {predicted.tpot_host_ms:.1f} ms predicted, {demand.tpot_ms:g} wanted")
    if demand.ttft_ms is not None and predicted.ttft_ms > demand.ttft_ms:
        faults.append(f"TTFT {predicted.ttft_ms:.0f} ms predicted, {demand.ttft_ms:g} wanted")
    if demand.tokens_per_s is not None and predicted.tokens_per_s < demand.tokens_per_s:
        faults.append(f"{predicted.tokens_per_s:.0f} tokens/s predicted, {demand.tokens_per_s:g} wanted")
    return faults


def asked_again(verdict: Verdict, workload: Workload, picture_size: tuple[int, int]) -> Recipe:
    """The candidate's recipe, whose own plan asks the same."""
    plan = {
        "chip": verdict.candidate.chip_name,
        "users": workload.users,
        "input_tokens": workload.text_tokens,
        "pictures": workload.pictures,
        "picture_size": picture_size,
        "output_tokens": workload.output_tokens,
        "demand": None,
    }
    return verdict.answer.deployment.recipe.replace(plan=plan)


def changes(before: Recipe, after: Recipe) -> dict[str, object]:
    """Keys of `after` that differ from `before`, as `section.key`, with plain values as YAML has them.

    `after` is settled: where `before` leaves open what comes out so by itself, it stays open.
    """
    by_itself = {
        "model_config.dtype": "auto",
        "model_config.kv_cache_dtype": "auto",
        "model_config.quantization": "auto" if after.model.quantization == "none" else None,
        "parallel_config.attn_tp_size": None if after.attn_tp_size == after.parallel.world_size else 0,
        "parallel_config.vision_parallel": "tp" if after.attn_tp_size == 1 else None,
    }
    found = {}
    for name, section in Recipe.model_fields.items():
        old, new = (getattr(recipe, name).model_dump(mode="json") for recipe in (before, after))
        for key, value in new.items():
            place = f"{section.alias}.{key}"
            if value != old[key] and not (place in by_itself and by_itself[place] == old[key]):
                found[place] = value
    return found


def overrides(changed: dict[str, object]) -> str:
    """Changes as they are typed behind a command."""
    words = (f"{key}={json.dumps(value, separators=(',', ':')) if not isinstance(value, str) else value}"
             for key, value in changed.items())  # fmt: skip
    return f"--set {' '.join(shlex.quote(word) for word in words)}" if changed else ""
