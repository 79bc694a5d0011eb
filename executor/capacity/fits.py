"""Whether a recipe holds a workload in its ranks' memory, the largest sizes that it would hold, and what to change.

All bytes come from executor/recipe/memory.py: this module asks it about other sizes, and adds nothing of its own.
Knows no time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from executor.capacity.products import held_bytes
from executor.capacity.workload import Workload, replicas_of
from executor.device.table import CHIP_BYTES
from executor.host.limits import host_memory_bytes, process_memory_bytes
from executor.recipe.device import compute_bytes, copies_head
from executor.recipe.memory import GIB, MemoryEstimate, account, advice, named_blocks
from executor.recipe.on_paper import OnPaper
from executor.recipe.schema import Recipe
from executor.recipe.settle import degree_findings

MOST_SEQUENCES = 4096
WORLDS = (1, 2, 4, 8, 16, 32)
"""Numbers of ranks that are tried for a model that does not fit."""


@dataclass(frozen=True)
class Deployment:
    """A settled recipe and the memory of one of its ranks, as executor/recipe/memory.py wants it."""

    paper: OnPaper
    free_bytes: int
    compute_bytes: int | None = None
    process_bytes: int = 0
    copies_head: bool = True

    @property
    def recipe(self) -> Recipe:
        return self.paper.recipe

    @cached_property
    def assumed_bytes(self) -> int | None:
        """Of a rank's weights by the vendor's choice of types, for quantized folders that are not here; else None."""
        if self.recipe.model.quantization == "none" or self.paper.stored is not None:
            return None
        return round(sum(held_bytes(self.recipe, self.paper.shapes).values()))

    def account(self, num_blocks: int | None = None, **scheduler: int) -> MemoryEstimate:
        """Of a KV cache of `num_blocks` (None: what the recipe gets), with other sizes of `scheduler_config`."""
        recipe = self.recipe
        if scheduler:
            sizes = recipe.scheduler.model_copy(update=scheduler)  # of whole numbers above 0: nothing to check again
            recipe = recipe.model_copy(update={"scheduler": sizes})
        return account(
            recipe,
            self.paper.shapes,
            self.free_bytes,
            self.compute_bytes,
            picture_tokens=self.paper.largest_picture_tokens,
            process_bytes=self.process_bytes,
            copies_head=self.copies_head,
            stored=self.paper.stored,
            draft=self.paper.draft,
            num_blocks=num_blocks,
            held_bytes=self.assumed_bytes,
        )

    def blocks(self, tokens: int) -> int:
        """KV blocks of a request of so many tokens."""
        return -(-tokens // self.recipe.scheduler.block_size)

    def on_ranks(self, world_size: int) -> "Deployment | None":
        """The same in one replica of so many ranks, pictures dealt to them; None where the model does not divide."""
        degrees = {"world_size": world_size, "attn_tp_size": world_size, "vision_parallel": "data"}
        recipe = self.recipe.replace(parallel={**degrees, "moe_ep_size": 1})
        if degree_findings(recipe, self.paper.shapes):
            return None
        return replace(self, paper=replace(self.paper, recipe=recipe))


def deployment_on(paper: OnPaper, usable_bytes: int | None = None) -> Deployment:
    """On a chip that gives a rank `usable_bytes`; None: what the recipe's soc has as sold, or this machine's memory.

    A CPU's ranks share what this machine has free now, and each holds a process besides.
    """
    recipe = paper.recipe
    if recipe.model.device == "npu":
        return Deployment(paper, usable_bytes or CHIP_BYTES[recipe.model.soc])
    size = compute_bytes(recipe)
    free = usable_bytes or host_memory_bytes() // recipe.parallel.world_size
    return Deployment(paper, free, size, process_memory_bytes(), copies_head(recipe))


@dataclass(frozen=True)
class Fit:
    """What a deployment says to a workload. `memory`: of a rank, with a KV cache of the asked requests.

    `faults`: what keeps it from being held, each with what to change; none: it fits. The largest sizes are what the
    memory allows: requests of full max_model_len, tokens of max_num_seqs requests, and requests as asked.
    """

    deployment: Deployment
    workload: Workload
    memory: MemoryEstimate
    faults: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.faults

    @cached_property
    def max_num_seqs(self) -> int:
        """Requests of one replica, each of the recipe's max_model_len; 0: not even one."""
        return most_sequences(self.deployment, self.deployment.recipe.scheduler.max_model_len)

    @cached_property
    def max_model_len(self) -> int:
        """Tokens of each of the recipe's max_num_seqs requests; 0: not even a block each."""
        return longest_requests(self.deployment)

    @cached_property
    def max_users(self) -> int:
        """Requests as asked, in all replicas."""
        length = self.workload.request_tokens
        if length > self.deployment.paper.shapes.max_position_embeddings:
            return 0
        return most_sequences(self.deployment, length) * replicas_of(self.deployment.paper)


def fit(deployment: Deployment, workload: Workload) -> Fit:
    """Whether all requests of `workload` are held at once."""
    recipe = deployment.recipe
    users = workload.users_of_replica(replicas_of(deployment.paper))
    memory = deployment.account(users * deployment.blocks(workload.request_tokens))
    named = named_blocks(recipe, memory.block_bytes, deployment.blocks(recipe.scheduler.max_model_len))
    faults = [*_size_faults(deployment, workload, users, named)]
    if not memory.fits:
        weights_alone = memory.process_bytes + memory.all_weights_bytes > memory.budget_bytes
        over = (memory.total_bytes - memory.budget_bytes) / GIB
        faults.append(
            f"memory: {users} requests of {workload.request_tokens} tokens take {memory.total_bytes / GIB:.1f} GiB of "
            f"a rank, {over:.1f} GiB more than the {memory.budget_bytes / GIB:.1f} GiB that it may use. "
            f"{advice(recipe, weights_alone)}{_ranks_hint(deployment, workload)}"
        )
    elif named is not None or memory.num_blocks < deployment.blocks(recipe.scheduler.max_model_len):
        started = deployment.account()
        if not started.fits:
            faults.append(
                f"start: the recipe is refused before it starts: {started}. "
                f"{advice(recipe, weights_alone=False)}{_start_hint(named)}"
            )
    return Fit(deployment, workload, memory, tuple(faults))


def _start_hint(named: int | None) -> str:
    """Why a recipe takes more at its start than the requests that were asked about."""
    return " It holds one request of max_model_len, whatever is asked." if named is None else ""


def _size_faults(deployment: Deployment, workload: Workload, users: int, named: int | None) -> list[str]:
    """Sizes of the recipe that the workload goes beyond, whatever the memory. `named`: blocks that the recipe sets."""
    limits, shapes, faults = deployment.recipe.scheduler, deployment.paper.shapes, []
    length = workload.request_tokens
    if length > shapes.max_position_embeddings:
        faults.append(
            f"request: {length} tokens are more than the {shapes.max_position_embeddings} that {shapes.name} was made "
            "for: ask for fewer tokens or smaller pictures"
        )
    elif length > limits.max_model_len:
        faults.append(
            f"scheduler_config.max_model_len: a request takes {length} tokens, the recipe has {limits.max_model_len}: "
            f"--set scheduler_config.max_model_len={length}"
        )
    if users > limits.max_num_seqs:
        faults.append(
            f"scheduler_config.max_num_seqs: {users} requests at once in a replica, the recipe has "
            f"{limits.max_num_seqs}: --set scheduler_config.max_num_seqs={users}"
        )
    wanted = users * deployment.blocks(length)
    if named is not None and wanted > named:
        key = "num_blocks" if limits.kv_cache_gb is None else "kv_cache_gb"
        faults.append(
            f"scheduler_config.{key}: the requests take {wanted} blocks, the recipe has {named}: set it to null"
        )
    return faults


def _ranks_hint(deployment: Deployment, workload: Workload) -> str:
    """The fewest ranks that hold it, where more do."""
    if deployment.recipe.model.device != "npu":
        return ""
    world = deployment.recipe.parallel.world_size
    ranks = fewest_ranks(deployment, lambda more: _holds(more, workload), [each for each in WORLDS if each > world])
    return f" {ranks} ranks hold it (vision_parallel: data)." if ranks else ""


def _holds(deployment: Deployment, workload: Workload) -> bool:
    return deployment.account(workload.users * deployment.blocks(workload.request_tokens)).fits


def fewest_ranks(
    deployment: Deployment, holds: Callable[[Deployment], bool], worlds: tuple[int, ...] | list[int] = WORLDS
) -> int | None:
    """The fewest ranks of one replica for which `holds`; None where none of `worlds` does."""
    for world_size in worlds:
        spread = deployment.on_ranks(world_size)
        if spread is not None and holds(spread):
            return world_size
    return None


def holds_one(deployment: Deployment) -> bool:
    """Whether the recipe starts: one request of its max_model_len."""
    return deployment.account(deployment.blocks(deployment.recipe.scheduler.max_model_len)).fits


def most_sequences(deployment: Deployment, tokens: int) -> int:
    """The most requests of so many tokens that a replica holds at once, at most MOST_SEQUENCES."""
    blocks = deployment.blocks(tokens)
    length = max(tokens, deployment.recipe.scheduler.max_model_len)
    return _largest(
        MOST_SEQUENCES, lambda count: deployment.account(count * blocks, max_num_seqs=count, max_model_len=length).fits
    )


def longest_requests(deployment: Deployment) -> int:
    """The most tokens of each of max_num_seqs requests, in whole blocks, at most what the model was made for."""
    size, count = deployment.recipe.scheduler.block_size, deployment.recipe.scheduler.max_num_seqs
    most = deployment.paper.shapes.max_position_embeddings
    blocks = _largest(
        -(-most // size), lambda length: deployment.account(count * length, max_model_len=min(length * size, most)).fits
    )
    return min(blocks * size, most)


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` that holds, 0 for none; smaller ones hold where a larger does."""
    least = 0
    if holds(most):
        return most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if holds(middle) else (least, middle)
    return least
