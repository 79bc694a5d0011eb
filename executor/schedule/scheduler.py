"""Which tokens of which requests the next step computes.

A step is rows of (request, start, number of tokens): decode rows first, then prefills that are under way, then newly
admitted requests in order of arrival, while the budgets of tokens, sequences, blocks and vision embeddings last. Short
texts whose turn it is have a share of the step before long prompts that are under way go on. In the plan all rows of
one token come before all longer ones. A row yields as many new tokens as it may and the runner finds; with `max_yield`
above 1 a decode row has slots and budget for drafts that the runner verifies.
A prompt gets all its blocks when it is admitted, an answer one block at a time; when none is left, the request that
was admitted last gives its blocks back and is computed again later (preemption by recomputation).

Invariants (`check`): a request is in one queue; running requests hold the blocks of what they have computed; whatever
is held is held by somebody. Every plan with work has a row, the oldest request is never passed over for good, and no
request asks for more than the whole pool. Not for several threads at once.
Knows nothing of tensors, text or models; stop strings are found elsewhere and reported by `finish`.
"""

import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from executor.errors import UserError
from executor.schedule.block_pool import BlockPool
from executor.schedule.encoder_cache import EncoderCache, MediaReads
from executor.schedule.plan import BlockToKeep, BlockToLoad, Plan, Row
from executor.schedule.prefix_cache import BlockDigests, BlockStore
from executor.schedule.request import FinishReason, Prompt, Request, SamplingParams, Status
from executor.schedule.waiting import Waiting

SHORT_SHARE = 4
"""A long prompt leaves one in so many of a step's tokens to short texts that have come after it."""


@dataclass(slots=True)
class _Record:
    """What the scheduler remembers of an unfinished request."""

    request: Request
    max_output_tokens: int
    end_ids: frozenset[int]  # tokens that may end the answer
    digests: BlockDigests
    media: MediaReads
    num_registered_blocks: int = 0
    next_full_tokens: int = 0  # so many computed tokens fill a block that is not registered yet
    claimed: range = range(0)
    loads: tuple[BlockToLoad, ...] = ()  # of its blocks, those that its next row finds loaded


@dataclass(slots=True)
class _OpenPlan:
    """A plan being made."""

    budget_tokens: int
    rows: list[Row] = field(default_factory=list)
    in_flight: set[bytes] = field(default_factory=set)  # digests of the blocks this step will fill
    admits: bool = True  # no longer once a request had to give way
    takes_media: bool = True  # no longer once an older row has to wait for the encoder cache
    loads: list[BlockToLoad] = field(default_factory=list)


class Scheduler:
    """Continuous batching over one block pool.

    `max_num_batched_tokens` bounds the tokens of a step, `max_model_len` prompt plus answer, `encoder_cache_tokens`
    the vision embeddings kept. Without chunked prefill a prompt is computed in one step; only the recomputation of a
    preempted request that has outgrown `max_num_batched_tokens` is still split. `max_yield`: new tokens that a decode
    row may bring; the budget of a step counts all but the first of them as tokens. `store`: blocks that are in no
    memory, set by whoever has one; plans say what to load from it and what it may keep.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_chunked_prefill: bool = True,
        enable_prefix_caching: bool = True,
        encoder_cache_tokens: int = 16384,
        eos_token_ids: Collection[int] = (),
        max_yield: int = 1,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_yield = max_yield
        self._encoder = EncoderCache(encoder_cache_tokens)
        self._waiting = Waiting()
        self._running: list[Request] = []  # in order of admission
        self._records: dict[str, _Record] = {}
        self.num_preemptions = 0
        self.store: BlockStore | None = None
        self.num_store_queries = 0  # tokens of admitted requests that no block in memory held
        self.num_store_hits = 0  # and those that were loaded
        self._to_keep: dict[bytes, BlockToKeep] = {}
        self._leaving: list[Prompt] = []  # of requests that a plan under way may have blocks to load for

    @property
    def has_work(self) -> bool:
        return bool(self._records)

    @property
    def has_to_keep(self) -> bool:
        """Whether the next plan has blocks for the store."""
        return bool(self._to_keep)

    def num_known_blocks(self, digests: Sequence[bytes]) -> int:
        """How many of the first of these are in memory; from any thread, true for the moment."""
        return sum(1 for _ in itertools.takewhile(self.pool.knows, digests))

    def knows_media(self, digest: bytes) -> bool:
        """Whether the embeddings of this media are in memory; from any thread, true for the moment."""
        return self._encoder.knows(digest)

    @property
    def encoder_queries(self) -> tuple[int, int]:
        """Media that requests have asked the encoder cache for, and how many of them were there."""
        return self._encoder.num_queries, self._encoder.num_hits

    def count_anew(self) -> None:
        """What was looked for in the caches until now does not count."""
        self.num_store_queries = self.num_store_hits = 0
        self._encoder.num_queries = self._encoder.num_hits = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request. UserError when it could never be served as asked."""
        self.check_possible(request)
        prompt = request.prompt
        num_prompt = len(prompt.token_ids)
        # The last token of an answer is never computed, hence the one more than the pool has slots.
        room_tokens = min(self.max_model_len, self.pool.num_blocks * self.pool.block_size + 1) - num_prompt
        self._records[request.id] = _Record(
            request,
            max_output_tokens=min(request.params.max_new_tokens, room_tokens),
            end_ids=self._end_ids(request.params),
            digests=BlockDigests(request, self.pool.block_size),
            media=MediaReads(request, self._encoder),
        )
        request.status = Status.WAITING
        self._waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """Drop a request, also between `schedule` and `update`; None when there is no such unfinished request."""
        record = self._records.get(request_id)
        if record is None:
            return None
        self.finish(record.request, FinishReason.ABORT)
        return record.request

    def fail(self, request: Request, error: str) -> None:
        """End a request that cannot go on, also between `schedule` and `update`; `error` says why."""
        self.finish(request, FinishReason.ERROR)
        if request.finish_reason is FinishReason.ERROR:
            request.error = error

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a request, for a stop string or by abort. One that `update` has ended only gets the new reason.

        Its block ids stay readable, since a plan under way may still name it; until the next plan is made nobody else
        has those blocks.
        """
        if not request.finished:
            if request.status is Status.RUNNING:
                self._running.remove(request)
            else:
                self._waiting.remove(request)
            is_loading = bool(self._records[request.id].loads)  # maybe by a plan under way
            self._give_back(request)
            del self._records[request.id]
            if self.store is not None and not request.output_token_ids:
                self._leaving.append(request.prompt)
                if not is_loading and len(self._leaving) == 1:
                    self._drop_staged()
            request.status = Status.FINISHED
            request.finish_s = time.monotonic()
        elif request.finish_reason is FinishReason.ABORT:
            return
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def schedule(self) -> Plan:
        """The next step; without rows only when there is no work, and then maybe with blocks to keep."""
        self._drop_staged()
        open_plan = _OpenPlan(self.max_num_batched_tokens)
        under_way = self._schedule_decode(open_plan)
        num_decode_rows = len(open_plan.rows)
        if under_way:
            self._admit(open_plan, open_plan.budget_tokens // SHORT_SHARE)
        self._schedule_prefill(under_way, open_plan)
        self._admit(open_plan)
        assert open_plan.rows or not self.has_work, "nothing was scheduled although there is work"
        keep = self._drained_keep()
        if not open_plan.rows:
            return Plan((), keep=keep)
        is_decode = len(open_plan.rows) == num_decode_rows
        if not is_decode:
            open_plan.rows.sort(key=lambda row: row.num_tokens > 1)  # the end of a prefill may be a single token too
        encode, release = self._encoder.drain()
        loads = tuple(open_plan.loads)
        return Plan(tuple(open_plan.rows), encode, release, is_decode=is_decode, load=loads, keep=keep)

    def schedule_ahead(self, plan: Plan) -> Plan | None:
        """What `schedule` will give behind `plan`, whose tokens are not known yet, if none of them ends an answer.

        None where that is not certain, or needs the tokens: a prompt is not at its end, a request could be admitted, a
        block is missing, a row may yield several tokens. Requests that reach their last possible token with `plan` are
        left out. `update` takes both plans in their order; of the later one it passes over what the earlier has ended,
        and whoever has `void` rows in the earlier one leaves them out of the later one (`Plan.without`).
        """
        if self.max_yield > 1 or len(plan.rows) < len(self._running):
            return None
        places = {row.request: place for place, row in enumerate(plan.rows)}
        going_on: list[tuple[Request, int, int]] = []
        for request in self._running:
            place = places.get(request)
            if place is None or not plan.rows[place].max_yield:
                return None
            if len(request.output_token_ids) + 1 < self._records[request.id].max_output_tokens:
                row = plan.rows[place]
                going_on.append((request, row.start + row.num_tokens, place))
        if not going_on or len(going_on) > self.max_num_batched_tokens:
            return None
        if self._waiting and (len(going_on) < len(self._running) or self._could_admit()):
            return None
        size = self.pool.block_size
        rows = []
        for request, start, _ in going_on:
            if len(request.block_ids) * size <= start:
                if not self.pool.num_free:
                    return None
                request.block_ids += self.pool.allocate(1, after=request.block_ids[-1])
            rows.append(Row(request, start, 1, 1))
        continues = tuple(place for _, _, place in going_on)
        return Plan(tuple(rows), is_decode=True, keep=self._drained_keep(), continues=continues)

    def update(
        self, plan: Plan, token_ids: Sequence[Sequence[int]], missing: Collection[bytes] = ()
    ) -> list[tuple[Request, list[int]]]:
        """Record an executed plan: the new tokens of each row, 1 to `max_yield` (none where that is 0 or the request
        has ended meanwhile). `missing`: digests of media that could not be encoded; whoever reads them has failed.

        Returns the requests that got tokens, with those that count: the ones behind an end are dropped. Requests that
        it ends have their status, reasons and time set.
        """
        assert len(token_ids) == len(plan.rows), f"tokens of {len(token_ids)} rows for a plan of {len(plan.rows)}"
        now_s = time.monotonic()
        self._drop_staged()
        self._encoder.settle(missing)
        updated = []
        for (request, start, num_tokens, max_yield, *_), new in zip(plan.rows, token_ids, strict=True):
            if request.status is Status.FINISHED:
                continue
            assert (max_yield > 0) <= len(new) <= max_yield, (
                f"request '{request.id}': {len(new)} tokens of a row that may yield {max_yield}"
            )
            record = self._records[request.id]
            if record.loads:
                record.loads = ()
                self.store.release(request.prompt)
            kept, end = new, None
            output = request.output_token_ids
            if len(new) == 1 and new[0] not in record.end_ids and len(output) + 1 < record.max_output_tokens:
                output.append(new[0])  # nothing ends: the rule
                num_computed = request.num_computed_tokens = start + num_tokens
            else:
                kept, end = self._append(request, record, new)
                # Of what it yields all but the last has been computed in the same step.
                num_computed = request.num_computed_tokens = start + num_tokens + max(0, len(kept) - 1)
            if num_computed >= record.next_full_tokens:
                self._register_blocks(request, record)
            if record.media.holds_any:
                record.media.give_back(num_computed)
            if not kept:
                continue
            if request.first_token_s is None:
                request.first_token_s = now_s
            updated.append((request, kept))
            if end is not None:
                self.finish(request, *end)
        return updated

    def cancel(self, plan: Plan) -> None:
        """A plan has not been executed, or nobody knows how far: everything is as if it had not been made.

        Admitted requests stay admitted, with nothing computed; the next plans compute it. What it was to keep the next
        one keeps, as far as blocks still hold it: those that the plan took for its own rows do not.
        """
        self._drop_staged()
        for block in plan.keep:
            for block_id in self.pool.lookup([block.digest]):
                self._to_keep.setdefault(block.digest, block._replace(block_id=block_id))
        if plan.rows and plan.continues is None:
            self._encoder.undo()

    def forget(self) -> None:
        """Keep nothing of requests that have ended: no prefixes, no embeddings. For measuring the same thing again."""
        self.pool.forget_cached()
        self._encoder.forget_idle()

    def check(self) -> None:
        """Assert all invariants, between any two calls. O(blocks + requests); for tests."""
        pool = self.pool
        pool.check(request.block_ids for request in self._running)
        held_media = set()
        for request in self._running:
            record = self._records[request.id]
            assert request.status is Status.RUNNING and request not in self._waiting
            assert len(set(request.block_ids)) == len(request.block_ids) <= pool.num_blocks
            assert len(request.block_ids) >= pool.num_blocks_for(
                max(request.num_computed_tokens, request.num_tokens - 1)
            )
            assert request.num_computed_tokens < request.num_tokens
            held_media |= record.media.check(request.num_computed_tokens)
        for request in self._waiting:
            record = self._records[request.id]
            assert request.status is Status.WAITING and not request.num_computed_tokens
            assert not request.block_ids and not record.media.check(request.num_tokens) and not record.claimed
        assert self._records.keys() == {request.id for request in (*self._running, *self._waiting)}
        assert len(self._records) == len(self._running) + len(self._waiting)
        assert len(self._running) <= self.max_num_seqs
        self._encoder.check(held_media)

    def check_possible(self, request: Request) -> None:
        """UserError for a request that `add` would refuse."""
        num_prompt = len(request.prompt.token_ids)
        if request.id in self._records:
            raise UserError(f"request id '{request.id}' is in use by an unfinished request; choose another")
        if num_prompt == 0:
            raise UserError("the prompt is empty: at least 1 token is needed")
        if request.params.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {request.params.max_new_tokens}, at least 1 is needed")
        if num_prompt >= self.max_model_len:
            raise no_room(request.prompt, self.max_model_len)
        num_needed = self.pool.num_blocks_for(num_prompt + 1)
        if num_needed > self.pool.num_blocks:
            raise UserError(
                f"the prompt of {num_prompt} tokens needs {num_needed} KV blocks of {self.pool.block_size} tokens, "
                f"there are {self.pool.num_blocks}; shorten it, or give the KV cache more memory "
                "(scheduler_config.num_blocks or scheduler_config.memory_fraction)"
            )
        if not self.enable_chunked_prefill and num_prompt > self.max_num_batched_tokens:
            raise UserError(
                f"the prompt has {num_prompt} tokens, a step at most {self.max_num_batched_tokens} and chunked prefill "
                "is off; raise scheduler_config.max_num_batched_tokens or set scheduler_config.enable_chunked_prefill"
            )

    def _drained_keep(self) -> tuple[BlockToKeep, ...]:
        keep = tuple(self._to_keep.values())
        self._to_keep.clear()
        return keep

    def _schedule_decode(self, open_plan: _OpenPlan) -> list[Request]:
        """Rows of the running requests that go on token by token; returns the others."""
        candidates, under_way = [], []
        for request in self._running:
            num_output, start = len(request.output_token_ids), request.num_computed_tokens
            if num_output and len(request.prompt.token_ids) + num_output - start == 1:
                candidates.append((request, start))
            else:
                under_way.append(request)
        block_size, has_drafts, rows = self.pool.block_size, self.max_yield > 1, open_plan.rows
        num_preemptions = self.num_preemptions
        for place, (request, start) in enumerate(candidates):
            if not open_plan.budget_tokens:
                break
            # A request preempted by an earlier row is no longer running. Older rows are never preempted by later ones.
            if request.status is not Status.RUNNING:
                continue
            num_more = 0
            if len(request.block_ids) * block_size <= start and not self._grow(request, open_plan):
                continue
            if has_drafts:  # each row has its token before any row has a second one
                spare_tokens = max(0, open_plan.budget_tokens - (len(candidates) - place))
                num_more = self._grow_more(request, min(self.max_yield - 1, spare_tokens))
            rows.append(Row(request, start, 1, 1 + num_more))
            open_plan.budget_tokens -= 1 + num_more
        if self.num_preemptions > num_preemptions:
            under_way = [request for request in under_way if request.status is Status.RUNNING]
        return under_way

    def _grow_more(self, request: Request, wanted: int) -> int:
        """Slots for up to `wanted` tokens behind the next one, from free blocks only; how many there are."""
        if not wanted:
            return 0
        room_tokens = self._records[request.id].max_output_tokens - len(request.output_token_ids) - 1
        num_needed = self.pool.num_blocks_for(request.num_tokens + min(wanted, room_tokens)) - len(request.block_ids)
        # What is free beyond a block for each running request: drafts preempt nobody.
        num_free = self.pool.num_free - len(self._running)
        if 0 < num_needed <= num_free:
            request.block_ids += self.pool.allocate(num_needed, after=request.block_ids[-1])
        num_slots = len(request.block_ids) * self.pool.block_size - request.num_tokens
        return min(wanted, room_tokens, num_slots)

    def _grow(self, request: Request, open_plan: _OpenPlan) -> bool:
        """Give a decode row the block of its token, at the cost of the last admitted; False if that is itself."""
        while len(request.block_ids) * self.pool.block_size < request.num_tokens:
            if self.pool.num_free:
                request.block_ids += self.pool.allocate(1, after=request.block_ids[-1])
                continue
            victim = self._running[-1]
            assert victim is not request or len(self._running) > 1, "a request alone has outgrown the pool"
            self._preempt(victim)
            open_plan.admits = False
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self._give_back(request)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.status = Status.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.append_first(request)

    def _schedule_prefill(self, under_way: Sequence[Request], open_plan: _OpenPlan) -> None:
        for request in under_way:
            num_tokens = self._chunk_tokens(request, request.num_computed_tokens, open_plan)
            if num_tokens:
                self._add_prefill_row(request, num_tokens, open_plan)

    def _admit(self, open_plan: _OpenPlan, short_tokens: int | None = None) -> None:
        """Take in who waits, in order. `short_tokens`: only texts that fit whole into so many tokens of this step."""
        size = self.pool.block_size
        while open_plan.admits and open_plan.budget_tokens and self._waiting and len(self._running) < self.max_num_seqs:
            request = self._waiting.first
            record = self._records[request.id]
            cached = self._find_prefix(request, record)
            staged = self._find_staged(request, record, len(cached))
            num_cached_tokens = (len(cached) + len(staged)) * size
            if short_tokens is not None:  # media may have to wait for embeddings that those under way hold
                short_tokens -= request.num_tokens - num_cached_tokens
                if short_tokens < 0 or request.prompt.media:
                    return
            if self._is_worth_waiting(request, record, len(cached), staged, open_plan):
                return
            num_needed = self._missing_blocks(request, cached)
            if num_needed is None:
                return
            num_tokens = self._chunk_tokens(request, num_cached_tokens, open_plan)
            if not num_tokens:
                return
            self._take_blocks(request, record, cached, staged, num_needed)
            self._running.append(self._waiting.pop_first())
            request.status = Status.RUNNING
            request.num_computed_tokens = num_cached_tokens
            if not request.num_preemptions:
                request.num_cached_tokens = num_cached_tokens
            self._add_prefill_row(request, num_tokens, open_plan)

    def _could_admit(self) -> bool:
        """Whether whoever waits first would find a place and blocks."""
        if len(self._running) >= self.max_num_seqs:
            return False
        request = self._waiting.first
        return self._missing_blocks(request, self._find_prefix(request, self._records[request.id])) is not None

    def _missing_blocks(self, request: Request, cached: Sequence[int]) -> int | None:
        """How many blocks a request beside its cached ones needs to be admitted; None where these are not there."""
        num_needed = self.pool.num_blocks_for(request.num_tokens) - len(cached)
        # A block to spare for each running request, else the newcomer may be preempted a moment later.
        num_left = self.pool.num_free - self.pool.num_unreferenced(cached) - len(self._running)
        return num_needed if num_needed <= num_left else None

    def _find_prefix(self, request: Request, record: _Record) -> list[int]:
        """Blocks that hold the beginning of the request. The last token is always computed, for its logits; so is the
        whole prompt where its logprobs are wanted."""
        if not self.pool.enable_prefix_caching or request.awaits_prompt_logprobs:
            return []
        num_tokens = request.num_tokens - 1
        return self.pool.lookup(record.digests.extend(num_tokens)[: num_tokens // self.pool.block_size])

    def _find_staged(self, request: Request, record: _Record, num_cached: int) -> list[bytes]:
        """Digests of the blocks behind those in memory that the store has at hand."""
        if self.store is None or not self.pool.enable_prefix_caching or request.awaits_prompt_logprobs:
            return []
        staged, last = self.store.staged(request.prompt), (request.num_tokens - 1) // self.pool.block_size
        found = record.digests.digests[num_cached:last] if staged else []
        return list(itertools.takewhile(staged.__contains__, found))

    def _is_worth_waiting(
        self, request: Request, record: _Record, num_cached: int, staged: list[bytes], open_plan: _OpenPlan
    ) -> bool:
        """Whether this very step fills at least half of what the request still needs, or any block that it would load:
        then it starts one step later."""
        if request.awaits_prompt_logprobs:
            return False
        if not open_plan.in_flight.isdisjoint(staged):
            return True
        num_cached += len(staged)
        num_coming = 0
        for digest in record.digests.digests[num_cached:] if open_plan.in_flight else ():
            if digest not in open_plan.in_flight:
                break
            num_coming += 1
        num_remaining = request.num_tokens - num_cached * self.pool.block_size
        return 2 * num_coming * self.pool.block_size >= num_remaining

    def _take_blocks(
        self, request: Request, record: _Record, cached: list[int], staged: list[bytes], num_needed: int
    ) -> None:
        pool = self.pool
        num_final_blocks = pool.num_blocks_for(len(request.prompt.token_ids) + record.max_output_tokens)
        room = max(0, num_final_blocks - pool.num_blocks_for(request.num_tokens))
        pool.acquire(cached)
        fresh = pool.allocate(num_needed, after=cached[-1] if cached else None, room=room)
        request.block_ids = cached + fresh
        record.claimed = pool.claim(fresh[-1] + 1, room)
        record.num_registered_blocks = len(cached)
        record.next_full_tokens = (len(cached) + 1) * pool.block_size
        if self.store is not None and pool.enable_prefix_caching:
            record.loads = tuple(map(BlockToLoad, fresh, staged))
            self._offer(request, record, range(len(cached)))  # what the store has lost, or never had
            if not staged:
                self.store.release(request.prompt)
            if not request.num_preemptions:
                self.num_store_queries += request.num_tokens - len(cached) * pool.block_size
                self.num_store_hits += len(staged) * pool.block_size

    def _add_prefill_row(self, request: Request, num_tokens: int, open_plan: _OpenPlan) -> None:
        start = request.num_computed_tokens
        end = start + num_tokens
        is_last = int(end == request.num_tokens)
        record = self._records[request.id]
        open_plan.rows.append(Row(request, start, num_tokens, is_last, _scored(request, start, end)))
        open_plan.budget_tokens -= num_tokens
        open_plan.loads += record.loads
        if self.pool.enable_prefix_caching:
            size = self.pool.block_size
            open_plan.in_flight.update(record.digests.extend(end)[start // size : end // size])
            open_plan.in_flight.update(load.digest for load in record.loads)

    def _chunk_tokens(self, request: Request, start: int, open_plan: _OpenPlan) -> int:
        """How many tokens from `start` on this step computes; takes the embeddings that they read."""
        remaining = request.num_tokens - start
        num_tokens = min(remaining, open_plan.budget_tokens)
        # What may be split is split throughout: a row begun must not wait for more than its next media.
        whole = not self.enable_chunked_prefill and request.num_tokens <= self.max_num_batched_tokens
        if num_tokens == 0 or (whole and num_tokens < remaining):
            return 0
        num_readable = self._records[request.id].media.take(start, num_tokens, whole, open_plan.takes_media)
        open_plan.takes_media &= num_readable == num_tokens
        return num_readable

    def _register_blocks(self, request: Request, record: _Record) -> None:
        num_full = request.num_computed_tokens // self.pool.block_size
        record.next_full_tokens = (num_full + 1) * self.pool.block_size
        if num_full <= record.num_registered_blocks or not self.pool.enable_prefix_caching:
            return
        digests = record.digests.extend(request.num_computed_tokens)
        for index in range(record.num_registered_blocks, num_full):
            self.pool.register(request.block_ids[index], digests[index])
        if self.store is not None:
            self._offer(request, record, range(record.num_registered_blocks, num_full))
        record.num_registered_blocks = num_full

    def _offer(self, request: Request, record: _Record, places: range) -> None:
        """Have the next plan keep those of a request's full blocks that the store has not."""
        digests = record.digests.digests
        for place in places:
            if digests[place] not in self._to_keep and self.store.wants(digests[place]):
                parent = digests[place - 1] if place else b""
                self._to_keep[digests[place]] = BlockToKeep(request.block_ids[place], digests[place], parent, place)

    def _append(
        self, request: Request, record: _Record, token_ids: Sequence[int]
    ) -> tuple[list[int], tuple[FinishReason, int | None] | None]:
        """Take the new tokens up to the one that ends the answer; returns those taken, and why it ends if it does."""
        kept: list[int] = []
        for token_id in token_ids:
            kept.append(int(token_id))
            request.output_token_ids.append(kept[-1])
            end = self._end_of(request, record)
            if end is not None:
                return kept, end
        return kept, None

    def _end_of(self, request: Request, record: _Record) -> tuple[FinishReason, int | None] | None:
        """Why the answer ends with its last token: EOS, stop ids, and the lengths that `add` has put together."""
        token_id, num_output = request.output_token_ids[-1], len(request.output_token_ids)
        params = request.params
        if num_output >= params.min_new_tokens and token_id in record.end_ids:
            if token_id in params.stop_token_ids:
                return FinishReason.STOP, token_id
            return FinishReason.STOP, None
        return (FinishReason.LENGTH, None) if num_output >= record.max_output_tokens else None

    def _end_ids(self, params: SamplingParams) -> frozenset[int]:
        """Of EOS and stop ids those that end an answer."""
        if not params.stop_token_ids and not params.ignore_eos:
            return self.eos_token_ids
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)

    def _give_back(self, request: Request) -> None:
        """End all that a request holds."""
        record = self._records[request.id]
        self.pool.release(request.block_ids)
        self.pool.unclaim(record.claimed)
        record.media.give_back(request.num_tokens)
        record.claimed = range(0)
        record.loads = ()
        record.num_registered_blocks = record.next_full_tokens = 0

    def _drop_staged(self) -> None:
        """What is at hand for requests that have ended before their first token; others may have the same prompt."""
        for prompt in self._leaving:
            if not any(each.request.prompt is prompt for each in self._records.values()):
                self.store.drop(prompt)
        self._leaving.clear()


def _scored(request: Request, start: int, end: int) -> range:
    """Of the tokens [start, end) those whose logits give the next of the prompt logprobs that the request awaits."""
    if not request.awaits_prompt_logprobs:
        return range(0)
    # The logits of a token judge the one behind it; what was known before a preemption is not asked for again.
    return range(max(start, len(request.prompt_logprobs) - 1), min(end, len(request.prompt.token_ids) - 1))


def no_room(prompt: Prompt, max_model_len: int, where: str | None = None) -> UserError:
    """Of a prompt that leaves no room for an answer. `where`: the request's field that holds it."""
    num_prompt = len(prompt.token_ids)
    return UserError(
        f"maximum context length is {max_model_len} tokens, requested {num_prompt + 1} or more: the "
        f"prompt has {num_prompt} tokens and leaves no room for an answer; {_what_shortens(prompt)}, "
        "or raise scheduler_config.max_model_len",
        where=where,
    )


def _what_shortens(prompt: Prompt) -> str:
    """What to do about a prompt that is too long: the keys that bound what most of its tokens are."""
    num_of = {"image": 0, "video": 0}
    for item in prompt.media:
        num_of[item.kind] += item.num_tokens
    advice = []
    if num_of["video"]:
        advice.append(
            f"{num_of['video']} tokens are of videos: lower data_config.video_max_pixels, or fps or max_frames"
        )
    if num_of["image"]:
        advice.append(f"{num_of['image']} tokens are of pictures: lower data_config.max_pixels")
    if len(prompt.token_ids) - sum(num_of.values()) > max(num_of.values()):
        advice.append("shorten its text")
    return "; ".join(advice)
