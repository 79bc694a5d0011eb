"""A model made of hashes, and the memory it runs in, to prove what the scheduler hands out.

The "keys and values" of a token are a chained hash of everything before it, the token, its position and its embedding,
as those of a transformer are a function of all that. The runner computes each from the one it reads through
`block_ids`, so a block shared, lost or overwritten by mistake changes every later hash and every later token.
"""

import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from executor.schedule.request import MediaItem, Prompt, Request, SamplingParams, Span
from executor.schedule.scheduler import Plan, Row, Scheduler

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


class FakeRunner:
    """Executes plans on a memory of `num_blocks * block_size` hashes and checks each of them on the way."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.block_size = scheduler.pool.block_size
        self.memory = np.full(scheduler.pool.num_blocks * self.block_size, -1, dtype=np.int64)
        self.embeddings: dict[bytes, int] = {}
        self.num_encoded: dict[bytes, int] = {}
        self.max_embedded_tokens = 0
        self._truths: dict[Request, Truth] = {}

    def execute(self, plan: Plan) -> list[int]:
        self._check(plan)
        self._encode(plan)
        for row in plan.rows:  # of all rows first: what a step reads was written by earlier steps
            self._check_context(row)
        chains = [self._write(row) for row in plan.rows]
        return [choose(chain) for row, chain in zip(plan.rows, chains, strict=True) if row.samples]

    def _check(self, plan: Plan) -> None:
        scheduler = self.scheduler
        assert plan.rows
        assert sum(row.num_tokens for row in plan.rows) <= scheduler.max_num_batched_tokens
        assert len(plan.rows) <= scheduler.max_num_seqs
        assert len({row.request for row in plan.rows}) == len(plan.rows)
        is_long = [row.num_tokens > 1 for row in plan.rows]
        assert is_long == sorted(is_long), "rows of one token come first"
        for row in plan.rows:
            assert row.num_tokens > 0 and row.samples == (row.start + row.num_tokens == row.request.num_tokens)
            whole = not scheduler.enable_chunked_prefill and row.request.num_tokens <= scheduler.max_num_batched_tokens
            assert row.samples or not whole, "a prompt was split although chunked prefill is off"

    def _encode(self, plan: Plan) -> None:
        for digest in plan.release:
            del self.embeddings[digest]
        for item in plan.encode:
            assert item.digest not in self.embeddings, "encoded twice"
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
        chain = truth.extend(request.token_ids(0, request.num_tokens))
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
        tokens = request.token_ids(row.start, row.start + row.num_tokens)
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
