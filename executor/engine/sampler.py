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
)
from executor.engine.logprobs import ChosenLogprobs, TokenLogprobs, token_logprobs
from executor.engine.masks import masked
from executor.engine.noise import gumbel_noise, least_bits, may_reach, mixed_seed, noise_keys
from executor.engine.penalties import Penalties
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


class Drawn:
    """The tokens of a step's rows, chosen where the logits are, and on their way to the host."""

    def __init__(
        self,
        sampler: "Sampler",
        step: "_Step",
        ids: torch.Tensor,
        faults: dict[int, str],
        judged: ChosenLogprobs | None,
    ) -> None:
        self.ids = ids
        """int64 [R], on the device; below 0 where there is none."""
        self._sampler, self._step, self._faults, self._judged = sampler, step, faults, judged
        self._arrived = sampler.read_back(ids if judged is None else judged.packed)

    @torch.inference_mode()
    def read(self, *, in_place: bool = True) -> Sampled:
        """Wait for them. `in_place`: the logits are still there; without, rows that must be looked at again are void."""
        token_ids, logprobs = self._read()
        if not self._faults and min(token_ids) >= 0:
            return Sampled(token_ids, logprobs)
        if in_place:
            return self._sampler._looked_again(self._step, token_ids, logprobs, self._faults)
        assert not self._faults, "rows with a grammar are not drawn ahead"
        return Sampled(token_ids, logprobs, void=self._sampler._noted_void(self._step, token_ids))

    def _read(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        host, judged = self._arrived(), self._judged
        if judged is None:
            token_ids = host.tolist()
            return token_ids, [None] * len(token_ids)
        return judged.read(host.numpy())


@dataclass(frozen=True)
class _Step:
    """What one step's tokens are chosen from."""

    logits: torch.Tensor
    scores: torch.Tensor  # float32 [R, V], contiguous
    requests: Sequence[Request]
    num_tokens: Sequence[int]


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
        send: Callable[[np.ndarray], torch.Tensor] = torch.from_numpy,
        read_back: Callable[[torch.Tensor], Callable[[], torch.Tensor]] = lambda x: lambda: x,
    ) -> None:
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.reads_freely = self.device.type == "cpu" if reads_freely is None else reads_freely
        self.send, self.read_back = send, read_back
        self.penalties = Penalties(vocab_size, self.device)
        self.rules = TokenRules(vocab_size, self.device, eos_token_ids)
        # Requests that had void rows: from the first on more of their tokens are looked at, as long as that suffices.
        self._wide_ids: set[str] = set()
        self._late_ids: set[str] = set()  # and those for which it does not
        self._batch: _Batch | None = None

    def sample(
        self,
        logits: torch.Tensor,
        requests: Sequence[Request],
        num_tokens: Sequence[int] | None = None,
        ahead: Sequence[tuple[int, ...]] | None = None,
    ) -> Sampled:
        """`draw`, and wait for it."""
        if not requests:
            return Sampled([], [])
        return self.draw(logits, requests, num_tokens, ahead).read()

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
        ahead: Sequence[tuple[int, ...]] | None = None,
    ) -> Drawn:
        """logits [R, V], row i of `requests[i]`; a request may have several rows.

        `num_tokens`: how many tokens, prompt included, come before the one that a row chooses: the position of its
        noise. None: all that its request has. `ahead`: the drafts that are taken to come before it, behind what its
        request has; None: none. While penalties and masks apply, float32 `logits` are changed in place;
        afterwards they are as they were. A row fails whose best logit is not finite or that has a NaN or +inf
        anywhere; the others are sampled. Single logits of -inf are tokens that the model rules out.
        """
        assert logits.shape == (len(requests), self.vocab_size), f"{tuple(logits.shape)}, {len(requests)} requests"
        batch = self._batch_of(requests)
        if num_tokens is None:
            num_tokens = [request.num_tokens for request in requests] if batch.needs_places else ()
        scores = logits if logits.dtype == torch.float32 and logits.is_contiguous() else logits.float().contiguous()
        if self.vocab_size % CHUNK:
            scores = F.pad(scores, (0, -self.vocab_size % CHUNK), value=-math.inf)
        step = _Step(logits, scores, requests, num_tokens)
        if batch.is_adjusted:
            with self.adjusted(scores, requests, num_tokens) as faults:
                ids = self._choose(step, batch)
        else:
            ids, faults = self._choose(step, batch), {}
        judged = None if batch.judged is None else ChosenLogprobs.of(logits, ids, *batch.judged)
        return Drawn(self, step, ids, faults, judged)

    def _looked_again(
        self, step: _Step, token_ids: list[int], logprobs: list[TokenLogprobs | None], faults: dict[int, str]
    ) -> Sampled:
        """The tokens of rows that were left open, and why others have none."""
        still_open = [row for row, token_id in enumerate(token_ids) if token_id == _OPEN]
        if still_open:
            with self.adjusted(step.scores, step.requests, step.num_tokens):
                found = _draw_among_many(step, still_open, self.send).tolist()
            for row, token_id in zip(still_open, found, strict=True):
                token_ids[row] = token_id
        counts = step.num_tokens or [request.num_tokens for request in step.requests]
        failed = [row for row, token_id in enumerate(token_ids) if token_id == _FAILED]
        failures = {row: _reason(step.logits[row], counts[row], self.dtype) for row in failed}
        for row in faults.keys() - failures.keys():
            token_ids[row], failures[row] = _FAILED, faults[row]
        if any(each is not None for each in logprobs):
            logprobs = _logprobs(step.logits, token_ids, step.requests)
        return Sampled(token_ids, logprobs, failures)

    def _noted_void(self, step: _Step, token_ids: list[int]) -> frozenset[int]:
        """The rows without a token, whose requests are drawn in another way from now on."""
        rows = frozenset(row for row, token_id in enumerate(token_ids) if token_id < 0)
        for row in rows:
            request_id = step.requests[row].id
            is_wide = request_id in self._wide_ids or token_ids[row] == _FAILED
            (self._late_ids if is_wide else self._wide_ids).add(request_id)
        self._batch = None
        return rows

    def _batch_of(self, requests: Sequence[Request]) -> "_Batch":
        """What these requests ask for: found once, and again when others stand in the step."""
        key = tuple(requests)
        if self._batch is None or self._batch.requests != key:
            self._batch = _Batch.of(key, self._wide_ids, self.vocab_size + -self.vocab_size % CHUNK, self.send)
        return self._batch

    @contextmanager
    def adjusted(
        self, scores: torch.Tensor, requests: Sequence[Request], num_tokens: Sequence[int]
    ) -> Iterator[dict[int, str]]:
        """`scores` float32 [R, V], contiguous, as tokens are chosen from them; inside the context only.

        Gives the rows whose grammar has failed, and why.
        """
        with (
            self.rules.biased(scores, requests),
            self.penalties.applied(scores, requests),
            self.rules.barred(scores, requests, num_tokens),
            masked(scores, requests) as faults,
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
        scores, maxima = step.scores, chunk_maxima(step.scores)
        if batch.is_greedy:
            return _best_on_host(scores, maxima) if self.reads_freely else _best_of_all(scores, maxima, batch.index)
        keys = self.send(noise_keys(batch.seeds, np.asarray(step.num_tokens)[batch.order]))
        chosen, first = [], 0
        for way in batch.ways:
            which = slice(first, first := first + len(way.index))
            own = maxima if len(batch.ways) == 1 else maxima[way.index]
            chosen.append(way.choose(_Rows(scores, own, way.index, way.filters, keys[which]), way.kind))
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)[batch.places]


@dataclass(frozen=True)
class _Way:
    """Rows of a batch that choose in one way."""

    choose: "Callable[[_Rows, Kind | None], torch.Tensor]"
    kind: Kind | None
    index: torch.Tensor  # int64 [N]: which they are
    filters: Filters


@dataclass(frozen=True)
class _Batch:
    """What the requests of a step's rows ask for, as long as they are the same. Kept from step to step."""

    requests: tuple[Request, ...]
    index: torch.Tensor  # int64 [R]: 0, 1, ...
    ways: list[_Way]
    order: np.ndarray  # int64 [R]: the rows, one way's behind the other's
    places: torch.Tensor  # int64 [R]: where each row stands there
    seeds: np.ndarray  # uint64 [R], mixed, in that order
    is_greedy: bool
    is_adjusted: bool  # something is done to the scores of one
    needs_tokens: bool  # and depends on which tokens came before
    judged: tuple[torch.Tensor, list[int], list[int]] | None  # rows that want logprobs, and how many of the best

    @property
    def needs_places(self) -> bool:
        """Whether it matters how many tokens came before."""
        return self.is_adjusted or not self.is_greedy

    @staticmethod
    def of(
        requests: tuple[Request, ...], wide_ids: Collection[str], width: int, send: Callable[[np.ndarray], torch.Tensor]
    ) -> "_Batch":
        """`wide_ids`: requests of which more tokens are looked at than is usual."""
        params = [request.params for request in requests]
        rows_of: dict[tuple[Callable, Kind | None], list[int]] = {}
        for row, request in enumerate(requests):
            rows_of.setdefault(_way(request.params, request.id in wide_ids), []).append(row)
        ways = [
            _Way(*way, send(np.array(rows)), Filters.of([params[row] for row in rows], width, send))
            for way, rows in rows_of.items()
        ]
        order = np.array([row for rows in rows_of.values() for row in rows])
        wanted = [row for row, each in enumerate(params) if each.logprobs is not None]
        judged = (send(np.array(wanted)), wanted, [params[row].logprobs for row in wanted]) if wanted else None
        return _Batch(
            requests,
            send(np.arange(len(params))),
            ways,
            order,
            send(np.argsort(order)),
            np.array([mixed_seed(params[row].seed) for row in order], dtype=np.uint64),
            is_greedy=all(choose is _best for choose, _ in rows_of),
            is_adjusted=any(_is_adjusted(request) for request in requests),
            needs_tokens=any(_needs_tokens(request) for request in requests),
            judged=judged,
        )


def _needs_tokens(request: Request) -> bool:
    return request.params.needs_history or request.matcher is not None or request.bad_words is not None


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


def _draw_among_many(step: _Step, rows: list[int], send: Callable[[np.ndarray], torch.Tensor]) -> torch.Tensor:
    """Gumbel-max over what the filters leave, however many these are."""
    scores, params = step.scores[send(np.array(rows))], [step.requests[row].params for row in rows]
    seeds = np.array([mixed_seed(each.seed) for each in params], dtype=np.uint64)
    filters = Filters.of(params, scores.shape[-1], send)
    return _gumbel_max(*survivors(scores, filters), filters, send(noise_keys(seeds, np.asarray(step.num_tokens)[rows])))


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


def _logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], requests: Sequence[Request]
) -> list[TokenLogprobs | None]:
    results: list[TokenLogprobs | None] = [None] * len(requests)
    rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None and token_ids[row] >= 0]
    if not rows:
        return results
    found = token_logprobs(
        logits[torch.tensor(rows, device=logits.device)],
        [token_ids[row] for row in rows],
        [requests[row].params.logprobs for row in rows],
    )
    for row, logprobs in zip(rows, found, strict=True):
        results[row] = logprobs
    return results
