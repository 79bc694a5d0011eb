"""Executes a plan: encodes media, gathers the step's inputs on the host, runs the model, samples.

A step that fails is computed again row by row, so that only those rows fail that fail alone. With other ranks in the
same step that cannot be: there a fault is raised, and ends the job.
Knows no scheduling policy and no text. One runner drives one model on one device.
Legend: T tokens of the step, M visual tokens of a media item, n hidden size.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from executor.checkpoint.settings import PixelSettings
from executor.device.ops import KVLayer, Ops
from executor.engine.ahead import Launched, TokensAhead
from executor.engine.decode_inputs import DecodeInputs
from executor.engine.disk_cache.cache import DiskCache
from executor.engine.encode import encode_items
from executor.engine.graphs import DecodeGraphs
from executor.engine.logprobs import PromptScores
from executor.engine.places import Drafts
from executor.engine.profile import Profile
from executor.engine.replica import Replica
from executor.engine.results import StepResult, result_of, verified
from executor.engine.sampler import Sampled, Sampler
from executor.engine.speculation.speculator import Speculator
from executor.engine.stages import Stage, StageClock
from executor.engine.step import ModelStep, Visual
from executor.recipe.peak import ENCODE_TOKENS, SCORED_ROWS
from executor.schedule.plan import Plan, Row
from executor.schedule.request import MediaItem, Request

logger = logging.getLogger(__name__)

FAULTS = (RuntimeError, MemoryError, ValueError, ArithmeticError, LookupError)
"""What a request can bring about: a kernel's refusal, lack of memory, numbers out of range. An AssertionError is not
among them: a defect of ours is nobody's request's."""


@dataclass
class _HostInputs:
    """A step's inputs while they are gathered."""

    token_ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [3, T]
    slots: np.ndarray  # int64 [T]
    select: list[int] = field(default_factory=list)  # tokens whose logits give a row's new token
    scored: list[int] = field(default_factory=list)  # tokens whose logits judge the prompt's next one
    visual_places: list[np.ndarray] = field(default_factory=list)
    visual_features: list[Tensor] = field(default_factory=list)  # each [k, 1 + taps, n]


class Runner:
    """One rank's part of the model, its KV cache and the embeddings of encoded media.

    A replica's leader calls `execute`, and `close` after its last plan; its other ranks `follow`.
    """

    def __init__(
        self,
        model: nn.Module,
        device: Ops,
        kv: list[KVLayer],
        block_size: int,
        sampler: Sampler,
        pixel_format: PixelSettings,
        dtype: torch.dtype,
        replica: Replica,
    ) -> None:
        self.model = model
        self.step = ModelStep(model, kv, block_size, dtype)
        self.graphs: DecodeGraphs | None = None  # set by whoever captures them
        self.device = device
        self.kv = kv
        self.block_size = block_size
        self.sampler = sampler
        self.pixel_format = pixel_format
        self.dtype = dtype
        self.replica = replica
        self.encode_tokens = ENCODE_TOKENS  # visual tokens of one pass of the encoder
        self.features: dict[bytes, Tensor] = {}  # media digest -> [M, 1 + taps, n]
        self.meanwhile: Callable[[], None] | None = None  # called when the model is to compute, maybe more than once
        self.clock = StageClock()
        self.profile: Profile | None = None  # set by whoever wants one
        self.speculator: Speculator | None = None  # of a leader, set by whoever wants drafts
        self.disk_cache: DiskCache | None = None  # set by whoever has one
        self.decode_inputs = DecodeInputs(device, block_size)
        self.ahead = TokensAhead(device, sampler, replica)
        self._has_assisted = self._has_dismissed = False

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult:
        """One step. A plan without rows is a step of other replicas that share this one's experts, if they have one,
        or hands blocks to the cache on disk.

        Raises what a step of several ranks raises, and defects of ours: nothing is known then of what was done.
        """
        started_s = time.perf_counter()
        if self.speculator is not None:
            with self.clock.stage("draft"):
                plan = self.speculator.extended(plan)
        plan = self.replica.lead(plan, self.graphs)
        if plan is None:
            return StepResult([])
        if not plan.rows and not plan.padded_tokens:
            self.disk_cache.keep(plan.keep)
            return StepResult([])
        try:
            result = self._computed(plan)
            self._count(plan)
            if self.speculator is not None:
                self.speculator.measured(plan, time.perf_counter() - started_s)
            return result
        except FAULTS as error:
            if not self.replica.is_alone:
                raise
            return self._repeated(plan, error)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Queue a step's work. Its tokens stay on the device, where the next plan may take them (`Plan.continues`),
        unless choosing them needs tokens on the host: then it is `execute`, and has been waited for.

        `collect` its result, after those of the steps before it. Raises as `execute`; a plan that `continues` another
        is not computed again row by row, since the host does not know its tokens yet.
        """
        if not self.ahead.can_draw(plan):
            return Launched(plan, result=self.execute(plan))
        plan = self.replica.lead(plan, self.graphs)
        try:
            logits = self.forward(plan)
            with self.clock.stage("sampling"):
                drawn = self.ahead.draw(plan, logits)
        except FAULTS as error:
            if plan.continues is not None or not self.replica.is_alone:
                raise
            return Launched(plan, result=self._repeated(plan, error))
        self._count(plan)
        return Launched(plan, drawn)

    @torch.inference_mode()
    def collect(self, step: Launched, *, is_last: bool) -> StepResult:
        """Wait for the tokens of a launched step. `is_last`: no other has been launched behind it."""
        if step.result is not None:
            return step.result
        booked = _stage_of(step.plan) if self.device.computes_behind else None
        try:
            with self.clock.stage("sampling", booked):
                sampled = step.drawn.read(in_place=is_last)
        except FAULTS as error:
            if not self.replica.is_alone:
                raise
            return replace(self._repeated(step.plan, error), void=step.void)
        void = sampled.void | step.void
        if not sampled.failures and not sampled.has_logprobs and not void:
            return StepResult([[token_id] for token_id in sampled.token_ids])
        result = result_of(step.plan, list(range(len(step.plan.rows))), sampled, {})
        return replace(result, void=void)

    def _repeated(self, plan: Plan, error: BaseException) -> StepResult:
        logger.warning("a step failed and is computed again row by row: %s", describe(error), exc_info=error)
        return replace(self._row_by_row(plan), is_repeated=True)

    def _count(self, plan: Plan) -> None:
        if not plan.rows:
            return
        if _stage_of(plan) == "prefill":
            self.clock.num_prefill_steps += 1
        else:
            self.clock.num_decode_steps += 1
        if self.profile is not None:
            self.profile.after_step()

    def _sample(
        self,
        plan: Plan,
        logits: Tensor,
        requests: Sequence[Request],
        drafts: Drafts | None = None,
    ) -> Sampled:
        # Of a device that computes behind the host's back, the step's tokens are waited for in here.
        booked = _stage_of(plan) if self.device.computes_behind else None
        with self.clock.stage("sampling", booked):
            return self.sampler.sample(logits, requests, drafts=drafts)

    def _computed(self, plan: Plan) -> StepResult:
        if plan.is_decode:
            sampled = self._sample(plan, self.forward(plan), [row.request for row in plan.rows])
            if not sampled.failures and not sampled.has_logprobs:
                return StepResult([[token_id] for token_id in sampled.token_ids])
            return result_of(plan, list(range(len(plan.rows))), sampled, {})
        scores = PromptScores(plan.rows) if any(row.scored for row in plan.rows) else None
        logits = self.forward(plan) if scores is None else self.forward(plan, scores)
        prompt_logprobs = {} if scores is None else scores.by_row()
        if any(row.draft_ids for row in plan.rows):
            rows = [row for row in plan.rows if row.max_yield]
            sampled = self._sample(plan, logits, [row.request for row in rows], [row.draft_ids for row in rows])
            result, chosen = verified(plan, sampled, prompt_logprobs)
            if self.speculator is not None:
                self.speculator.observe(plan, chosen, result.token_ids)
            return result
        yielding = [number for number, row in enumerate(plan.rows) if row.max_yield]
        sampled = self._sample(plan, logits, [plan.rows[number].request for number in yielding])
        return result_of(plan, yielding, sampled, prompt_logprobs)

    def _row_by_row(self, plan: Plan) -> StepResult:
        """The step again, each media item and each row by itself, with the blocks that it finds loaded, and without
        drafts.

        Rows write to their own slots: it harms nobody.
        """
        for digest in plan.release:
            self.features.pop(digest, None)
        unreadable: dict[bytes, str] = {}
        for item in plan.encode:
            try:
                self.encode([item])
            except FAULTS as error:
                unreadable[item.digest] = f"{item.source or f'the {item.kind}'} cannot be encoded: {describe(error)}"
        result = StepResult([], missing=frozenset(unreadable))
        for number, row in enumerate(plan.rows):
            alone, reason = StepResult([[]]), _unreadable(row, unreadable)
            try:
                if reason is None and not row.request.finished:  # its blocks may be others'
                    one, blocks = row._replace(draft_ids=()), set(row.request.block_ids)
                    load = tuple(each for each in plan.load if each.block_id in blocks)
                    alone = self._computed(
                        replace(plan, rows=(one,), encode=(), release=(), load=load, keep=(), continues=None)
                    )
                    reason = alone.failures.get(0)
            except FAULTS as error:
                reason = f"its step failed: {describe(error)}"
            result.token_ids.extend(alone.token_ids)
            if 0 in alone.logprobs:
                result.logprobs[number] = alone.logprobs[0]
            if 0 in alone.prompt_logprobs:
                result.prompt_logprobs[number] = alone.prompt_logprobs[0]
            if reason is not None:
                result.failures[number] = reason
        return result

    def assist(self) -> Iterator[None]:
        """After the last plan: help the other replicas until they have ended as well; yields between two steps."""
        nothing = Plan(())
        while not self._has_assisted:
            plan = self.replica.lead(nothing, self.graphs, more=False)
            if plan is None:
                self._has_assisted = True
                return
            self.forward(plan)
            yield

    def dismiss(self) -> None:
        """After `assist`: let this replica's other ranks go, and have written what is to outlive the process."""
        self.end_profile()
        if self.disk_cache is not None:
            self.disk_cache.flush()
        if self.replica.leads and not self._has_dismissed:
            self._has_dismissed = True
            self.replica.dismiss()

    def close(self) -> None:
        """`dismiss`, and drop all embeddings."""
        self.dismiss()
        self.features.clear()
        if self.disk_cache is not None:
            self.disk_cache.close()

    def follow(self) -> None:
        """Run the leader's plans until it ends."""
        for plan in self.replica.follow():
            self.begin_profile()
            self.forward(plan)
            self._count(plan)
        self.end_profile()

    def begin_profile(self) -> None:
        """Before a step, outside all stages, by its thread. Nothing where no profile is wanted, or no more."""
        if self.profile is not None:
            self.profile.begin()

    def hold_profile(self, is_held: bool) -> None:
        """While it is held nothing is recorded: of a warm-up, before the engine is used."""
        if self.profile is not None:
            self.profile.is_held = is_held

    def end_profile(self) -> None:
        """Write what has been recorded; by the thread of the steps, when there will be no more."""
        if self.profile is not None:
            self.profile.end()

    def compute(self, plan: Plan) -> Tensor:
        """`forward`, of a runner that takes part in no other rank's steps: in a graph where there is one for it."""
        assert self.replica.is_alone, "ranks in step agree first: execute"
        return self.forward(self.replica.lead(plan, self.graphs))

    @torch.inference_mode()
    def forward(self, plan: Plan, scores: PromptScores | None = None) -> Tensor:
        """Logits of the rows that yield a token, fp32 [R, V]. Those of the prompt tokens that a plan scores go to
        `scores`; every rank computes its part of them."""
        if plan.keep:
            self.disk_cache.keep(plan.keep)
        if plan.load:
            self.disk_cache.load(plan.load)
        for digest in plan.release:
            self.features.pop(digest, None)
        if plan.encode:
            self._tell_meanwhile()
            with self.clock.stage("vision"):
                self.encode(plan.encode)
        token_ids = self.ahead.take(plan)
        if plan.graph is not None:
            computation = partial(self.graphs, plan.rows, plan.graph, token_ids)
        elif not plan.rows:
            with self.clock.stage("decode"):
                self.model.help(plan.padded_tokens)
            return torch.empty(0, self.model.config.text.vocab_size)
        else:
            inputs = self.decode_inputs(plan.rows, token_ids) if plan.is_decode else self._inputs(plan.rows)
            computation = partial(self._eager, plan, inputs, scores)
        if not self.device.computes_behind:
            self._tell_meanwhile()
        with self.clock.stage(_stage_of(plan)):
            logits = computation()
        if self.device.computes_behind:  # Python's lock is free when all is launched
            self._tell_meanwhile()
        return logits

    def _eager(self, plan: Plan, inputs: tuple[Any, ...], scores: PromptScores | None) -> Tensor:
        num_scored = 0 if plan.is_decode else sum(len(row.scored) for row in plan.rows)
        if not num_scored:
            return self.step(*inputs, plan.padded_tokens)
        hidden = self.step.hidden(*inputs, plan.padded_tokens)
        num_yielding = len(hidden) - num_scored
        for part in hidden[num_yielding:].split(SCORED_ROWS):
            logits = self.model.lm_head(part)
            if scores is not None:
                scores.add(logits)
        return self.model.lm_head(hidden[:num_yielding])

    def _tell_meanwhile(self) -> None:
        if self.meanwhile is not None:
            self.meanwhile()

    @torch.inference_mode()
    def encode(self, media: Sequence[MediaItem]) -> None:
        """Encode all items, those of this rank, and keep the embeddings of all, each item's in storage of its own.

        Those that the cache on disk has at hand are taken from there.
        """
        media = [item for item in media if not self._recall(item)]
        group, owners = self.replica.parallel.pictures, self.replica.owners(media)
        local = [item for item, owner in zip(media, owners, strict=True) if owner == group.rank]
        encoded = iter(
            encode_items(self.model, local, self.pixel_format, self.dtype, self.device.device, self.encode_tokens)
        )
        width = self.model.config.text.hidden_size
        for item, owner in zip(media, owners, strict=True):
            if owner == group.rank:
                features = next(encoded)
            else:
                shape = item.num_tokens, 1 + self.model.num_taps, width
                features = torch.empty(shape, dtype=self.dtype, device=self.device.device)
            self.features[item.digest] = group.broadcast(features, owner)
            if self.disk_cache is not None:
                self.disk_cache.keep_features(item, self.features[item.digest])

    def _recall(self, item: MediaItem) -> bool:
        features = None if self.disk_cache is None else self.disk_cache.features(item)
        if features is None:
            return False
        self.features[item.digest] = features
        return True

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that has ended."""
        self.sampler.forget(request.id)
        self.forget_rows()
        self.replica.forget(request)
        if self.speculator is not None:
            self.speculator.forget(request)

    def forget_rows(self) -> None:
        """The next decode step goes on from none before it: a request has ended, or may have other blocks now."""
        self.decode_inputs.forget()
        if self.graphs is not None:
            self.graphs.forget()

    def _inputs(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Any, Tensor, Visual | None]:
        """The arguments of ModelStep."""
        self.forget_rows()
        host = self._gather(rows)
        to = self.device.device
        visual = None
        if host.visual_places:
            index = torch.from_numpy(np.concatenate(host.visual_places)).to(to)
            visual = Visual(index, torch.cat(host.visual_features))
        attention = self.device.prepare_attention(
            [row.num_inputs for row in rows],
            [row.start + row.num_inputs for row in rows],
            [row.request.block_ids for row in rows],
            self.block_size,
        )
        token_ids, positions = (torch.from_numpy(x).to(to) for x in (host.token_ids, host.positions))
        slots = torch.from_numpy(host.slots).to(self.device.slot_dtype).to(to)
        select = torch.tensor(host.select + host.scored, dtype=torch.int64, device=to)
        return token_ids, positions, slots, attention, select, visual

    def _gather(self, rows: Sequence[Row]) -> _HostInputs:
        total = sum(row.num_inputs for row in rows)
        host = _HostInputs(
            np.empty(total, dtype=np.int64), np.empty((3, total), dtype=np.int64), np.empty(total, dtype=np.int64)
        )
        num_rows, at = self._gather_decode(host, rows)
        for row in rows[num_rows:]:
            end = at + row.num_inputs
            host.token_ids[at : at + row.num_tokens] = row.request.token_ids(row.start, row.start + row.num_tokens)
            host.token_ids[at + row.num_tokens : end] = row.draft_ids
            host.positions[:, at:end] = _positions(row)
            host.slots[at:end] = self._slots(row)
            if row.start < len(row.request.prompt.token_ids):
                self._add_visual(host, row, at)
            if row.max_yield:
                host.select += range(end - 1 - len(row.draft_ids), end)
            host.scored += [at + place - row.start for place in row.scored]
            at = end
        return host

    def _gather_decode(self, host: _HostInputs, rows: Sequence[Row]) -> tuple[int, int]:
        """The rows in front that have one token, which the answer ended with, and drafts behind it; how many rows these
        are, and tokens."""
        size = self.block_size
        token_ids: list[int] = []
        starts, counts, deltas, blocks, num_blocks = [], [], [], [], []
        for request, start, num_tokens, max_yield, _, draft_ids in rows:
            prompt, output = request.prompt, request.output_token_ids
            if num_tokens != 1 or not max_yield or start + 1 != len(prompt.token_ids) + len(output) or not output:
                break
            token_ids.append(output[-1])
            token_ids += draft_ids
            starts.append(start)
            counts.append(1 + len(draft_ids))
            deltas.append(prompt.position_delta)
            of_row = request.block_ids[start // size : (start + len(draft_ids)) // size + 1]
            blocks += of_row
            num_blocks.append(len(of_row))
        total = len(token_ids)
        if not total:
            return 0, 0
        # Of each token the number of its row: then all of it is arithmetic on arrays.
        starts, counts = np.array(starts), np.array(counts)
        row_of = np.repeat(np.arange(len(starts)), counts)
        places = np.arange(total) + (starts - np.cumsum(counts) + counts)[row_of]
        first_block = np.cumsum(num_blocks) - num_blocks - starts // size
        host.token_ids[:total], host.positions[:, :total] = token_ids, places + np.array(deltas)[row_of]
        host.slots[:total] = np.array(blocks)[places // size + first_block[row_of]] * size + places % size
        host.select.extend(range(total))
        return len(starts), total

    def _slots(self, row: Row) -> np.ndarray | int:
        if row.num_inputs == 1:
            return row.request.block_ids[row.start // self.block_size] * self.block_size + row.start % self.block_size
        places = np.arange(row.start, row.start + row.num_inputs)
        first = row.start // self.block_size
        blocks = np.asarray(row.request.block_ids[first : places[-1] // self.block_size + 1], dtype=np.int64)
        return blocks[places // self.block_size - first] * self.block_size + places % self.block_size

    def _add_visual(self, host: _HostInputs, row: Row, at: int) -> None:
        """Where the row's visual tokens stand in the step, and the embeddings that go there."""
        stop = row.start + row.num_tokens
        prompt = row.request.prompt
        for span in prompt.spans:
            if span.start >= stop:
                break
            low, high = max(span.start, row.start), min(span.start + span.num_tokens, stop)
            if low >= high:
                continue
            host.visual_places.append(np.arange(low, high) - row.start + at)
            first = low - span.start + span.offset
            features = self.features[prompt.media[span.media_index].digest]
            host.visual_features.append(features[first : first + high - low])


def describe(error: BaseException) -> str:
    """An exception in one line, for people."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _stage_of(plan: Plan) -> Stage:
    """The stage of the text model in this step."""
    is_longer = plan.rows and plan.rows[-1].num_tokens > 1  # the longer rows come last
    return "prefill" if is_longer else "decode"


def _unreadable(row: Row, reasons: dict[bytes, str]) -> str | None:
    """Why the row cannot be computed, where it reads media that are in `reasons`."""
    prompt, stop = row.request.prompt, row.start + row.num_tokens
    for span in prompt.spans:
        digest = prompt.media[span.media_index].digest
        if digest in reasons and span.start < stop and span.start + span.num_tokens > row.start:
            return reasons[digest]
    return None


def _positions(row: Row) -> np.ndarray | int:
    """M-RoPE positions [3, num_tokens] of the row, or one number where all three axes and tokens share it."""
    prompt = row.request.prompt
    num_prompt = len(prompt.token_ids)
    stop = row.start + row.num_inputs
    if row.start >= num_prompt:
        if row.num_inputs == 1:
            return row.start + prompt.position_delta
        return np.arange(row.start, stop) + prompt.position_delta
    known = prompt.positions[:, row.start : stop]
    if stop <= num_prompt:
        return known
    later = np.broadcast_to(np.arange(num_prompt, stop) + prompt.position_delta, (3, stop - num_prompt))
    return np.concatenate((known, later), axis=1)
