"""Chooses the next token of every sampling row of a step from its logits.

Order and meaning follow transformers' `generate`: biases, repetition penalty, (presence and frequency penalty), tokens
that may not come (bad words, allowed tokens, minimum of new tokens, grammar), temperature, top-k, top-p, min-p.
Logprobs are those of the model itself, before any of it.
Invariant: a request's token depends on its own logits, parameters and seed only, never on the other rows of the batch.
Therefore randomness is a hash of (seed, position, candidate), and sums over candidates are taken in integers, where no
order of addition can matter.
The vocabulary is read once, for the maxima of its chunks; after that only the chunks are read that can hold the token.
The tokens are chosen where the logits are: `draw` queues that, and what it gives is `read` once, later maybe, when the
next step has been queued. The host looks again where filters leave more tokens than was guessed, or where a row failed.
Does not know models or the scheduler; end-of-sequence tokens are told to the constructor.
A request has several rows where drafts of its next tokens are verified: each is sampled as if the drafts before it had
been chosen, so that what is chosen behind right drafts is what would have been chosen without any.
Legend: R rows, N rows chosen in one way, V vocabulary padded to whole chunks, C chunks, K candidates of a row.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from executor.device.ops import Send
from executor.engine.filters import (
    CHUNK,
    Filters,
    Kind,
    chunk_maxima,
    likely_survivors,
    relative,
    survivors,
)
from executor.engine.logprobs import ChosenLogprobs, TokenLogprobs, token_logprobs
from executor.engine.masks import masked
from executor.engine.noise import (
    ROUGHNESS,
    gumbel_noise,
    least_bits,
    may_reach,
    mixed_seed,
    noise_keys,
    rough_noise,
)
from executor.engine.penalties import Penalties
from executor.engine.places import Drafts, Places
from executor.engine.speculation.verify import num_right
from executor.engine.token_rules import TokenRules
from executor.schedule.request import NO_SCORE_LEFT, Request, SamplingParams

_FAILED, _OPEN = -1, -2  # in place of a token id on its way to the host
_BLOCK = 256  # chunks whose noise is made at a time: it stays in the cache
_ROWS = 16  # rows of which every token's noise is there at a time
_FINALISTS = 16  # of a row, whose noise is then made exactly


@dataclass(frozen=True)
class Sampled:
    """One entry per row, in the order of the rows. A row that failed has token id -1 and no logprobs."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    failures: dict[int, str] = field(default_factory=dict)  # row -> why it has no token, and what to check
    void: frozenset[int] = frozenset()  # rows whose tokens are not known, since their logits are gone

    @property
    def has_logprobs(self) -> bool:
        return any(each is not None for each in self.logprobs)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a step that choose in the same way."""

    scores: torch.Tensor  # float32 [R, V], of all rows
    maxima: torch.Tensor  # [N, C], of these
    index: torch.Tensor  # int64 [N]: which they are
    filters: Filters
    keys: torch.Tensor  # int64 [N], of the noise


@dataclass(frozen=True)
class _Step:
    """What the tokens of one step are chosen from."""

    logits: torch.Tensor
    scores: torch.Tensor  # float32 [R, V], contiguous
    places: Places


class Drawn:
    """The tokens of a step's rows, chosen where the logits are, and on their way to the host."""

    def __init__(
        self, sampler: "Sampler", step: _Step, ids: torch.Tensor, faults: dict[int, str], judged: ChosenLogprobs | None
    ) -> None:
        self.ids = ids
        """int64 [R], on the device; below 0 where there is none."""
        self._sampler, self._step, self._faults, self._judged = sampler, step, faults, judged
        self._arrived = sampler.read_back(ids if judged is None else judged.packed)

    @torch.inference_mode()
    def read(self, *, in_place: bool = True) -> Sampled:
        """Wait for them. `in_place`: the logits are still there; else rows that must be looked at again are void."""
        host, judged = self._arrived(), self._judged
        if judged is None:
            token_ids = host.tolist()
            logprobs = [None] * len(token_ids)
        else:
            token_ids, logprobs = judged.read(host.numpy())
        if self._faults or min(token_ids) < 0:
            if not in_place:
                assert not self._faults, "rows with a grammar are not drawn ahead"
                return Sampled(token_ids, logprobs, void=self._sampler._noted_void(self._step, token_ids))
            return self._sampler._looked_again(self._step, token_ids, logprobs, self._faults)
        if judged is not None:
            _drop_behind_wrong(self._step.places, token_ids, logprobs)
        return Sampled(token_ids, logprobs)


class Sampler:
    """Samples rows; keeps the token counts of requests with penalties until `forget`.

    `dtype`: what the model computes in, from which logits that are not finite are explained. `reads_freely`: logits lie
    in host memory, and not only because a chip is emulated there, whose logits must stay on it; None: by `device`.
    `send`, `read_back`: the device's own (executor.device.ops).
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        eos_token_ids: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        reads_freely: bool | None = None,
        send: Send = torch.from_numpy,
        read_back: Callable[[torch.Tensor], Callable[[], torch.Tensor]] = lambda x: lambda: x,
    ) -> None:
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.reads_freely = self.device.type == "cpu" if reads_freely is None else reads_freely
        self.send, self.read_back = send, read_back
        self.penalties = Penalties(vocab_size, send)
        self.rules = TokenRules(vocab_size, send, eos_token_ids)
        # Requests that had void rows: from the first on more of their tokens are looked at, as long as that suffices.
        self._wide_ids: set[str] = set()
        self._late_ids: set[str] = set()  # and those for which it does not
        self._batch: _Batch | None = None
        self._numbers = torch.empty(0, dtype=torch.int64, device=self.device)

    def sample(
        self,
        logits: torch.Tensor,
        requests: Sequence[Request],
        num_tokens: Sequence[int] | None = None,
        drafts: Drafts | None = None,
    ) -> Sampled:
        """`draw`, and wait for it. No requests have no tokens."""
        if not requests:
            return Sampled([], [])
        return self.draw(logits, requests, num_tokens, drafts).read()

    def draws_ahead(self, requests: Sequence[Request]) -> bool:
        """Whether the tokens of these requests can be chosen before the host has read those before them."""
        batch = self._batch_of(requests)
        return not batch.needs_tokens and self._late_ids.isdisjoint(request.id for request in requests)

    @torch.inference_mode()
    def draw(
        self,
        logits: torch.Tensor,
        requests: Sequence[Request],
        num_tokens: Sequence[int] | None = None,
        drafts: Drafts | None = None,
        unread: torch.Tensor | None = None,
    ) -> Drawn:
        """logits [R, V]: of each request a row for what comes next and, with `drafts`, one behind each of its own.

        `num_tokens`: how many tokens, prompt included, come before what each request chooses first: the position of its
        noise. None: all that it has. `unread` int64 [R]: on the device, the last of these tokens, where the host does
        not know it yet (`draws_ahead`). While penalties and masks apply, float32 `logits` are changed in place;
        afterwards they are as they were. A row fails whose best logit is not finite or that has a NaN or +inf
        anywhere; the others are sampled. Single logits of -inf are tokens that the model rules out.
        Logprobs are found for the rows that count: those of a request behind its first wrong draft have none.
        """
        batch, places = self._batch_of(requests), Places(requests, num_tokens, drafts)
        assert logits.shape == (places.num_rows, self.vocab_size), f"{tuple(logits.shape)}, {places.num_rows} rows"
        scores = logits if logits.dtype == torch.float32 and logits.is_contiguous() else logits.float().contiguous()
        if self.vocab_size % CHUNK:
            scores = F.pad(scores, (0, -self.vocab_size % CHUNK), value=-math.inf)
        step = _Step(logits, scores, places)
        if batch.is_adjusted:
            with self.adjusted(scores, places, unread) as faults:
                ids = self._choose(step, batch)
        else:
            ids, faults = self._choose(step, batch), {}
        judged = None
        if batch.has_logprobs:
            wanted = batch.judged if drafts is None else _Judged.of(places, self.send)
            judged = ChosenLogprobs.of(logits, ids, wanted.index, wanted.rows, wanted.counts)
        return Drawn(self, step, ids, faults, judged)

    def _looked_again(
        self, step: _Step, token_ids: list[int], logprobs: list[TokenLogprobs | None], faults: dict[int, str]
    ) -> Sampled:
        """The tokens of rows that were left open, and why others have none."""
        places = step.places
        still_open = [row for row, token_id in enumerate(token_ids) if token_id == _OPEN]
        if still_open:
            with self.adjusted(step.scores, places):  # the host has read by now what was unread when they were drawn
                found = _draw_among_many(step, still_open, self.send).tolist()
            for row, token_id in zip(still_open, found, strict=True):
                token_ids[row] = token_id
            for request in places.requests:
                if request.finished:  # computed in vain
                    self.forget(request.id)
        failed = [row for row, token_id in enumerate(token_ids) if token_id == _FAILED]
        failures = {row: _reason(step.logits[row], places.num_before[row], self.dtype) for row in failed}
        for row in faults.keys() - failures.keys():
            token_ids[row], failures[row] = _FAILED, faults[row]
        if any(request.params.logprobs is not None for request in places.requests):
            logprobs = _logprobs(step.logits, token_ids, places)
        return Sampled(token_ids, logprobs, failures)

    def _noted_void(self, step: _Step, token_ids: list[int]) -> frozenset[int]:
        """The rows without a token, whose requests are drawn in another way from now on."""
        rows = frozenset(row for row, token_id in enumerate(token_ids) if token_id < 0)
        for row in rows:
            request = step.places.requests[row]
            if not request.finished:  # else computed in vain
                is_late = request.id in self._wide_ids or token_ids[row] == _FAILED
                (self._late_ids if is_late else self._wide_ids).add(request.id)
        self._batch = None
        return rows

    def _batch_of(self, requests: Sequence[Request]) -> "_Batch":
        """What these requests ask for: found once, and again when others stand in the step."""
        key = tuple(requests)
        if self._batch is None or self._batch.requests != key:
            self._batch = _Batch.of(key, self._wide_ids, self.send)
        return self._batch

    @contextmanager
    def adjusted(
        self, scores: torch.Tensor, places: Places, unread: torch.Tensor | None = None
    ) -> Iterator[dict[int, str]]:
        """`scores` float32 [R, V], contiguous, as tokens are chosen from them; inside the context only. `unread`: see
        `draw`.

        Gives the rows whose grammar has failed, and why.
        """
        with (
            self.rules.biased(scores, places),
            self.penalties.applied(scores, places, unread),
            self.rules.barred(scores, places),
            masked(scores, places) as faults,
        ):
            yield faults

    def forget(self, request_id: str) -> None:
        """Frees what is kept for a request that is finished; nothing happens when nothing is kept."""
        self.penalties.forget(request_id)
        self.rules.forget(request_id)
        self._wide_ids.discard(request_id)
        self._late_ids.discard(request_id)
        self._batch = None

    def check(self, live_ids: Collection[str]) -> None:
        """Asserts that nothing is kept for requests other than `live_ids`."""
        self.penalties.check(live_ids)
        stale = sorted(self.rules.kept_ids() - set(live_ids))
        assert not stale, f"biases and allowed tokens of requests that are gone: {stale}"
        noted = self._wide_ids | self._late_ids
        assert noted <= set(live_ids), f"void rows of requests that are gone: {noted - set(live_ids)}"

    def _choose(self, step: _Step, batch: "_Batch") -> torch.Tensor:
        """Each row's token id, int64 [R]; _FAILED, or _OPEN where more must be looked at."""
        scores, places, maxima = step.scores, step.places, chunk_maxima(step.scores)
        if batch.is_greedy:
            if self.reads_freely:
                return _best_on_host(scores, maxima)
            return _best_of_all(scores, maxima, self._first_numbers(len(scores)))
        ways = batch.ways if places.drafts is None else batch.ways.of_rows(places, self.send)
        keys = self.send(noise_keys(ways.seeds, np.asarray(places.num_before)[ways.order]))
        chosen, first = [], 0
        for way in ways.parts:
            own = maxima if len(ways.parts) == 1 else maxima[way.index]
            part = slice(first, first := first + len(way.index))
            choose = way.choose
            if choose is _draw_among_all and not self.reads_freely:
                choose = _draw_among_all_unread
            chosen.append(choose(_Rows(scores, own, way.index, way.filters, keys[part]), way.kind))
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)[ways.where]

    def _first_numbers(self, count: int) -> torch.Tensor:
        """0, 1, ... int64 [count] on the device."""
        if len(self._numbers) < count:
            self._numbers = torch.arange(2 * count, device=self.device)
        return self._numbers[:count]


@dataclass(frozen=True)
class _Way:
    """Rows that choose in one way."""

    choose: "Callable[[_Rows, Kind | None], torch.Tensor]"
    kind: Kind | None
    index: torch.Tensor  # int64 [N]: which they are
    filters: Filters


@dataclass(frozen=True)
class _Ways:
    """How each row of a step chooses: those of one way together."""

    parts: list[_Way]
    order: np.ndarray  # int64 [R]: the rows, one way's behind the other's
    where: torch.Tensor  # int64 [R]: where each row stands there
    seeds: np.ndarray  # uint64 [R], mixed, in that order

    @staticmethod
    def of(requests: Sequence[Request], wide_ids: Collection[str], send: Send) -> "_Ways":
        """Of a step with a row of each request. `wide_ids`: those of which more tokens are looked at than is usual."""
        numbers_of: dict[tuple[Callable, Kind | None], list[int]] = {}
        for number, request in enumerate(requests):
            numbers_of.setdefault(_way(request.params, request.id in wide_ids), []).append(number)
        parts, order = [], []
        for way, numbers in numbers_of.items():
            params = [requests[number].params for number in numbers]
            parts.append(_Way(*way, send(np.array(numbers)), Filters.of(params, send)))
            order += numbers
        seeds = [mixed_seed(requests[number].params.seed) for number in order]
        return _Ways(parts, np.array(order), send(np.argsort(order)), np.array(seeds, dtype=np.uint64))

    def of_rows(self, places: Places, send: Send) -> "_Ways":
        """The same of a step of these requests in which they have several rows each."""
        first = np.array(places.first)
        counts = np.diff(first)[self.order]
        entry = np.repeat(np.arange(len(counts)), counts)  # of each row the place of its request in `order`
        rows = np.arange(len(entry)) + (first[self.order] - np.cumsum(counts) + counts)[entry]
        begins = np.cumsum([0, *(len(way.index) for way in self.parts)])  # of each way in `order`
        ends = np.cumsum(counts)[begins[1:] - 1].tolist()
        sent = send(np.stack([rows, entry, np.argsort(rows)]))
        parts, begin = [], 0
        for way, first_entry, end in zip(self.parts, begins.tolist(), ends, strict=False):
            filters = way.filters.picked(sent[1, begin:end] - first_entry, entry[begin:end] - first_entry)
            parts.append(_Way(way.choose, way.kind, sent[0, begin:end], filters))
            begin = end
        return _Ways(parts, rows, sent[2], self.seeds[entry])


@dataclass(frozen=True)
class _Judged:
    """The rows whose tokens' logprobs are wanted."""

    index: torch.Tensor  # int64 [N]: which they are
    rows: list[int]
    counts: list[int]  # of the best of each

    @staticmethod
    def of(places: Places, send: Send) -> "_Judged":
        counts = [places.requests[number].params.logprobs for number in places.owner]
        rows = [row for row, count in enumerate(counts) if count is not None]
        return _Judged(send(np.array(rows)), rows, [counts[row] for row in rows])


@dataclass(frozen=True)
class _Batch:
    """What the requests of a step ask for, as long as they are the same, however many rows each of them has; `ways` and
    `judged` are of steps without drafts."""

    requests: tuple[Request, ...]
    ways: _Ways
    judged: _Judged | None
    is_greedy: bool
    is_adjusted: bool  # something is done to the scores of one
    needs_tokens: bool  # and depends on which tokens came before
    has_logprobs: bool

    @staticmethod
    def of(requests: tuple[Request, ...], wide_ids: Collection[str], send: Send) -> "_Batch":
        ways = _Ways.of(requests, wide_ids, send)
        has_logprobs = any(request.params.logprobs is not None for request in requests)
        return _Batch(
            requests,
            ways,
            _Judged.of(Places(requests), send) if has_logprobs else None,
            is_greedy=all(way.choose is _best for way in ways.parts),
            is_adjusted=any(_is_adjusted(request) for request in requests),
            needs_tokens=any(_needs_tokens(request) for request in requests),
            has_logprobs=has_logprobs,
        )


def _needs_tokens(request: Request) -> bool:
    return request.matcher is not None or request.bad_words is not None


def _is_adjusted(request: Request) -> bool:
    return request.params.adjusts_scores or request.matcher is not None or request.bad_words is not None


# Ways to choose: each gives the token ids int64 [N] of some rows, _FAILED where the best score is not finite.


def _way(params: SamplingParams, is_wide: bool) -> tuple[Callable[[_Rows, Kind | None], torch.Tensor], Kind | None]:
    if params.temperature == 0:
        return _best, None
    if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
        return _draw_among_few, Kind.of(params, is_wide)
    return _draw_among_all, None


def _best(rows: _Rows, kind: None = None) -> torch.Tensor:
    """The highest score, of equal ones the lowest id."""
    return _best_of_all(rows.scores, rows.maxima, rows.index)


def _best_of_all(scores: torch.Tensor, maxima: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    best, chunks = maxima.max(dim=-1)
    places = torch.add(chunks, index, alpha=maxima.shape[-1])
    inside = scores.view(-1, CHUNK).index_select(0, places).argmax(dim=-1)
    return inside.add_(chunks, alpha=CHUNK).masked_fill_((best.abs_() < math.inf).logical_not_(), _FAILED)


def _best_on_host(scores: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """`_best_of_all` where a call of numpy costs a fraction of one of torch: it is most of a small step's sampling."""
    highest, rows = maxima.numpy(), np.arange(len(maxima))
    chunks = highest.argmax(axis=1)
    inside = scores.numpy().reshape(*highest.shape, CHUNK)[rows, chunks].argmax(axis=1)
    ids = chunks * CHUNK + inside
    ids[~np.isfinite(highest[rows, chunks])] = _FAILED
    return torch.from_numpy(ids)


def _draw_among_few(rows: _Rows, kind: Kind) -> torch.Tensor:
    """Gumbel-max over what the filters leave; _OPEN where that is not all among the likeliest few."""
    ids, candidates, is_open = likely_survivors(rows.scores, rows.maxima, rows.index, rows.filters, kind)
    chosen = torch.where(is_open, _OPEN, _gumbel_max(ids, candidates, rows.filters, rows.keys))
    return torch.where(rows.maxima.amax(dim=-1).abs() < math.inf, chosen, _FAILED)


def _draw_among_many(step: _Step, rows: list[int], send: Send) -> torch.Tensor:
    """Gumbel-max over what the filters leave, however many these are."""
    places, scores = step.places, step.scores[send(np.array(rows))]
    params = [places.requests[places.owner[row]].params for row in rows]
    seeds = np.array([mixed_seed(each.seed) for each in params], dtype=np.uint64)
    keys = send(noise_keys(seeds, np.array([places.num_before[row] for row in rows])))
    filters = Filters.of(params, send)
    return _gumbel_max(*survivors(scores, filters), filters, keys)


def _gumbel_max(ids: torch.Tensor, candidates: torch.Tensor, filters: Filters, keys: torch.Tensor) -> torch.Tensor:
    # The filters keep a row's best, and put it first.
    distances = relative(candidates, candidates[:, :1], filters.temperature[:, None])
    winner = gumbel_noise(keys, ids).add_(distances).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, winner).squeeze(-1)


def _draw_among_all(rows: _Rows, kind: None = None) -> torch.Tensor:
    """Gumbel-max over the whole vocabulary.

    The best token and its noise are a bound that the winner reaches. In each chunk a token below the chunk's maximum
    needs so much noise for it that few have it: their bits tell, and only theirs become numbers.
    """
    scores, keys, temperature = rows.scores, rows.keys, rows.filters.temperature
    best, highest = _best(rows), rows.maxima.amax(dim=-1)
    sure = gumbel_noise(keys, best[:, None]).squeeze(-1)
    least = least_bits(sure[:, None] - relative(rows.maxima, highest[:, None], temperature[:, None]))
    owners, chunks = (least < 1 << 32).nonzero(as_tuple=True)
    reached = [
        may_reach(keys[owner], chunk * CHUNK, CHUNK, least[owner, chunk])
        for owner, chunk in zip(owners.split(_BLOCK), chunks.split(_BLOCK), strict=True)
    ]
    pairs, places = torch.cat(reached).nonzero(as_tuple=True) if reached else (owners, chunks)
    owners, ids = owners[pairs], chunks[pairs] * CHUNK + places
    numbers = rows.index[owners]
    values = relative(scores[numbers, ids], highest[owners], temperature[owners])
    values += gumbel_noise(keys[owners], ids[:, None]).squeeze(-1)
    won = torch.full_like(sure, -math.inf).scatter_reduce_(0, owners, values, "amax")
    # Of equal ones the lowest id.
    ids = torch.where(values == won[owners], ids, scores.shape[-1])
    chosen = torch.full_like(best, scores.shape[-1]).scatter_reduce_(0, owners, ids, "amin")
    return torch.where(best == _FAILED, best, chosen)


def _draw_among_all_unread(rows: _Rows, kind: None = None) -> torch.Tensor:
    """`_draw_among_all` where nothing may be read on the way: the noise of every token, roughly, then that of the few
    that may have won, exactly. _OPEN where these may not be all."""
    chosen = []
    for index, best, keys, temperature in zip(
        *(x.split(_ROWS) for x in (rows.index, rows.maxima.amax(dim=-1), rows.keys, rows.filters.temperature)),
        strict=True,
    ):
        scores = rows.scores[index]
        rough = rough_noise(keys, scores.shape[-1]).add_((scores - best[:, None]) / temperature[:, None].float())
        values, ids = rough.topk(min(_FINALISTS, scores.shape[-1]), dim=-1)
        exact = relative(scores.gather(-1, ids), best[:, None], temperature[:, None]).add_(gumbel_noise(keys, ids))
        highest = exact.amax(dim=-1, keepdim=True)
        winner = torch.where(exact == highest, ids, scores.shape[-1]).amin(dim=-1)
        is_open = (values[:, -1:] + ROUGHNESS >= highest).squeeze(-1) & (values.shape[-1] < scores.shape[-1])
        chosen.append(torch.where(best.abs() < math.inf, torch.where(is_open, _OPEN, winner), _FAILED))
    return torch.cat(chosen)


# What is said beside the token


def _reason(logits: torch.Tensor, num_tokens: int, dtype: torch.dtype) -> str:
    """Why no token can be chosen from `logits` [V] of a model that computes in `dtype`, and what to check."""
    where = f"no token can be chosen after {num_tokens} tokens"
    num_nan, num_infinite = int(logits.isnan().sum()), int((logits == math.inf).sum())
    if num_nan or num_infinite or not bool(logits.isfinite().any()):
        found = f"of {len(logits)} logits {num_nan} are NaN, {num_infinite} infinite"
        check = "check the checkpoint's weights"
        if dtype == torch.float16:
            check = (
                "with model_config.dtype: float16 an activation has most likely overflowed: use bfloat16 or float32; "
                f"where that does not help, {check}"
            )
        return (
            f"{where}: the model's logits are not finite ({found if num_nan or num_infinite else 'all are -inf'}); "
            f"{check}"
        )
    return (
        f"{where}: min_new_tokens, allowed_token_ids, bad_words, the grammar and the penalties {NO_SCORE_LEFT}; "
        "lower min_new_tokens or the penalties, allow more tokens or bar fewer words"
    )


def _drop_behind_wrong(places: Places, token_ids: Sequence[int], logprobs: list[TokenLogprobs | None]) -> None:
    """Those behind a request's first wrong draft do not count."""
    for number in range(len(places.requests)) if places.drafts is not None else ():
        own = places.rows_of(number)
        num_kept = num_right(places.drafts_of(number), token_ids[own.start : own.stop]) + 1
        for row in own[num_kept:]:
            logprobs[row] = None


def _logprobs(logits: torch.Tensor, token_ids: Sequence[int], places: Places) -> list[TokenLogprobs | None]:
    results: list[TokenLogprobs | None] = [None] * places.num_rows
    rows, counts = [], []
    for number, request in enumerate(places.requests):
        if request.params.logprobs is None:
            continue
        own, drafts = places.rows_of(number), places.drafts_of(number)
        num_kept = num_right(drafts, token_ids[own.start : own.stop]) + 1
        kept = [row for row in own[:num_kept] if token_ids[row] >= 0]
        rows += kept
        counts += [request.params.logprobs] * len(kept)
    if not rows:
        return results
    found = token_logprobs(
        logits[torch.tensor(rows, device=logits.device)],
        [token_ids[row] for row in rows],
        counts,
    )
    for row, logprobs in zip(rows, found, strict=True):
        results[row] = logprobs
    return results
