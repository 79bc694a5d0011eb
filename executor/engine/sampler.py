"""Chooses the next token of every sampling row of a step from its logits.

Order and meaning follow transformers' `generate`: repetition penalty, (presence and frequency penalty), minimum of new
tokens, temperature, top-k, top-p, min-p. All three penalties count the prompt's tokens as well as the output's;
logprobs are those of the model itself, before any of it.
Invariant: a request's token depends on its own logits, parameters and seed only, never on the other rows of the batch.
Therefore randomness is a hash of (seed, position, candidate), and sums over candidates are taken in integers, where no
order of addition can matter.
Does not know models or the scheduler; end-of-sequence tokens are told to the constructor.
Legend: R rows, N rows that draw, V vocabulary, K candidates of a row, M tokens of all penalty histories.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from executor.engine.noise import as_int64, gumbel_noise, noise_key
from executor.schedule.request import Request, SamplingParams

MIN_TEMPERATURE = 1e-6  # below it the distribution is a point in any case, and the division would overflow

REACH = 26.01
"""How far below the best score a token can lie and still win: noise of 32 bits is between -3.13 and 22.88."""
CHUNK = 128
BLOCK = 1 << 14
NUCLEUS_GUESS = 1024  # candidates among which a top-p nucleus is looked for first
WEIGHT_SCALE = float(1 << 40)  # fixed point: 2**18 tokens of weight 1 stay far below 2**63


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities: of the chosen token, and of the best, descending."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob)


@dataclass(frozen=True)
class Sampled:
    """One entry per row, in the order of the rows. A row that failed has token id -1."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    failures: dict[int, str] = field(default_factory=dict)  # row -> why it has no token


class Sampler:
    """Samples rows; keeps the token counts of requests with penalties until `forget`."""

    def __init__(self, vocab_size: int, device: torch.device | str, eos_token_ids: Sequence[int] = ()):
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.eos_token_ids = tuple(eos_token_ids)
        self._histories: dict[str, _History] = {}

    @torch.no_grad()
    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> Sampled:
        """logits [R, V], row i of `requests[i]`; the position of a noise is the number of tokens before it.

        `logits` is left as it was. Raises RuntimeError when a row has no finite best logit.
        """
        assert logits.shape == (len(requests), self.vocab_size), f"{tuple(logits.shape)}, {len(requests)} requests"
        if not requests:
            return Sampled([], [])
        scores = self._processed(logits, requests)
        values, ids = self._choose(scores, requests)
        # One transfer also tells of rows that went wrong.
        token_ids = torch.where(torch.isfinite(values), ids, -1).tolist()
        failures = {
            row: f"the model's logits for token {request.num_tokens} are not finite; check the weights, and float16 "
            "for overflow"
            for row, (request, token_id) in enumerate(zip(requests, token_ids, strict=True))
            if token_id < 0
        }
        return Sampled(token_ids, _logprobs(logits, [max(0, each) for each in token_ids], requests), failures)

    def forget(self, request_id: str) -> None:
        """Frees what is kept for a request that is finished; nothing happens when nothing is kept."""
        self._histories.pop(request_id, None)

    def check(self, live_ids: Collection[str]) -> None:
        """Asserts that nothing is kept for requests other than `live_ids`."""
        stale = sorted(self._histories.keys() - set(live_ids))
        assert not stale, f"penalty histories of requests that are gone: {stale}"

    def _choose(self, scores: torch.Tensor, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """Score and id [R] of each row's token: the best of a greedy row, a draw for the others."""
        groups: dict[Callable, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(_way(request.params), []).append(row)
        if len(groups) == 1:
            return next(iter(groups))(scores, requests)
        order = torch.tensor([row for rows in groups.values() for row in rows], device=self.device)
        parts = scores[order].split([len(rows) for rows in groups.values()])
        chosen = [
            choose(part, [requests[row] for row in rows])
            for (choose, rows), part in zip(groups.items(), parts, strict=True)
        ]
        values, ids = (torch.cat(column) for column in zip(*chosen, strict=True))
        return torch.empty_like(values).index_copy_(0, order, values), torch.empty_like(ids).index_copy_(0, order, ids)

    def _processed(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """Penalties and masked stop tokens applied to a copy; `logits` itself where there is nothing to apply."""
        penalised = [row for row, request in enumerate(requests) if request.params.needs_history]
        masked = [
            row * self.vocab_size + token_id
            for row, request in enumerate(requests)
            if len(request.output_token_ids) < request.params.min_new_tokens
            for token_id in self._stop_ids(request.params)
        ]
        if not penalised and not masked:
            return logits
        scores = logits.to(torch.float32, copy=True)
        flat = scores.view(-1)
        if penalised:
            self._penalise(flat, requests, penalised)
        if masked:
            flat[torch.tensor(masked, device=self.device)] = -math.inf
        return scores

    def _stop_ids(self, params: SamplingParams) -> set[int]:
        ids = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)}
        return {token_id for token_id in ids if token_id < self.vocab_size}

    def _penalise(self, flat: torch.Tensor, requests: Sequence[Request], rows: Sequence[int]) -> None:
        """flat [R * V] is changed in place: only at tokens that the rows' requests have seen."""
        histories = [self._history(requests[row]) for row in rows]
        index = np.concatenate(
            [history.seen_ids + row * self.vocab_size for row, history in zip(rows, histories, strict=True)]
        )
        factors = np.array(
            [
                (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
                for p in (requests[row].params for row in rows)
            ],
            dtype=np.float32,
        ).repeat([len(history.seen_ids) for history in histories], axis=0)
        counts = np.concatenate([history.seen_counts for history in histories])
        where = torch.from_numpy(index).to(self.device)
        repetition, presence, frequency = torch.from_numpy(factors).to(self.device).unbind(-1)
        picked = flat[where]
        picked = torch.where(picked < 0, picked * repetition, picked / repetition)
        flat[where] = picked - (presence + frequency * torch.from_numpy(counts).to(self.device))

    def _history(self, request: Request) -> "_History":
        history = self._histories.get(request.id)
        if history is None:
            history = self._histories[request.id] = _History(request, self.vocab_size)
        assert history.request is request, f"request id '{request.id}' is used again before forget()"
        history.catch_up()
        return history


class _History:
    """Which tokens a request has seen and how often, brought up to date by the new ones only. Lives on the host."""

    def __init__(self, request: Request, vocab_size: int):
        self.request = request
        self.vocab_size = vocab_size
        self.num_seen = request.num_tokens
        tokens = np.asarray(request.token_ids(0, self.num_seen), dtype=np.int64)
        # A prompt may hold ids beyond the logits (padded embeddings); they cannot be chosen.
        ids, counts = np.unique(tokens[tokens < vocab_size], return_counts=True)
        self.size = len(ids)
        self._ids = np.concatenate([ids, np.zeros(64, np.int64)])
        self._counts = np.concatenate([counts, np.zeros(64)]).astype(np.float32)
        self._slot_of = {int(token_id): slot for slot, token_id in enumerate(ids)}

    @property
    def seen_ids(self) -> np.ndarray:
        return self._ids[: self.size]

    @property
    def seen_counts(self) -> np.ndarray:
        return self._counts[: self.size]

    def catch_up(self) -> None:
        num_tokens = self.request.num_tokens
        assert num_tokens >= self.num_seen, f"request '{self.request.id}' lost tokens"
        for token_id in self.request.token_ids(self.num_seen, num_tokens):
            if token_id >= self.vocab_size:
                continue
            slot = self._slot_of.setdefault(token_id, self.size)
            if slot == self.size:
                if self.size == len(self._ids):
                    self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                    self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
                self._ids[slot] = token_id
                self.size += 1
            self._counts[slot] += 1
        self.num_seen = num_tokens


# Three ways to choose: each takes scores [N, V] and returns (finite score [N] of the token, token id [N]).


def _way(params: SamplingParams) -> Callable:
    if params.temperature == 0:
        return _best
    return _draw_among_survivors if params.top_k > 0 or params.top_p < 1 or params.min_p > 0 else _draw_among_all


def _best(scores: torch.Tensor, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = scores.max(dim=-1)
    return values.float(), ids


def _draw_among_all(scores: torch.Tensor, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel-max over the whole vocabulary, by blocks that stay in the cache."""
    keys, temperature = _keys(requests, scores.device), _temperatures(requests, scores.device)
    values, ids = [], []
    for start in range(0, scores.shape[-1], BLOCK):
        block = scores[:, start : start + BLOCK].float() / temperature[:, None]
        block_ids = torch.arange(start, start + block.shape[-1], device=scores.device)[None]
        value, index = gumbel_noise(keys, block_ids).add_(block).max(dim=-1)
        values.append(value)
        ids.append(index + start)
    winner = torch.stack(values).argmax(dim=0, keepdim=True)
    token_ids = torch.stack(ids).gather(0, winner).squeeze(0)
    return scores.gather(-1, token_ids[:, None]).squeeze(-1).float(), token_ids


def _draw_among_survivors(scores: torch.Tensor, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel-max over what the filters leave."""
    ids, candidates = _survivors(scores.float(), requests)
    winner = gumbel_noise(_keys(requests, scores.device), ids).add_(candidates).argmax(dim=-1, keepdim=True)
    return candidates.gather(-1, winner).squeeze(-1), ids.gather(-1, winner).squeeze(-1)


def _keys(requests: Sequence[Request], device: torch.device) -> torch.Tensor:
    keys = [as_int64(noise_key(request.params.seed, request.num_tokens)) for request in requests]
    return torch.tensor(keys, device=device)


def _temperatures(requests: Sequence[Request], device: torch.device) -> torch.Tensor:
    return torch.tensor([max(request.params.temperature, MIN_TEMPERATURE) for request in requests], device=device)


def _survivors(scores: torch.Tensor, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """scores float32 [N, V] -> (ids, scores after temperature) [N, K]; what the filters drop has score -inf.

    Tokens out of reach of the best are dropped as well: no noise can make them win.
    """
    device = scores.device
    params = [request.params for request in requests]
    top_p, min_p = torch.tensor([(p.top_p, p.min_p) for p in params], dtype=torch.float64, device=device).unbind(-1)
    top_k = torch.tensor([min(p.top_k, scores.shape[-1]) for p in params], device=device)
    temperature = _temperatures(requests, device)
    total = torch.ones_like(top_p)
    if any(p.top_p < 1 and p.top_k == 0 for p in params):
        # The sum of all weights: log_softmax adds up each row by itself, whatever the number of rows.
        scaled = scores / temperature[:, None]
        total = scaled.log_softmax(dim=-1).amax(dim=-1).double().neg().exp() * WEIGHT_SCALE

    best = scores.amax(dim=-1)
    lowest = best - temperature * torch.tensor([_reach(p) for p in params], device=device)
    floor = _floor(scores, lowest, params)
    for bound in (floor, lowest):
        ids, candidates = _at_least(scores, bound)
        candidates /= temperature[:, None]
        kept, ids, candidates, short = _filter(ids, candidates, best / temperature, total, top_k, top_p, min_p)
        if not bool((short & (bound > lowest)).any()):
            break
    return ids, candidates.masked_fill(~kept, -math.inf)


def _reach(params: SamplingParams) -> float:
    """How far below the best score, after temperature, a token of a row can matter."""
    # The nucleus of what top-k leaves is a share of all that top-k leaves, also of what min-p drops afterwards.
    if params.min_p > 0 and (params.top_k == 0 or params.top_p == 1):
        return min(REACH, 0.001 - math.log(params.min_p))
    return REACH


def _floor(scores: torch.Tensor, lowest: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """A score per row [N], `lowest` or more, below which all tokens are filtered out (for top-p: most likely so).

    The k-th best of the maxima of fixed chunks is not above the k-th best score, and costs a single pass.
    """
    num_chunks = scores.shape[-1] // CHUNK
    wanted = [p.top_k or (min(NUCLEUS_GUESS, num_chunks) if p.top_p < 1 else 0) for p in params]
    wanted = [k if k <= num_chunks else 0 for k in wanted]
    if not any(wanted):
        return lowest
    maxima = scores[:, : num_chunks * CHUNK].unflatten(-1, (num_chunks, CHUNK)).amax(dim=-1)
    k = torch.tensor(wanted, device=scores.device)
    kth = maxima.sort(dim=-1, descending=True).values.gather(-1, (k - 1).clamp(min=0)[:, None]).squeeze(-1)
    kth -= kth.abs() * 1e-6  # scores a little lower may be equal after temperature
    return torch.where(k > 0, torch.maximum(kth, lowest), lowest)


def _at_least(scores: torch.Tensor, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of each row with a score of `floor` [N] or more: ids and scores [N, K], ids ascending, then -inf."""
    reached = scores >= floor[:, None]
    rows, ids = reached.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(scores))
    slots = torch.arange(len(ids), device=scores.device) - (counts.cumsum(dim=-1) - counts)[rows]
    shape = (len(scores), max(1, int(counts.max())))
    table = torch.zeros(shape, dtype=torch.int64, device=scores.device)
    table[rows, slots] = ids
    candidates = torch.full(shape, -math.inf, device=scores.device)
    candidates[rows, slots] = scores[rows, ids]
    return table, candidates


def _filter(
    ids: torch.Tensor,
    candidates: torch.Tensor,
    best: torch.Tensor,
    total: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Applies top-k, top-p, min-p. Returns (kept [N, K], ids and candidates in descending order, short [N]).

    short: the candidates do not hold the nucleus of a row without top-k, which needs more of them.
    Among equals top-k keeps all, as transformers does; top-p drops the lower ids first (there: any of them).
    """
    candidates, order = candidates.sort(dim=-1, stable=True)
    candidates, ids = candidates.flip(-1), ids.gather(-1, order).flip(-1)
    last = (top_k - 1).clamp(min=0, max=candidates.shape[-1] - 1)
    kth = candidates.gather(-1, last[:, None])
    kept = (candidates > -math.inf) & ((candidates >= kth) | (top_k == 0)[:, None])

    ratio = (candidates - best[:, None]).double().exp()  # to the best token's probability
    weights = torch.where(kept, (ratio * WEIGHT_SCALE).round(), 0).long()
    summed = weights.cumsum(dim=-1)
    limit = top_p * torch.where(top_k > 0, summed[:, -1].double(), total)
    inside = (summed - weights).double() < limit[:, None]
    kept &= (inside | (top_p >= 1)[:, None]) & (ratio >= min_p[:, None])
    short = (top_k == 0) & (top_p < 1) & (summed[:, -1].double() < limit)
    return kept, ids, candidates, short


# Logprobs and parameters


def _logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], requests: Sequence[Request]
) -> list[TokenLogprobs | None]:
    results: list[TokenLogprobs | None] = [None] * len(requests)
    rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    if not rows:
        return results
    logprobs = logits[torch.tensor(rows, device=logits.device)].float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, torch.tensor([[token_ids[row]] for row in rows], device=logits.device))
    most = max(requests[row].params.logprobs for row in rows)
    values, ids = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    for row, value, best_values, best_ids in zip(
        rows, chosen.squeeze(-1).tolist(), values.tolist(), ids.tolist(), strict=True
    ):
        count = requests[row].params.logprobs
        top = tuple(zip(best_ids[:count], best_values[:count], strict=True))
        results[row] = TokenLogprobs(token_ids[row], value, top)
    return results
