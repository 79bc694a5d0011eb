"""Chooses the next token of every sampling row of a step from its logits.

Order and meaning follow transformers' `generate`: biases, repetition penalty, (presence and frequency penalty), tokens
that may not come (bad words, allowed tokens, minimum of new tokens, grammar), temperature, top-k, top-p, min-p.
Logprobs are those of the model itself, before any of it.
Invariant: a request's token depends on its own logits, parameters and seed only, never on the other rows of the batch.
Therefore randomness is a hash of (seed, position, candidate), and sums over candidates are taken in integers, where no
order of addition can matter.
The vocabulary is read once, for the maxima of its chunks; after that only the chunks are read that can hold the token.
The host reads once a step; again where filters leave more tokens than was guessed, or where a row draws without any.
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

from executor.engine.filters import (
    CHUNK,
    Filters,
    Kind,
    chunk_maxima,
    likely_survivors,
    relative,
    survivors,
    usable_temperature,
)
from executor.engine.logprobs import TokenLogprobs, token_logprobs
from executor.engine.masks import masked
from executor.engine.noise import as_int64, gumbel_noise, least_bits, may_reach, noise_key
from executor.engine.penalties import Penalties
from executor.engine.places import Drafts, Places
from executor.engine.speculation.verify import num_right
from executor.engine.token_rules import TokenRules
from executor.schedule.request import NO_SCORE_LEFT, Request, SamplingParams

_FAILED, _OPEN = -1, -2  # in place of a token id on its way to the host
_BLOCK = 256  # chunks whose noise is made at a time: it stays in the cache


@dataclass(frozen=True)
class Sampled:
    """One entry per row, in the order of the rows. A row that failed has token id -1 and no logprobs."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    failures: dict[int, str] = field(default_factory=dict)  # row -> why it has no token, and what to check

    @property
    def has_logprobs(self) -> bool:
        return any(each is not None for each in self.logprobs)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a step that choose in the same way."""

    scores: torch.Tensor  # float32 [R, V], of all rows
    maxima: torch.Tensor  # [N, C], of these
    numbers: list[int]  # which they are
    index: torch.Tensor  # int64 [N], the same on the device
    params: list[SamplingParams]
    num_before: list[int]  # tokens that come before the one to choose

    @property
    def keys(self) -> list[int]:
        return [as_int64(noise_key(p.seed, n)) for p, n in zip(self.params, self.num_before, strict=True)]


class Sampler:
    """Samples rows; keeps the token counts of requests with penalties until `forget`.

    `dtype`: what the model computes in, from which logits that are not finite are explained. `reads_freely`: logits lie
    in host memory, and not only because a chip is emulated there, whose logits must stay on it; None: by `device`.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        eos_token_ids: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        reads_freely: bool | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.reads_freely = self.device.type == "cpu" if reads_freely is None else reads_freely
        self.penalties = Penalties(vocab_size, self.device)
        self.rules = TokenRules(vocab_size, self.device, eos_token_ids)
        self._batch: _Batch | None = None
        self._numbers = torch.empty(0, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def sample(
        self,
        logits: torch.Tensor,
        requests: Sequence[Request],
        num_tokens: Sequence[int] | None = None,
        drafts: Drafts | None = None,
    ) -> Sampled:
        """logits [R, V]: of each request a row for what comes next and, with `drafts`, one behind each of its own.

        `num_tokens`: how many tokens, prompt included, come before what each request chooses first: the position of its
        noise. None: all that it has. While penalties and masks apply, float32 `logits` are changed in place;
        afterwards they are as they were. A row fails whose best logit is not finite or that has a NaN or +inf
        anywhere; the others are sampled. Single logits of -inf are tokens that the model rules out.
        Logprobs are found for the rows that count: those of a request behind its first wrong draft have none.
        """
        if not requests:
            return Sampled([], [])
        batch, places = self._batch_of(requests), Places(requests, num_tokens, drafts)
        assert logits.shape == (places.num_rows, self.vocab_size), f"{tuple(logits.shape)}, {places.num_rows} rows"
        scores = logits if logits.dtype == torch.float32 and logits.is_contiguous() else logits.float().contiguous()
        if self.vocab_size % CHUNK:
            scores = F.pad(scores, (0, -self.vocab_size % CHUNK), value=-math.inf)
        if batch.is_adjusted:
            with self.adjusted(scores, places) as faults:
                token_ids = self._choose(scores, batch, places)
        else:
            token_ids, faults = self._choose(scores, batch, places), {}
        failures = {}
        if _FAILED in token_ids:
            failed = [row for row, token_id in enumerate(token_ids) if token_id == _FAILED]
            failures = {row: _reason(logits[row], places.num_before[row], self.dtype) for row in failed}
        for row in faults.keys() - failures.keys():
            token_ids[row], failures[row] = _FAILED, faults[row]
        if not batch.has_logprobs:
            return Sampled(token_ids, [None] * len(token_ids), failures)
        return Sampled(token_ids, _logprobs(logits, token_ids, places), failures)

    def _batch_of(self, requests: Sequence[Request]) -> "_Batch":
        """What these requests ask for: found once, and again when others stand in the step."""
        key = tuple(requests)
        if self._batch is None or self._batch.requests != key:
            self._batch = _Batch.of(key)
        return self._batch

    @contextmanager
    def adjusted(self, scores: torch.Tensor, places: Places) -> Iterator[dict[int, str]]:
        """`scores` float32 [R, V], contiguous, as tokens are chosen from them; inside the context only.

        Gives the rows whose grammar has failed, and why.
        """
        with (
            self.rules.biased(scores, places),
            self.penalties.applied(scores, places),
            self.rules.barred(scores, places),
            masked(scores, places) as faults,
        ):
            yield faults

    def forget(self, request_id: str) -> None:
        """Frees what is kept for a request that is finished; nothing happens when nothing is kept."""
        self.penalties.forget(request_id)
        self.rules.forget(request_id)
        self._batch = None

    def check(self, live_ids: Collection[str]) -> None:
        """Asserts that nothing is kept for requests other than `live_ids`."""
        self.penalties.check(live_ids)
        stale = sorted(self.rules.kept_ids() - set(live_ids))
        assert not stale, f"biases and allowed tokens of requests that are gone: {stale}"

    def _choose(self, scores: torch.Tensor, batch: "_Batch", places: Places) -> list[int]:
        """Each row's token id, or _FAILED."""
        maxima = chunk_maxima(scores)
        if batch.is_greedy and self.reads_freely:
            return _best_on_host(scores, maxima)
        index = self._first_numbers(len(scores))
        if batch.is_greedy:
            return _best_of_all(scores, maxima, index).tolist()

        def part(numbers: list[int]) -> _Rows:
            own, which = maxima, index
            if len(numbers) < len(scores):
                which = torch.tensor(numbers, device=self.device)
                own = maxima[which]
            params = [batch.requests[places.owner[row]].params for row in numbers]
            return _Rows(scores, own, numbers, which, params, [places.num_before[row] for row in numbers])

        rows_of = [(way, places.rows_of_all(numbers)) for way, numbers in batch.ways.items()]
        chosen = [choose(part(rows), kind) for (choose, kind), rows in rows_of]
        order = [row for _, rows in rows_of for row in rows]
        token_ids = [0] * len(scores)
        for row, token_id in zip(order, torch.cat(chosen).tolist(), strict=True):
            token_ids[row] = token_id
        still_open = [row for row, token_id in enumerate(token_ids) if token_id == _OPEN]
        if still_open:
            for row, token_id in zip(still_open, _draw_among_many(part(still_open)).tolist(), strict=True):
                token_ids[row] = token_id
        return token_ids

    def _first_numbers(self, count: int) -> torch.Tensor:
        """0, 1, ... int64 [count] on the device."""
        if len(self._numbers) < count:
            self._numbers = torch.arange(2 * count, device=self.device)
        return self._numbers[:count]


@dataclass(frozen=True)
class _Batch:
    """What the requests of a step ask for, as long as they are the same, however many rows each of them has."""

    requests: tuple[Request, ...]
    ways: dict[tuple[Callable, Kind | None], list[int]]  # -> which of the requests choose so
    is_greedy: bool
    is_adjusted: bool  # something is done to the scores of one
    has_logprobs: bool

    @staticmethod
    def of(requests: tuple[Request, ...]) -> "_Batch":
        ways: dict[tuple[Callable, Kind | None], list[int]] = {}
        for number, request in enumerate(requests):
            ways.setdefault(_way(request.params), []).append(number)
        return _Batch(
            requests,
            ways,
            is_greedy=all(choose is _best for choose, _ in ways),
            is_adjusted=any(_is_adjusted(request) for request in requests),
            has_logprobs=any(request.params.logprobs is not None for request in requests),
        )


def _is_adjusted(request: Request) -> bool:
    return request.params.adjusts_scores or request.matcher is not None or request.bad_words is not None


# Ways to choose: each gives the token ids int64 [N] of some rows, _FAILED where the best score is not finite.


def _way(params: SamplingParams) -> tuple[Callable[[_Rows, Kind | None], torch.Tensor], Kind | None]:
    if params.temperature == 0:
        return _best, None
    if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
        return _draw_among_few, Kind.of(params)
    return _draw_among_all, None


def _best(rows: _Rows, kind: None = None) -> torch.Tensor:
    """The highest score, of equal ones the lowest id."""
    return _best_of_all(rows.scores, rows.maxima, rows.index)


def _best_of_all(scores: torch.Tensor, maxima: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    best, chunks = maxima.max(dim=-1)
    places = torch.add(chunks, index, alpha=maxima.shape[-1])
    inside = scores.view(-1, CHUNK).index_select(0, places).argmax(dim=-1)
    return inside.add_(chunks, alpha=CHUNK).masked_fill_((best.abs_() < math.inf).logical_not_(), _FAILED)


def _best_on_host(scores: torch.Tensor, maxima: torch.Tensor) -> list[int]:
    """`_best_of_all` where a call of numpy costs a fraction of one of torch: it is most of a small step's sampling."""
    highest, rows = maxima.numpy(), np.arange(len(maxima))
    chunks = highest.argmax(axis=1)
    inside = scores.numpy().reshape(*highest.shape, CHUNK)[rows, chunks].argmax(axis=1)
    ids = chunks * CHUNK + inside
    ids[~np.isfinite(highest[rows, chunks])] = _FAILED
    return ids.tolist()


def _draw_among_few(rows: _Rows, kind: Kind) -> torch.Tensor:
    """Gumbel-max over what the filters leave; _OPEN where that is not all among the likeliest few."""
    filters = Filters.of(rows.params, rows.keys, rows.scores.shape[-1], rows.scores.device)
    ids, candidates, is_open = likely_survivors(rows.scores, rows.maxima, rows.numbers, filters, kind)
    chosen = torch.where(is_open, _OPEN, _gumbel_max(ids, candidates, filters))
    return torch.where(rows.maxima.amax(dim=-1).abs() < math.inf, chosen, _FAILED)


def _draw_among_many(rows: _Rows) -> torch.Tensor:
    """Gumbel-max over what the filters leave, however many these are."""
    scores = rows.scores[torch.tensor(rows.numbers, device=rows.scores.device)]
    filters = Filters.of(rows.params, rows.keys, scores.shape[-1], scores.device)
    return _gumbel_max(*survivors(scores, filters), filters)


def _gumbel_max(ids: torch.Tensor, candidates: torch.Tensor, filters: Filters) -> torch.Tensor:
    # The filters keep a row's best, and put it first.
    distances = relative(candidates, candidates[:, :1], filters.temperature[:, None])
    winner = gumbel_noise(filters.keys, ids).add_(distances).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, winner).squeeze(-1)


def _draw_among_all(rows: _Rows, kind: None = None) -> torch.Tensor:
    """Gumbel-max over the whole vocabulary.

    The best token and its noise are a bound that the winner reaches. In each chunk a token below the chunk's maximum
    needs so much noise for it that few have it: their bits tell, and only theirs become numbers.
    """
    scores, device = rows.scores, rows.scores.device
    keys = torch.tensor(rows.keys, device=device)
    temperature = torch.tensor([usable_temperature(p) for p in rows.params], dtype=torch.float64, device=device)
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
    numbers = torch.tensor(rows.numbers, device=device)[owners]
    values = relative(scores[numbers, ids], highest[owners], temperature[owners])
    values += gumbel_noise(keys[owners], ids[:, None]).squeeze(-1)
    won = torch.full_like(sure, -math.inf).scatter_reduce_(0, owners, values, "amax")
    # Of equal ones the lowest id.
    ids = torch.where(values == won[owners], ids, scores.shape[-1])
    chosen = torch.full_like(best, scores.shape[-1]).scatter_reduce_(0, owners, ids, "amin")
    return torch.where(best == _FAILED, best, chosen)


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
