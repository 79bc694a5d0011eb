"""One replica's ranks in step: the first schedules and samples, the others follow its plans.

Before a step the leader sends one message over the replica's CPU group: the rows, and what the others do not know yet
of their requests (prompt, new tokens, changed blocks). Pixels follow as they are. Replicas that share experts agree
before each step how many tokens they bring, because the experts' collectives span them all.
Invariants: every rank of a replica runs the same plans in the same order; a rank ends between two steps only.
Knows no policy and no model. With one rank there is nothing to tell and nobody to agree with.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from executor.parallel.groups import Parallel
from executor.schedule.request import MediaItem, Prompt, Request, SamplingParams
from executor.schedule.plan import Plan, Row

SMALL_BYTES = 1 << 14
"""A message up to this size goes in one broadcast; a longer one takes a second."""
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class _News:
    """A row, and what followers learn of its request: `block_ids` are those from place `kept` on."""

    number: int
    start: int
    num_tokens: int
    samples: bool
    prompt: Prompt | None  # at the first row
    token_ids: list[int]
    kept: int
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Step:
    news: list[_News]
    ended: list[int]  # numbers of requests to forget
    encode: list[tuple[MediaItem, tuple[int, ...], int]]  # without pixels; their shape; whose picture it is
    release: tuple[bytes, ...]
    padded_tokens: int | None
    in_graph: bool


@dataclass(slots=True)
class _Told:
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
        self._told: dict[str, _Told] = {}
        self._ended: list[int] = []
        self._count = 0

    @property
    def leads(self) -> bool:
        """Whether this rank schedules and samples for its replica."""
        return self.parallel.leads

    def owners(self, media: Sequence[MediaItem]) -> list[int]:
        """Which rank of the pictures' group encodes each item: 0 for all where every rank takes part in all."""
        return deal([self.cost(item.grid_thw) for item in media], self.parallel.pictures.size)

    def lead(self, plan: Plan, in_graph: bool, *, more: bool = True) -> Plan | None:
        """The leader's own plan as every rank of the replica will run it, after telling them; None: nothing to run.

        `in_graph`: whether this replica could replay a graph for it. `more`: this replica has not ended. None for a
        plan without rows means that no other replica has any; after `more=False`, that all have ended.
        """
        if self.in_step:
            num_tokens = sum(row.num_tokens for row in plan.rows)
            peers = self.parallel.peers
            while True:
                tokens, eager, going = peers.most(num_tokens, not in_graph, more)
                if tokens or more or not going:
                    break
            plan = replace(plan, padded_tokens=tokens, in_graph=not eager)
        elif in_graph:
            plan = replace(plan, in_graph=True)
        if not plan.rows and not plan.padded_tokens:
            return None
        if self.parallel.control.size > 1:
            self._tell(plan)
        return plan

    def dismiss(self) -> None:
        """Let the followers go."""
        if self.parallel.control.size > 1:
            self._send(None)

    def follow(self) -> Iterator[Plan]:
        """The leader's plans, until it lets this rank go."""
        requests: dict[int, Request] = {}
        while (step := self._receive()) is not None:
            for number in step.ended:
                requests.pop(number, None)
            rows = tuple(_learn(requests, news) for news in step.news)
            encode = tuple(replace(item, pixels=self._pixels(shape, owner)) for item, shape, owner in step.encode)
            yield Plan(rows, encode, step.release, step.padded_tokens, step.in_graph)

    def forget(self, request: Request) -> None:
        """The request has ended: the followers hear of it with the next plan."""
        told = self._told.pop(request.id, None)
        if told is not None:
            self._ended.append(told.number)

    def _tell(self, plan: Plan) -> None:
        news = [self._news(row) for row in plan.rows]
        owners = self.owners(plan.encode)
        encode = [
            (replace(item, pixels=None, source=""), tuple(item.pixels.shape), owner)
            for item, owner in zip(plan.encode, owners, strict=True)
        ]
        self._send(_Step(news, self._ended, encode, plan.release, plan.padded_tokens, plan.in_graph))
        self._ended = []
        for item, owner in zip(plan.encode, owners, strict=True):
            if self.parallel.pictures.size == 1:
                self._broadcast(item.pixels.contiguous())
            elif owner:
                dist.send(item.pixels.contiguous(), group=self.parallel.control.handle, group_dst=owner)

    def _news(self, row: Row) -> _News:
        request, prompt = row.request, None
        told = self._told.get(request.id)
        if told is None:
            self._count += 1
            told = self._told[request.id] = _Told(self._count)
            media = tuple(replace(item, pixels=None, source="") for item in request.prompt.media)
            prompt = replace(request.prompt, media=media, text="")
        token_ids = request.output_token_ids[told.num_outputs :]
        told.num_outputs = len(request.output_token_ids)
        now, kept = tuple(request.block_ids), len(told.block_ids)
        if now[:kept] != told.block_ids:  # preempted since, and given others
            kept = 0
        told.block_ids = now
        return _News(
            told.number, row.start, row.num_tokens, row.samples, prompt, token_ids, kept, list(now[kept:])
        )  # fmt: skip

    def _send(self, step: _Step | None) -> None:
        content = pickle.dumps(step, protocol=pickle.HIGHEST_PROTOCOL)
        first = torch.zeros(SMALL_BYTES, dtype=torch.uint8)
        length = len(content).to_bytes(_LENGTH_BYTES, "little")
        head = length + content[: SMALL_BYTES - _LENGTH_BYTES]
        first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._broadcast(first)
        rest = content[SMALL_BYTES - _LENGTH_BYTES :]
        if rest:
            self._broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8))

    def _receive(self) -> _Step | None:
        first = self._broadcast(torch.empty(SMALL_BYTES, dtype=torch.uint8)).numpy().tobytes()
        length = int.from_bytes(first[:_LENGTH_BYTES], "little")
        content = first[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(content) < length:
            content += self._broadcast(torch.empty(length - len(content), dtype=torch.uint8)).numpy().tobytes()
        return pickle.loads(content)

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

    def _broadcast(self, x: Any) -> Any:
        dist.broadcast(x, group=self.parallel.control.handle, group_src=0)
        return x


def _learn(requests: dict[int, Request], news: _News) -> Row:
    """Bring what is known of the row's request up to date."""
    if news.prompt is not None:
        requests[news.number] = Request(str(news.number), news.prompt, SamplingParams())
    request = requests[news.number]
    request.output_token_ids += news.token_ids
    request.block_ids[news.kept :] = news.block_ids
    return Row(request, news.start, news.num_tokens, news.samples)
