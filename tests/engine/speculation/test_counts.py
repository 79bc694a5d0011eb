"""Counts of drafts: what they are made of, and the figures they give."""

import json
from dataclasses import replace

import pytest

from executor.engine.speculation.counts import SpeculationCounts


def test_figures_are_of_what_was_added():
    counts = SpeculationCounts()
    assert counts.figures() == {} and counts.words == ""
    counts.add_drafts(4, 2)
    before = replace(counts)
    counts.add_drafts(3, 3)
    counts.add_drafts(1, 0)
    assert (counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens) == (3, 8, 5)
    assert counts.num_accepted_per_pos == (2, 2, 1, 0)
    assert (counts.acceptance_rate, counts.acceptance_length) == (5 / 8, 1 + 5 / 3)
    told = json.dumps(counts.figures())
    assert told.startswith('{"drafts": 3, "draft_tokens": 8, "accepted_draft_tokens": 5, "acceptance_rate": 0.625, ')
    assert "drafting_gain" not in counts.figures() and "as fast" not in counts.words
    counts.add_time(verify_s=2.0, plain_s=3.0)
    assert counts.gain is None and "as fast" not in counts.words, "one slow step of three would decide"
    assert counts.words == "drafts: 5 of 8 tokens right (62 %), 2.67 tokens a step with drafts"
    since = counts.since(before)
    assert since.num_accepted_per_pos == (1, 1, 1, 0) and since.num_drafts == 2
    assert since + before == counts
    assert sum([since, before], SpeculationCounts()).acceptance_rate == pytest.approx(5 / 8)
    for _ in range(13):
        counts.add_drafts(1, 1)
    assert counts.figures()["drafting_gain"] == 1.5
    assert counts.words.endswith("a step with drafts, such steps 1.50 x as fast as without drafts")
