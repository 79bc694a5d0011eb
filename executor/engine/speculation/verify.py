"""Drafts beside what the model chose."""

from collections.abc import Sequence


def num_right(draft_ids: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafts, from the first on, are what was chosen."""
    for place, token_id in enumerate(draft_ids):
        if chosen[place] != token_id:
            return place
    return len(draft_ids)
