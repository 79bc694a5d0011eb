"""A model made of hashes, and the memory it runs in, to prove what the scheduler hands out.

The "keys and values" of a token are a chained hash of everything before it, the token, its position and its embedding,
as those of a transformer are a function of all that. The runner computes each from the one it reads through
`block_ids`, so a block shared, lost or overwritten by mistake changes every later hash and every later token.
"""

import random
import struct
import zlib
from collections.abc import Collection, Iterable, Sequence
from typing import NoReturn

import numpy as np

from executor.schedule.plan import Plan, Row
from executor.schedule.request import MediaItem, Prompt, Request, SamplingParams, Span
from executor.schedule.scheduler import Scheduler

PLACEHOLDER = 1
EOS = 2
VOCABULARY = 40


def media(name: str, num_tokens: int) -> MediaItem:
    return MediaItem("image", name.encode(), None, (1, 2, 2 * num_tokens), num_tokens)


def prompt(*segments: Sequence[int] | MediaItem, stride: int = 1) -> Prompt:
    """A prompt of runs of ids and media, in order; `stride` spaces the temporal positions inside media."""
    token_ids: list[int] = []
    positions: list[list[int]] = []
    items: list[MediaItem] = []
    spans: list[Span] = []
    for segment in segments:
        start = len(token_ids)
        if isinstance(segment, MediaItem):
            spans.append(Span(start, segment.num_tokens, len(items)))
            items.append(segment)
            token_ids += [PLACEHOLDER] * segment.num_tokens
            positions += [[start + i * stride, start + i, start] for i in range(segment.num_tokens)]
        else:
            token_ids += segment
            positions += [[start + i] * 3 for i in range(len(segment))]
    return Prompt(token_ids, np.array(positions, dtype=np.int64).T, 0, tuple(items), tuple(spans))


def request(name: str, *segments: Sequence[int] | MediaItem, stride: int = 1, **params) -> Request:
    return Request(name, prompt(*segments, stride=stride), SamplingParams(**params))


def scheduler(**options) -> Scheduler:
    defaults = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "encoder_cache_tokens": 64,
        "eos_token_ids": (EOS,),
    }
    return Scheduler(**{**defaults, **options})


def link(previous: int, token_id: int, position: Sequence[int], digest: bytes, offset: int) -> int:
    return zlib.crc32(digest, zlib.crc32(struct.pack("<6q", previous, token_id, *position, offset)))


def choose(chain: int) -> int:
    """The model's next token after a context."""
    return (chain * 2654435761 >> 7) % VOCABULARY


class Truth:
    """What each token of a request must leave in memory, computed from the request alone."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._embeddings: dict[int, tuple[bytes, int]] = {}
        for span in prompt.spans:
            for i in range(span.num_tokens):
                self._embeddings[span.start + i] = (prompt.media[span.media_index].digest, span.offset + i)
        self.chain: list[int] = []

    def inputs(self, index: int, token_id: int) -> tuple[int, Sequence[int], bytes, int]:
        num_prompt = len(self._prompt.token_ids)
        if index < num_prompt:
            return (token_id, self._prompt.positions[:, index].tolist(), *self._embeddings.get(index, (b"", 0)))
        return (token_id, [index + self._prompt.position_delta] * 3, b"", 0)

    def extend(self, token_ids: Sequence[int]) -> list[int]:
        """Of all the tokens of prompt and output."""
        for index in range(len(self.chain), len(token_ids)):
            previous = self.chain[-1] if self.chain else 0
            self.chain.append(link(previous, *self.inputs(index, token_ids[index])))
        return self.chain


def answer_alone(prompt: Prompt, params: SamplingParams, max_output_tokens: int) -> list[int]:
    """The answer of the model without any scheduler."""
    truth, output = Truth(prompt), []
    while True:
        output.append(choose(truth.extend(prompt.token_ids + output)[-1]))
        ends = output[-1] in params.stop_token_ids or (output[-1] == EOS and not params.ignore_eos)
        if (ends and len(output) >= params.min_new_tokens) or len(output) >= min(
            params.max_new_tokens, max_output_tokens
        ):
            return output


class Fault(Exception):
    """A step that fails."""


class FakeStore:
    """Blocks as hashes by digest. What is staged for a prompt is what was there when it was fetched.

    `loses`: how likely a block is not found, or not wanted.
    """

    def __init__(self, rng: random.Random, loses: float = 0.1) -> None:
        self._rng, self._loses = rng, loses
        self.blocks: dict[bytes, np.ndarray] = {}
        self.at_hand: dict[Prompt, dict[bytes, np.ndarray]] = {}
        self.num_loaded = 0

    def fetch(self, prompt: Prompt, digests: Sequence[bytes]) -> None:
        found = {digest: self.blocks[digest] for digest in digests if digest in self.blocks}
        self.at_hand[prompt] = {x: block for x, block in found.items() if self._rng.random() >= self._loses}

    def staged(self, prompt: Prompt) -> dict[bytes, np.ndarray]:
        return self.at_hand.get(prompt, {})

    def release(self, prompt: Prompt) -> None:
        self.at_hand.pop(prompt, None)

    def drop(self, prompt: Prompt) -> None:
        self.release(prompt)

    def wants(self, digest: bytes) -> bool:
        return digest not in self.blocks and self._rng.random() >= self._loses


class FakeRunner:
    """Executes plans on a memory of `num_blocks * block_size` hashes and checks each of them on the way.

    With `guesses` a row yields any number of tokens that it may, and wrong guesses stay in the slots behind them.
    """

    def __init__(self, scheduler: Scheduler, guesses: random.Random | None = None) -> None:
        self.scheduler = scheduler
        self.guesses = guesses
        self.doubtful: set[bytes] = set()  # media of steps that failed
        self.block_size = scheduler.pool.block_size
        self.memory = np.full(scheduler.pool.num_blocks * self.block_size, -1, dtype=np.int64)
        self.embeddings: dict[bytes, int] = {}
        self.num_encoded: dict[bytes, int] = {}
        self.max_embedded_tokens = 0
        self._truths: dict[Request, Truth] = {}
        self._unread: dict[Request, list[int]] = {}

    def _tokens(self, request: Request) -> list[int]:
        return request.token_ids(0, request.num_tokens) + self._unread.get(request, [])

    def execute(
        self, plan: Plan, unreadable: Collection[bytes] = (), before: Sequence[Sequence[int]] = ()
    ) -> list[list[int]]:
        """The new tokens of each row. `unreadable`: media that cannot be encoded; rows that read them yield nothing.

        `before`: of a plan that continues another, what that one's rows have yielded; nobody else knows it yet.
        """
        assert (plan.continues is None) == (not before)
        places = plan.continues or ()
        self._unread = {row.request: list(before[place]) for row, place in zip(plan.rows, places, strict=bool(places))}
        self._check(plan)
        self._exchange(plan)
        self._encode(plan, unreadable)
        rows = [row for row in plan.rows if not self.reads(row, unreadable)]
        for row in rows:  # of all rows first: what a step reads was written by earlier steps
            self._check_context(row)
        chains = {row.request: self._write(row) for row in rows}
        return [self._yield(row, chains[row.request]) if row.request in chains else [] for row in plan.rows]

    def fail(self, plan: Plan, rng: random.Random) -> NoReturn:
        """Raise Fault before, within or after the encoding, or after some rows have been written."""
        self._check(plan)
        if rng.random() < 0.5:
            self._exchange(plan)
        self.doubtful |= {*plan.release, *(item.digest for item in plan.encode)}
        if rng.random() < 0.7:
            for item in plan.encode[: rng.randint(0, len(plan.encode))]:
                self.embeddings[item.digest] = item.num_tokens
            for digest in plan.release[: rng.randint(0, len(plan.release))]:
                self.embeddings.pop(digest, None)
            for row in plan.rows[: rng.randint(0, len(plan.rows))]:
                self.memory[self._slots(row, row.start, row.start + row.num_tokens)] = -7
        raise Fault

    def _exchange(self, plan: Plan) -> None:
        """With the store: first what it keeps, then what is loaded."""
        size, store = self.block_size, self.scheduler.store
        for block in plan.keep:
            content = self.memory[block.block_id * size : (block.block_id + 1) * size].copy()
            assert (content > 0).all(), "a block that is not full"
            known = store.blocks.setdefault(block.digest, content)
            assert (known == content).all(), "two contents of one name"
        for block in plan.load:
            content = next(found[block.digest] for found in store.at_hand.values() if block.digest in found)
            self.memory[block.block_id * size : (block.block_id + 1) * size] = content
            store.num_loaded += 1

    @staticmethod
    def reads(row: Row, digests: Collection[bytes]) -> bool:
        prompt, end = row.request.prompt, row.start + row.num_tokens
        return any(
            prompt.media[span.media_index].digest in digests
            for span in prompt.spans
            if span.start < end and span.start + span.num_tokens > row.start
        )

    def _yield(self, row: Row, chain: int) -> list[int]:
        if not row.max_yield:
            return []
        tokens = [choose(chain)]
        count = self.guesses.randint(1, row.max_yield) if self.guesses else 1
        at = row.start + row.num_tokens
        while len(tokens) < count:
            index = at + len(tokens) - 1
            chain = link(chain, *self._truths[row.request].inputs(index, tokens[-1]))
            self.memory[self._slots(row, index, index + 1)] = chain
            tokens.append(choose(chain))
        self.memory[self._slots(row, at + count - 1, at + row.max_yield - 1)] = -7
        return tokens

    def _check(self, plan: Plan) -> None:
        scheduler = self.scheduler
        assert plan.rows
        total = sum(row.num_tokens + max(0, row.max_yield - 1) for row in plan.rows)
        assert total <= scheduler.max_num_batched_tokens
        assert len(plan.rows) <= scheduler.max_num_seqs
        assert len({row.request for row in plan.rows}) == len(plan.rows)
        is_long = [row.num_tokens > 1 for row in plan.rows]
        assert is_long == sorted(is_long), "rows of one token come first"
        for row in plan.rows:
            assert row.num_tokens > 0
            assert (row.max_yield > 0) == (row.start + row.num_tokens == len(self._tokens(row.request)))
            assert row.max_yield <= (scheduler.max_yield if row.num_tokens == 1 else 1)
            whole = not scheduler.enable_chunked_prefill and row.request.num_tokens <= scheduler.max_num_batched_tokens
            assert row.max_yield or not whole, "a prompt was split although chunked prefill is off"

    def _encode(self, plan: Plan, unreadable: Collection[bytes]) -> None:
        for digest in plan.release:
            assert digest in self.embeddings or digest in self.doubtful, "dropped twice"
            self.embeddings.pop(digest, None)
        for item in plan.encode:
            assert item.digest not in self.embeddings or item.digest in self.doubtful, "encoded twice"
            self.doubtful.discard(item.digest)
            if item.digest in unreadable:
                continue
            self.embeddings[item.digest] = item.num_tokens
            self.num_encoded[item.digest] = self.num_encoded.get(item.digest, 0) + 1
        self.max_embedded_tokens = max(self.max_embedded_tokens, sum(self.embeddings.values()))

    def _slots(self, row: Row, start: int, end: int) -> np.ndarray:
        index = np.arange(start, end)
        return np.array(row.request.block_ids, dtype=np.int64)[index // self.block_size] * self.block_size + (
            index % self.block_size
        )

    def _check_context(self, row: Row) -> None:
        request = row.request
        truth = self._truths.setdefault(request, Truth(request.prompt))
        chain = truth.extend(self._tokens(request))
        context = self.memory[self._slots(row, 0, row.start)]
        assert context.tolist() == chain[: row.start], f"request {request.id} reads what is not its own"
        for span in request.prompt.spans:
            if span.start < row.start + row.num_tokens and span.start + span.num_tokens > row.start:
                assert request.prompt.media[span.media_index].digest in self.embeddings, "embeddings are missing"

    def _write(self, row: Row) -> int:
        request = row.request
        previous = int(self.memory[self._slots(row, row.start - 1, row.start)][0]) if row.start else 0
        slots = self._slots(row, row.start, row.start + row.num_tokens)
        for block_id in set((slots // self.block_size).tolist()):
            holders = self.scheduler.pool.num_holders(block_id)
            assert holders == (not request.finished), (
                "writes into a block of others"
            )  # finished: aborted since the plan
        tokens = self._tokens(request)[row.start : row.start + row.num_tokens]
        for index, (slot, token_id) in enumerate(zip(slots, tokens, strict=True), start=row.start):
            previous = link(previous, *self._truths[request].inputs(index, token_id))
            self.memory[slot] = previous
        return previous


def run(scheduler: Scheduler, requests: Iterable[Request] = (), max_steps: int = 1000) -> list[Plan]:
    """Add requests, then step until there is no work; the plans. Invariants are checked after each step."""
    for each in requests:
        scheduler.add(each)
    runner, plans = FakeRunner(scheduler), []
    while scheduler.has_work:
        assert len(plans) < max_steps, "spins"
        plans.append(scheduler.schedule())
        scheduler.check()
        scheduler.update(plans[-1], runner.execute(plans[-1]))
        scheduler.check()
    return plans
