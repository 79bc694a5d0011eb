"""Lays the masks of grammars over the logits of their rows; rows without one are neither read nor written.

Legend: R rows, N rows with a mask, V width of the logits' rows.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from executor.engine.grammar import GrammarFault
from executor.engine.places import Places
from executor.schedule.request import GRAMMAR_ENDS


@contextmanager
def masked(scores: torch.Tensor, places: Places) -> Iterator[dict[int, str]]:
    """`scores` float32 [R, V], contiguous, with -inf where a request's grammar allows no token; in the context only.

    Gives the rows whose grammar has failed, and why; of one request's rows the first of them alone, since it goes no
    further. A row that has NaN or +inf anywhere still has a NaN: it is a fault of the row and must show.
    """
    rows, masks, faults = [], [], {}
    for number, request in enumerate(places.requests):
        if request.matcher is None:
            continue
        drafts = places.drafts_of(number)
        for count, row in enumerate(places.rows_of(number)):
            try:
                mask = request.matcher.barred(drafts[:count])
            except GrammarFault as error:
                faults[row] = f"{GRAMMAR_ENDS}: {error}"
                break
            if mask is not None:
                rows.append(row)
                masks.append(mask)
    if not rows:
        yield faults
        return
    barred = np.ones((len(rows), scores.shape[-1]), dtype=bool)
    for number, mask in enumerate(masks):
        barred[number, : len(mask)] = mask
    index = None if len(rows) == places.num_rows else torch.tensor(rows, device=scores.device)
    before = scores.clone() if index is None else scores.index_select(0, index)
    bound = scores if index is None else before.clone()
    bound.masked_fill_(torch.from_numpy(barred).to(scores.device), -math.inf)
    is_broken = ~(before.amax(dim=-1) < math.inf)  # also of NaN
    bound[:, 0].masked_fill_(is_broken, math.nan)
    if index is not None:
        scores.index_copy_(0, index, bound)
    try:
        yield faults
    finally:
        if index is None:
            scores.copy_(before)
        else:
            scores.index_copy_(0, index, before)
