"""Drafts of a smaller model of the same family, which the replica's leader runs by itself beside the target.

The draft model has a KV cache of its own, with as many blocks of the same size, and keeps a request's keys in the
blocks that the scheduler gave the request: block tables, prefix caching and preemption need no second bookkeeping.
It computes nothing until drafts are wanted. Then it first computes what it lacks of the request, whatever the reason (a
new prompt, a prefix that was found, a preemption, drafts that were off for a while), in one step for all requests, and
goes on from there token by token.
Invariants: it attends only to what it has computed itself, so that nothing stale is read; whatever it does, or cannot
do, decides how many drafts there are and nothing else. The noise of a draft is that of the target's token (seed,
position), so that sampled drafts agree where the models do.
Knows no ranks: followers wait for the leader's plan meanwhile.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from executor.engine.runner import FAULTS, Runner, describe
from executor.engine.speculation.speculator import Proposer
from executor.schedule.plan import Plan, Row
from executor.schedule.prefix_cache import BlockDigests
from executor.schedule.request import MediaItem, Request

logger = logging.getLogger(__name__)

CATCH_UP_SHARE = 64
"""Tokens that the draft model first computes of a request for each token that its answer may still have. Beyond that
drafts come too late to pay: a prompt's token costs it some hundredths of what an answer's token costs the target."""


class DraftProposer(Proposer):
    """What the draft model expects to come next.

    `runner`: of the draft model, over a cache of `num_blocks` blocks, alone (no ranks, no speculator of its own).
    `vocab_size`: of the target; ids that only one of the two models has pad its vocabulary. `step_tokens`: of a step of
    the draft model at most, as of the target's. `shares_blocks`: whether requests may have blocks in common.
    `end_ids`: tokens that end an answer.
    """

    is_free = False

    def __init__(
        self,
        runner: Runner,
        num_blocks: int,
        *,
        vocab_size: int,
        step_tokens: int,
        shares_blocks: bool,
        end_ids: Collection[int] = (),
    ) -> None:
        assert runner.replica.is_alone and runner.speculator is None, "a draft model runs on one rank, without drafts"
        self.runner = runner
        self.vocab_size = min(vocab_size, runner.model.config.text.vocab_size)  # what both models have
        self.knows_all = self.vocab_size == vocab_size
        self.step_tokens = step_tokens
        self.end_ids = frozenset(end_ids)
        self._computed = ComputedBlocks(num_blocks, runner.block_size) if shares_blocks else None
        self._shadows: dict[str, _Shadow] = {}

    def propose(self, plan: Plan, wanted: Sequence[int]) -> list[tuple[int, ...]]:
        self.is_catching_up = False
        shadows = [self._shadow_of(row) if count else None for row, count in zip(plan.rows, wanted, strict=True)]
        active = [shadow for shadow in shadows if shadow is not None and not shadow.is_barred]
        for shadow, count in zip(shadows, wanted, strict=True):
            if shadow is not None:
                shadow.num_wanted = count
        if not active:
            self.runner.features.clear()
            return [()] * len(plan.rows)
        try:
            self._draft(active)
        except FAULTS as error:
            logger.warning(
                "the draft model's step failed, and %d requests go on without drafts: %s", len(active), describe(error),
                exc_info=True,
            )  # fmt: skip
            for shadow in active:
                shadow.bar()
        return [() if shadow is None else shadow.draft_ids for shadow in shadows]

    def forget(self, request: Request) -> None:
        shadow = self._shadows.pop(request.id, None)
        if shadow is not None:
            self._settle(shadow, request)
            self.runner.forget(shadow.request)
        if not self._shadows:
            self.runner.features.clear()

    def _shadow_of(self, row: Row) -> "_Shadow":
        """The request as the draft model sees it, brought up to date."""
        request = row.request
        shadow = self._shadows.get(request.id)
        if shadow is None:
            shadow = self._shadows[request.id] = _Shadow.of(
                request, self.end_ids, self.runner.block_size, self.vocab_size
            )
            shadow.is_barred = not self._knows(request.prompt.token_ids)
        if not self._settle(shadow, request):
            shadow.request.block_ids = request.block_ids
            shadow.num_computed = 0
            if self._computed is not None:
                shadow.num_computed = self._computed.count(request.block_ids, shadow.digests, row.start)
            shadow.num_told = shadow.num_computed
            self.runner.decode_inputs.forget()
        return shadow

    def _knows(self, token_ids: Sequence[int]) -> bool:
        """Whether the draft model has all these tokens. What pads a vocabulary is hardly ever chosen or asked with."""
        return self.knows_all or max(token_ids) < self.vocab_size

    def _settle(self, shadow: "_Shadow", request: Request) -> bool:
        """Keep what the target has chosen of what was drafted; whether the request is still where it was."""
        new, num_wrong = shadow.settle(request.output_token_ids)
        if num_wrong and request.params.needs_history:
            self.runner.sampler.penalties.forget(request.id)  # which have counted them
        if new and not self._knows(new):
            shadow.bar()
        if shadow.request.block_ids is not request.block_ids:  # a new request, or preempted since
            return False
        self._tell(shadow)
        return True

    def _tell(self, shadow: "_Shadow") -> None:
        """Whose beginning is the same may use what has been computed of the request."""
        if self._computed is not None:
            self._computed.fill(shadow.request.block_ids, shadow.digests, shadow.num_told, shadow.num_computed)
            shadow.num_told = shadow.num_computed

    def _draft(self, shadows: Sequence["_Shadow"]) -> None:
        """Give each of these its drafts."""
        rows = self._catch_up_rows(shadows)
        if not rows:
            return
        active = [shadow for shadow, row in rows if row.max_yield]
        self.is_catching_up = rows[-1][1].num_tokens > 2  # in between it lacks one token, or two where all were right
        if self._computed is not None:
            for shadow, row in rows:
                stop = row.start + row.num_tokens + shadow.num_wanted
                self._computed.begin(shadow.request.block_ids, row.start, stop)
        logits = self._caught_up([row for _, row in rows])
        for shadow, row in rows:
            shadow.num_computed = row.start + row.num_tokens
            self._tell(shadow)
        # A step of one token for each row is a graph where there are graphs: then every draft is computed, also the
        # last one of a row, which the next step would have to make up for in a step that is none.
        computes_all = self.runner.graphs is not None
        while active:
            going, done = self._chosen(active, logits)
            fed = going + done if computes_all else going
            if not fed:
                break
            rows = [Row(each.request, each.request.num_tokens - 1, 1, 1) for each in fed]
            logits = self.runner.compute(Plan(tuple(rows), is_decode=True))
            for shadow in fed:
                shadow.num_computed += 1
            active = going

    def _chosen(self, shadows: Sequence["_Shadow"], logits: Tensor) -> tuple[list["_Shadow"], list["_Shadow"]]:
        """Append the draft that each of the first rows of `logits` gives; who goes on, and who has enough."""
        requests = [shadow.request for shadow in shadows]
        sampled = self.runner.sampler.sample(logits[: len(shadows), : self.vocab_size], requests)
        going, done = [], []
        for place, (shadow, token_id) in enumerate(zip(shadows, sampled.token_ids, strict=True)):
            if place in sampled.failures:
                logger.warning("request '%s' goes on without drafts: %s", shadow.request.id, sampled.failures[place])
                shadow.bar()
                continue
            shadow.request.output_token_ids.append(token_id)
            if token_id in shadow.end_ids:
                continue
            (going if len(shadow.draft_ids) < shadow.num_wanted else done).append(shadow)
        return going, done

    def _catch_up_rows(self, shadows: Sequence["_Shadow"]) -> list[tuple["_Shadow", Row]]:
        """What is computed of each request before its first draft: all that is lacking, as far as a step takes it.

        Rows of one token come first, as in every plan. Nothing of a request whose drafts would come too late.
        """
        rows, room_tokens = [], self.step_tokens
        for shadow in sorted(shadows, key=lambda shadow: shadow.num_lacking):
            lacking = shadow.num_lacking
            if lacking > CATCH_UP_SHARE * shadow.num_left:
                continue
            num_tokens = min(lacking, room_tokens)
            if num_tokens < min(lacking, 2):
                break
            room_tokens -= num_tokens
            rows.append((shadow, Row(shadow.request, shadow.num_computed, num_tokens, int(num_tokens == lacking))))
        return rows

    def _caught_up(self, rows: Sequence[Row]) -> Tensor:
        """Logits of the rows that yield a draft [R, V]; media that the rows read are encoded before, and kept for as
        long as the next step reads on in them."""
        features = self.runner.features
        encode = {item.digest: item for row in rows for item in _media_of(row) if item.digest not in features}
        is_decode = rows[-1].num_tokens == 1
        logits = self.runner.compute(Plan(tuple(rows), tuple(encode.values()), is_decode=is_decode))
        if features:
            kept = {item.digest for row in rows if not row.max_yield for item in _media_of(row, ahead=True)}
            for digest in features.keys() - kept:
                del features[digest]
        return logits


class ComputedBlocks:
    """Of each block the digest of what the draft model's cache holds there, where it holds a block of it.

    A request finds there what others with its prefix have left, whatever has become of a block meanwhile: it counts
    where the digest is its own.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._held: list[bytes | None] = [None] * num_blocks

    def begin(self, block_ids: Sequence[int], start: int, stop: int) -> None:
        """Tokens [start, stop) of a request are about to be computed."""
        for block_id in block_ids[start // self.block_size : -(-stop // self.block_size)]:
            self._held[block_id] = None

    def fill(self, block_ids: Sequence[int], digests: BlockDigests, start: int, stop: int) -> None:
        """Tokens [start, stop) of a request have been computed, behind all before them."""
        first, last = start // self.block_size, stop // self.block_size
        if first < last:
            names = digests.extend(stop)
            for index in range(first, last):
                self._held[block_ids[index]] = names[index]

    def count(self, block_ids: Sequence[int], digests: BlockDigests, most: int) -> int:
        """How many of a request's first `most` tokens have been computed: those of whole blocks without a gap."""
        names, full = digests.extend(most), 0
        while full < most // self.block_size and self._held[block_ids[full]] == names[full]:
            full += 1
        return full * self.block_size


@dataclass(eq=False)
class _Shadow:
    """A request as the draft model sees it: the same prompt, blocks and noise, and drafts behind the answer.

    `num_computed`: tokens from the first on whose keys the draft's cache has, drafts included.
    """

    request: Request
    digests: BlockDigests
    num_new_tokens: int  # of the answer at most
    end_ids: frozenset[int]
    num_known: int = 0  # of its output tokens; behind them stand drafts
    num_computed: int = 0
    num_told: int = 0  # of these the ones that ComputedBlocks knows of
    num_wanted: int = 0
    is_barred: bool = False  # goes on without drafts

    @staticmethod
    def of(request: Request, end_ids: frozenset[int], block_size: int, vocab_size: int) -> "_Shadow":
        """All that decides about a token is as the request has it, but for its grammar, which drafts are held against
        later."""
        params = request.params
        allowed = params.allowed_token_ids
        chosen = replace(
            params,
            grammar=None,
            logprobs=None,
            prompt_logprobs=None,
            logit_bias=tuple(each for each in params.logit_bias if each[0] < vocab_size),
            allowed_token_ids=allowed and tuple(token_id for token_id in allowed if token_id < vocab_size),
        )
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else end_ids)
        shadow = Request(request.id, request.prompt, chosen, bad_words=request.bad_words)
        return _Shadow(shadow, BlockDigests(shadow, block_size), params.max_new_tokens, ends)

    @property
    def draft_ids(self) -> tuple[int, ...]:
        return tuple(self.request.output_token_ids[self.num_known :])

    @property
    def num_lacking(self) -> int:
        return self.request.num_tokens - self.num_computed

    @property
    def num_left(self) -> int:
        """Tokens that the answer may still have."""
        return self.num_new_tokens - self.num_known

    def bar(self) -> None:
        """No more drafts of this request, and none of this step."""
        self.is_barred = True
        del self.request.output_token_ids[self.num_known :]

    def settle(self, chosen: Sequence[int]) -> tuple[Sequence[int], int]:
        """Let the answer be what was chosen: the tokens of it that are new, and how many drafts were wrong."""
        held, before = self.request.output_token_ids, self.num_known
        same, num_held = min(before, len(chosen)), len(held)
        while same < min(num_held, len(chosen)) and held[same] == chosen[same]:
            same += 1
        # The last token is computed in any case, for its logits.
        self.num_computed = min(self.num_computed, len(self.request.prompt.token_ids) + min(same, len(chosen) - 1))
        held[same:] = chosen[same:]
        self.num_known = len(held)
        return chosen[before:], num_held - same


def _media_of(row: Row, ahead: bool = False) -> list[MediaItem]:
    """What the row reads of pictures and videos; `ahead`: what the tokens behind it read."""
    prompt, stop = row.request.prompt, row.start + row.num_tokens
    if row.start >= len(prompt.token_ids):
        return []
    if ahead:
        return [prompt.media[span.media_index] for span in prompt.spans if span.start + span.num_tokens > stop]
    return [
        prompt.media[span.media_index]
        for span in prompt.spans
        if span.start < stop and span.start + span.num_tokens > row.start
    ]
