"""What is drafted: prompt lookup and lookahead, on tokens alone."""

import random
import tracemalloc

import pytest

from executor.engine.speculation.lookahead import LookaheadProposer
from executor.engine.speculation.ngram import NgramProposer
from executor.engine.speculation.own_text import PLACEHOLDER, text_of
from executor.schedule.plan import Plan, Row
from executor.schedule.request import Prompt, Request, SamplingParams, Span


def request_of(prompt, spans=(), name="r"):
    return Request(name, Prompt(list(prompt), None, 0, spans=spans), SamplingParams())


def row_of(request, draft_ids=()):
    return Row(request, request.num_tokens - 1, 1, 16, draft_ids=draft_ids)


def draft(proposer, request, count):
    (found,) = proposer.propose(Plan((row_of(request),)), [count])
    return found


def looked_up(tokens, least, most, count):
    """Prompt lookup by its definition."""
    for size in range(most, least - 1, -1):
        last = tokens[-size:]
        if len(last) < size or PLACEHOLDER in last:
            continue
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == last:
                found = (tokens[end:] * count)[:count]
                return tuple(found[: found.index(PLACEHOLDER)] if PLACEHOLDER in found else found)
    return ()


@pytest.mark.parametrize("seed", range(60))
def test_ngram_is_the_latest_longest_match(seed):
    rng = random.Random(seed)
    least, vocab = rng.choice([1, 2, 3]), rng.choice([2, 3, 6])
    proposer = NgramProposer(least, least + rng.randrange(3))
    runs = [(rng.randrange(2), rng.randrange(1, 9)) for _ in range(rng.randrange(8))]
    prompt, spans = [rng.randrange(vocab)], []
    for is_picture, length in runs:
        if is_picture:
            spans.append(Span(len(prompt), length, 0))
        prompt += [7777 if is_picture else rng.randrange(vocab) for _ in range(length)]
    request = request_of(prompt, tuple(spans))
    num_found = 0
    for _ in range(80):
        tokens = text_of(request.prompt) + request.output_token_ids
        wanted = rng.randrange(1, 8)
        found = draft(proposer, request, wanted)
        assert found == looked_up(tokens, proposer.least, proposer.most, wanted)
        assert 7777 not in found
        num_found += bool(found)
        request.output_token_ids += [rng.randrange(vocab) for _ in range(rng.randrange(1, 4))]
    assert num_found


def test_hash_collisions_are_told_apart(monkeypatch):
    monkeypatch.setattr("executor.engine.speculation.ngram.FACTOR", 0)  # all n-grams have the same hash
    request = request_of([1, 2, 3, 4, 5, 6, 2, 3])
    assert draft(NgramProposer(2, 2), request, 3) == (4, 5, 6)


def test_ngram_holds_little_of_a_long_prompt():
    prompt = [random.Random(0).randrange(150_000) for _ in range(32_768)]
    request = request_of(prompt)
    proposer = NgramProposer(2, 4)
    tracemalloc.start()
    draft(proposer, request, 1)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 80 * len(prompt)
    proposer.forget(request)
    assert not proposer._texts


def test_ngram_reads_only_new_tokens():
    class Counted(list):
        num_read = 0

        def __getitem__(self, key):
            found = list.__getitem__(self, key)
            Counted.num_read += len(found) if isinstance(key, slice) else 1
            return found

    request = request_of([1, 2, 3] * 100)
    request.output_token_ids = Counted()
    proposer = NgramProposer(2, 4)
    for token_id in range(200):
        request.output_token_ids.append(token_id)
        draft(proposer, request, 4)
    assert Counted.num_read == 200


def test_drafts_of_a_text_that_repeats_itself_have_no_end():
    for proposer in (NgramProposer(1, 2), LookaheadProposer(level=2, window=1, guess_set_size=2)):
        assert draft(proposer, request_of([5, 1, 2, 1, 2]), 7) == (1, 2, 1, 2, 1, 2, 1)


def test_lookahead_goes_on_as_the_text_did():
    request = request_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 1])
    proposer = LookaheadProposer(level=3, window=4, guess_set_size=2)
    assert draft(proposer, request, 5) == (2, 3, 4, 5, 6)
    assert draft(proposer, request, 1) == (2,)
    request.output_token_ids.append(77)
    assert draft(proposer, request, 5) == ()


def test_lookahead_follows_the_text_that_was_right_last():
    """Behind 0 the latest n-gram says 7; the answer copies the first row, and there 0 is followed by 5."""
    request = request_of([3, 4, 0, 5, 6, 0, 7, 8, 0, 9, 9, 3])
    proposer = LookaheadProposer(level=2, window=1, guess_set_size=3)
    assert draft(proposer, request, 4) == (4, 0, 5, 6)
    request.output_token_ids += [4, 0]
    assert draft(proposer, request, 4) == (5, 6, 0, 7)
    request.output_token_ids += [5, 6, 0, 9]  # here it leaves it
    assert draft(proposer, request, 1) == (3,)


def test_lookahead_tries_the_ngram_used_last_and_forgets_the_oldest():
    request = request_of([1, 10, 1, 11, 1, 12, 1, 10, 1])
    proposer = LookaheadProposer(level=2, window=1, guess_set_size=2)
    assert draft(proposer, request, 1) == (10,)
    pool = proposer._texts[request.id]
    assert list(pool._sets[1]) == [(12,), (10,)]


def test_lookahead_has_no_placeholders():
    prompt = [1, 2, 3, 9, 9, 9, 4, 5, 6, 1, 2, 3]
    request = request_of(prompt, (Span(3, 3, 0),))
    proposer = LookaheadProposer(level=2, window=6, guess_set_size=3)
    assert draft(proposer, request, 5) == ()  # 3 is followed by a picture only
    assert 9 not in proposer.trailing(row_of(request), (), 6)
    request.output_token_ids.append(2)
    assert draft(proposer, request, 5) == (3, 2, 3, 2, 3)


def test_lookahead_learns_ngrams_from_successive_steps():
    """A model that expects token 100 + place everywhere: three steps' expectations are an n-gram."""
    request = request_of([1, 2, 3])
    proposer = LookaheadProposer(level=3, window=4, guess_set_size=3)
    draft(proposer, request, 1)
    tail = proposer.trailing(row_of(request), (), 4)
    assert len(tail) == 4 and set(tail) <= {1, 2, 3}
    for step in range(3):
        place = request.num_tokens
        tail = proposer.trailing(row_of(request), (), 4)
        chosen = [50 + step, *range(100 + place + 1, 100 + place + 5)]  # the first draft is never right
        proposer.observe(row_of(request, tail), chosen)
        request.output_token_ids.append(chosen[0])
    place = request.num_tokens
    expected = proposer.trailing(row_of(request), (), 3)
    assert expected == (100 + place, 100 + place + 1, 100 + place + 2)
    request.output_token_ids.append(100 + place)
    assert draft(proposer, request, 2) == (100 + place + 1, 100 + place + 2)


def test_lookahead_forgets():
    request = request_of([1, 2, 3, 1])
    proposer = LookaheadProposer(4, 5, 5)
    draft(proposer, request, 2), proposer.trailing(row_of(request), (), 2)
    assert proposer._texts and proposer._windows
    proposer.forget(request)
    assert not proposer._texts and not proposer._windows
