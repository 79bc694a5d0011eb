"""One replica's ranks in step: the first schedules and samples, the others follow its plans.

Before a step the leader sends one message over the replica's CPU group: the rows, and what the others do not know yet
of their requests (prompt, new tokens, changed blocks). Pixels follow as they are. Replicas that share experts agree
before each step how many tokens they bring and which graph they replay, because the experts' collectives span them all.
The tokens of a plan that `continues` another are on the leader's device only, and come from there (Runner.forward).
Invariants: every rank of a replica runs the same plans in the same order; a rank ends between two steps only.
Knows no policy and no model. With one rank there is nothing to tell and nobody to agree with.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from executor.engine.graphs import DecodeGraphs, needed_shape
from executor.engine.messages import RowMessage, StepMessage, from_bytes, to_bytes
from executor.parallel.groups import Parallel
from executor.schedule.plan import GraphShape, Plan, Row
from executor.schedule.request import MediaItem, Request, SamplingParams

SMALL_BYTES = 1 << 14
"""A message up to this size goes in one broadcast; a longer one takes a second."""
_LENGTH_BYTES = 8


@dataclass(slots=True)
class _Known:
    """What the followers know of a request."""

    number: int
    num_outputs: int = 0
    block_ids: tuple[int, ...] = ()


def deal(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Which rank takes each thing: the largest first, to whoever has least. The same on every rank."""
    loads, owners = [0.0] * num_ranks, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owners[place] = min(range(num_ranks), key=loads.__getitem__)
        loads[owners[place]] += costs[place]
    return owners


class Replica:
    """This rank's part in its replica, and its replica's among the others."""

    def __init__(
        self, parallel: Parallel, cost: Callable[[tuple[int, int, int]], float], *, shares_experts: bool
    ) -> None:
        """`cost`: work of encoding a picture of this grid. `shares_experts`: over the ranks of all replicas."""
        self.parallel = parallel
        self.cost = cost
        self.in_step = shares_experts and parallel.replicas.size > 1
        self._known: dict[str, _Known] = {}
        self._ended: list[int] = []
        self._count = 0

    @property
    def leads(self) -> bool:
        """Whether this rank schedules and samples for its replica."""
        return self.parallel.leads

    @property
    def is_alone(self) -> bool:
        """Whether no other rank takes part in this one's steps."""
        return self.parallel.control.size == 1 and not self.in_step

    def owners(self, media: Sequence[MediaItem]) -> list[int]:
        """Which rank of the pictures' group encodes each item: 0 for all where every rank takes part in all."""
        return deal([self.cost(item.grid_thw) for item in media], self.parallel.pictures.size)

    def lead(self, plan: Plan, graphs: DecodeGraphs | None, *, more: bool = True) -> Plan | None:
        """The leader's plan as every rank of the replica will run it, sent to them; None: nothing to run.

        `graphs`: the same on all ranks, or None on all. `more`: this replica has not ended. None for a plan of nothing
        means that no other replica has any rows; after `more=False`, that all have ended.
        """
        needed = None if graphs is None else needed_shape(plan.rows)
        if self.in_step:
            num_tokens = sum(row.num_inputs for row in plan.rows)
            peers = self.parallel.peers
            while True:
                # One graph for all: as many rows as the replica with the most, as long as those of any.
                tokens, eager, *most, going = peers.max(num_tokens, needed is None, *(needed or (0, 1)), more)
                if tokens or more or not going:
                    break
            plan = replace(plan, padded_tokens=tokens, graph=None if eager else graphs.fitting(GraphShape(*most)))
        elif needed is not None and (graph := graphs.fitting(needed)) is not None:
            plan = replace(plan, graph=graph)
        if not plan.rows and not plan.padded_tokens and not plan.keep:
            return None
        if self.parallel.control.size > 1:
            self._announce(plan)
        return plan

    def dismiss(self) -> None:
        """Let the followers go."""
        if self.parallel.control.size > 1:
            self._send(None)

    def follow(self) -> Iterator[Plan]:
        """The leader's plans, until it lets this rank go."""
        requests: dict[int, Request] = {}
        while (message := self._receive()) is not None:
            for number in message.ended:
                requests.pop(number, None)
            rows = tuple(_updated_row(requests, row) for row in message.rows)
            encode = tuple(replace(item, pixels=self._pixels(shape, owner)) for item, shape, owner in message.encode)
            yield Plan(
                rows, encode, message.release, message.padded_tokens, message.graph, message.is_decode,
                continues=tuple(range(len(rows))) if message.continues else None,
            )  # fmt: skip

    def forget(self, request: Request) -> None:
        """The request has ended: the followers hear of it with the next plan."""
        known = self._known.pop(request.id, None)
        if known is not None:
            self._ended.append(known.number)

    def _announce(self, plan: Plan) -> None:
        owners = self.owners(plan.encode)
        encode = [(item, tuple(item.pixels.shape), owner) for item, owner in zip(plan.encode, owners, strict=True)]
        rows = [self._row_message(row) for row in plan.rows]
        message = StepMessage(
            rows, self._ended, encode, plan.release, plan.padded_tokens, plan.graph, plan.is_decode,
            continues=plan.continues is not None,
        )  # fmt: skip
        self._send(message)
        self._ended = []
        for item, owner in zip(plan.encode, owners, strict=True):
            if self.parallel.pictures.size == 1:
                self._broadcast(item.pixels.contiguous())
            elif owner:
                dist.send(item.pixels.contiguous(), group=self.parallel.control.handle, group_dst=owner)

    def _row_message(self, row: Row) -> RowMessage:
        request, prompt = row.request, None
        known = self._known.get(request.id)
        if known is None:
            self._count += 1
            known = self._known[request.id] = _Known(self._count)
            prompt = request.prompt
        token_ids = request.output_token_ids[known.num_outputs :]
        known.num_outputs = len(request.output_token_ids)
        block_ids, num_kept = tuple(request.block_ids), len(known.block_ids)
        if block_ids[:num_kept] != known.block_ids:  # preempted since, and given others
            num_kept = 0
        known.block_ids = block_ids
        return RowMessage(
            known.number, row.start, row.num_tokens, row.max_yield, row.scored, row.draft_ids, token_ids, num_kept,
            list(block_ids[num_kept:]), prompt,
        )  # fmt: skip

    def _send(self, message: StepMessage | None) -> None:
        content = to_bytes(message)
        first = torch.zeros(SMALL_BYTES, dtype=torch.uint8)
        length = len(content).to_bytes(_LENGTH_BYTES, "little")
        head = length + content[: SMALL_BYTES - _LENGTH_BYTES]
        first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._broadcast(first)
        rest = content[SMALL_BYTES - _LENGTH_BYTES :]
        if rest:
            self._broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8))

    def _receive(self) -> StepMessage | None:
        first = self._broadcast(torch.empty(SMALL_BYTES, dtype=torch.uint8)).numpy().tobytes()
        length = int.from_bytes(first[:_LENGTH_BYTES], "little")
        content = first[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(content) < length:
            content += self._broadcast(torch.empty(length - len(content), dtype=torch.uint8)).numpy().tobytes()
        return from_bytes(content)

    def _pixels(self, shape: tuple[int, ...], owner: int) -> torch.Tensor | None:
        """A follower's copy; None where another rank encodes the picture."""
        pictures = self.parallel.pictures
        if pictures.size == 1:
            return self._broadcast(torch.empty(shape, dtype=torch.uint8))
        if owner != pictures.rank:
            return None
        pixels = torch.empty(shape, dtype=torch.uint8)
        dist.recv(pixels, group=self.parallel.control.handle, group_src=0)
        return pixels

    def _broadcast(self, x: torch.Tensor) -> torch.Tensor:
        dist.broadcast(x, group=self.parallel.control.handle, group_src=0)
        return x


def _updated_row(requests: dict[int, Request], message: RowMessage) -> Row:
    """The row, after bringing what is known of its request up to date."""
    if message.prompt is not None:
        requests[message.number] = Request(str(message.number), message.prompt, SamplingParams())
    request = requests[message.number]
    request.output_token_ids += message.token_ids
    request.block_ids[message.num_kept :] = message.block_ids
    return Row(request, message.start, message.num_tokens, message.max_yield, message.scored, message.draft_ids)
