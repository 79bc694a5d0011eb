"""Which tokens of a row top-k, top-p and min-p leave.

First few candidates are looked at: those of the chunks of the vocabulary with the highest maxima. The result is exact
where they turn out to suffice, and said to be open otherwise; `survivors` then looks at every token that can matter.
Sums of probabilities are taken in integers, or in an order that no other row changes, so that a row's survivors never
depend on the batch. Knows scores only: temperature and filters come as `Filters`.
Scores stay as they are; their distance to the best is what temperature divides, in float64. A quotient of the score
itself would lose, at a temperature of 1e-6, what tells two tokens apart.
Legend: N rows, V vocabulary, C chunks of CHUNK tokens (V = C * CHUNK), K candidates of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from executor.device.ops import Send
from executor.schedule.request import SamplingParams

CHUNK_BITS = 7
CHUNK = 1 << CHUNK_BITS
MIN_TEMPERATURE = 1e-37  # below, its inverse overflows float32; scores that differ by so little are equal
MAX_TEMPERATURE = 1e30  # above, its inverse vanishes in float32; the distribution is flat either way
REACH = 26.01
"""How far below the best score a token can lie and still win: noise of 32 bits is between -3.13 and 22.88."""
WEIGHT_SCALE = float(1 << 40)  # fixed point: 2**18 tokens of weight 1 stay far below 2**63
FIRST_GUESS = 64  # candidates of a row without top-k, at first
SECOND_GUESS = 1024  # and where these are too few
_SPARE_CHUNKS = 4  # beyond the wanted: equal maxima at the edge would leave the row open
_SPARE_CANDIDATES = 16


@dataclass(frozen=True)
class Filters:
    """The parameters of N rows on the device: one copy brought them there."""

    temperature: torch.Tensor  # float64 [N]
    reach: torch.Tensor  # float64 [N]: how far below the best, after temperature, a token can matter
    top_k: torch.Tensor  # int64 [N], 0: none
    top_p: torch.Tensor  # float64 [N]
    min_p: torch.Tensor  # float64 [N]
    host_temperature: tuple[float, ...]

    @staticmethod
    def of(params: Sequence[SamplingParams], send: Send) -> "Filters":
        """`send`: brings an array to the device."""
        table = np.empty((5, len(params)))
        table[:4] = np.array([(usable_temperature(p), _reach(p), p.top_p, p.min_p) for p in params]).T
        table[4] = np.array([p.top_k for p in params], dtype=np.int64).view(np.float64)
        sent = send(table)
        return Filters(sent[0], sent[1], sent[4].view(torch.int64), sent[2], sent[3], tuple(table[0].tolist()))

    def picked(self, index: torch.Tensor, numbers: np.ndarray) -> "Filters":
        """Those of some rows, int64 [M]: `index` on the device, `numbers` the same on the host."""
        fields = (self.temperature, self.reach, self.top_k, self.top_p, self.min_p)
        host = np.array(self.host_temperature)[numbers].tolist()
        return Filters(*(each.index_select(0, index) for each in fields), tuple(host))


@dataclass(frozen=True)
class Kind:
    """Which filters some rows have, and how many candidates they are expected to need: such rows go together."""

    count: int
    top_k: bool
    top_p: bool
    min_p: bool

    @staticmethod
    def of(params: SamplingParams, is_wide: bool = False) -> "Kind":
        # In steps of an eighth of a power of two: few kinds, and little more than is needed.
        step = max(8, 1 << max(0, params.top_k.bit_length() - 3))
        count = -(-params.top_k // step) * step if params.top_k else FIRST_GUESS
        if is_wide:
            count = max(count, SECOND_GUESS)
        return Kind(count, params.top_k > 0, params.top_p < 1, params.min_p > 0)

    @property
    def needs_total(self) -> bool:
        """Top-p without top-k is a share of the whole vocabulary's probability."""
        return self.top_p and not self.top_k


ALL_KINDS = Kind(0, True, True, True)


def usable_temperature(params: SamplingParams) -> float:
    """The temperature of a row that samples, within bounds beyond which no answer changes and numbers overflow."""
    return min(max(params.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)


def relative(scores: torch.Tensor, best: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """float64: how far float32 `scores` lie from `best`, their row's highest, after temperature."""
    return scores.double().sub_(best).div_(temperature)


def _reach(params: SamplingParams) -> float:
    # The nucleus of what top-k leaves is a share of all that top-k leaves, also of what min-p drops afterwards.
    if params.min_p > 0 and (params.top_k == 0 or params.top_p == 1):
        return min(REACH, 0.001 - math.log(params.min_p))
    return REACH


def likely_survivors(
    scores: torch.Tensor, maxima: torch.Tensor, rows: torch.Tensor, filters: Filters, kind: Kind
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The survivors of `rows`, all of one kind, if they are among about `kind.count` of each row's best tokens.

    scores float32 [R, V]; rows int64 [N], on their device; maxima [N, C] of the rows. Returns (ids [N, K], scores
    [N, K] descending, -inf where dropped, open [N]: the row needs `survivors`). Shapes depend on `kind` alone.
    """
    num_chunks = maxima.shape[-1]
    num_near = min(num_chunks, kind.count + _SPARE_CHUNKS)
    top, chunks = maxima.topk(num_near, dim=-1)
    near = scores.view(-1, CHUNK).index_select(0, torch.add(chunks, rows[:, None], alpha=num_chunks).flatten())
    near = near.view(len(chunks), num_near * CHUNK)
    num_kept = min(num_near * CHUNK, kind.count + kind.count // 4 + _SPARE_CANDIDATES)
    candidates, places = near.topk(num_kept, dim=-1)
    # Nothing that is left out lies above this.
    bound = candidates[:, -1]
    if num_near < num_chunks:
        bound = torch.maximum(bound, top[:, -1])
    elif num_kept == num_near * CHUNK:
        bound = torch.full_like(bound, -math.inf)
    ids = chunks.gather(-1, places >> CHUNK_BITS).mul_(CHUNK).add_(places & (CHUNK - 1))
    total = None
    if kind.needs_total:
        total = total_weight(scores if len(rows) == len(scores) else scores[rows], top[:, 0], filters)
    kept, ids, candidates, is_open = _filter(ids, candidates, top[:, 0], total, filters, kind, bound)
    return ids, candidates.masked_fill_(~kept, -math.inf), is_open


def survivors(scores: torch.Tensor, filters: Filters) -> tuple[torch.Tensor, torch.Tensor]:
    """scores float32 [N, V] -> (ids, scores) [N, K], scores descending; what the filters drop has score -inf.

    Tokens out of reach of the best are dropped as well: no noise can make them win.
    """
    maxima = chunk_maxima(scores)
    best = maxima.amax(dim=-1)
    total = total_weight(scores, best, filters)
    lowest = (best.double() - filters.temperature * filters.reach).float()
    nothing = torch.full_like(best, -math.inf)
    for floor in (_floor(maxima, lowest, filters), lowest):
        ids, candidates = _at_least(scores, floor)
        kept, ids, candidates, short = _filter(ids, candidates, best, total, filters, ALL_KINDS, nothing)
        if not bool((short & (floor > lowest)).any()):
            break
    return ids, candidates.masked_fill_(~kept, -math.inf)


def chunk_maxima(scores: torch.Tensor) -> torch.Tensor:
    """`[N, V] -> [N, C]`: NaN where a chunk has one."""
    return scores.view(len(scores), -1, CHUNK).amax(dim=-1)


def total_weight(scores: torch.Tensor, best: torch.Tensor, filters: Filters) -> torch.Tensor:
    """float64 [N]: the sum over all tokens of exp(score / temperature), the best token's being WEIGHT_SCALE.

    scores [N, V]; best [N] of the rows. Each chunk is added up by itself in float32, the chunks in integers: other
    rows and threads change no order.
    """
    num_chunks = scores.shape[-1] // CHUNK
    sums = torch.empty(len(scores), num_chunks, device=scores.device)
    work = torch.empty_like(scores[0])
    for number, row in enumerate(scores):
        torch.sub(row, best[number], out=work)
        work.mul_(1 / filters.host_temperature[number]).exp_()
        torch.sum(work.view(num_chunks, CHUNK), dim=-1, out=sums[number])
    return sums.double().mul_(WEIGHT_SCALE).round_().long().sum(dim=-1).double()


def _floor(maxima: torch.Tensor, lowest: torch.Tensor, filters: Filters) -> torch.Tensor:
    """A score per row [N], `lowest` or more, below which all tokens are filtered out (for top-p: most likely so).

    The k-th best of the maxima of fixed chunks is not above the k-th best score.
    """
    num_chunks = maxima.shape[-1]
    guess = torch.where(filters.top_p < 1, min(SECOND_GUESS, num_chunks), 0)
    k = torch.where(filters.top_k > 0, filters.top_k, guess)
    k = torch.where(k <= num_chunks, k, 0)
    kth = maxima.sort(dim=-1, descending=True).values.gather(-1, (k - 1).clamp(min=0)[:, None]).squeeze(-1)
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
    total: torch.Tensor | None,
    filters: Filters,
    kind: Kind,
    bound: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Applies top-k, top-p, min-p. Returns (kept [N, K], ids and candidates in descending order, short [N]).

    ids, candidates [N, K] in any order; best [N], of the row. All other tokens lie at `bound` [N] or below. short: they
    could have been kept, or have changed what is kept.
    Among equals top-k keeps all, as transformers does; top-p drops the lower ids first (there: any of them).
    `kind` says which filters there are to apply at all; under ALL_KINDS a row may lack any of them.
    """
    ids, order = ids.sort(dim=-1, descending=True)
    candidates, order = candidates.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    kept = candidates > -math.inf
    is_bounded = bound > -math.inf
    short = torch.zeros_like(is_bounded)
    if kind.top_k:
        last = (filters.top_k - 1).clamp_(min=0, max=candidates.shape[-1] - 1)
        kth = candidates.gather(-1, last[:, None]).masked_fill_((filters.top_k == 0)[:, None], -math.inf)
        kept &= candidates >= kth
        short = (kth.squeeze(-1) <= bound) & is_bounded
    if kind.top_p or kind.min_p:
        # To the best token's probability.
        ratio = relative(candidates, best[:, None], filters.temperature[:, None]).exp_()
    if kind.top_p:
        weights = (ratio * WEIGHT_SCALE).round_().masked_fill_(~kept, 0).long()
        summed = weights.cumsum(dim=-1)
        reached = summed[:, -1].double()
        limit = reached
        if total is not None:
            limit = torch.where(filters.top_k > 0, reached, total)
        limit = limit * filters.top_p
        short |= reached < limit
        inside = (summed - weights).double() < limit[:, None]
        kept &= inside | (filters.top_p >= 1)[:, None]
        short &= filters.top_p < 1
    if kind.min_p:
        kept &= ratio >= filters.min_p[:, None]
    if not kind.top_k:
        short |= (kept & (candidates <= bound[:, None])).any(dim=-1) & is_bounded
    return kept, ids, candidates, short
