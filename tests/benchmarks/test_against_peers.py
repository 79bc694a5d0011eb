"""What the comparison with other engines asks, times and prints; the engines themselves are not run here."""

import json
import random

import pytest
from transformers import AutoTokenizer

from tests.benchmarks.against_peers import table
from tests.benchmarks.peers import checkpoint
from tests.benchmarks.peers.ours import Ours
from tests.benchmarks.peers.timing import Question, timed_answer

TOKENIZER = AutoTokenizer.from_pretrained(checkpoint.TINY)


class Scripted:
    """A peer whose steps bring what the script says."""

    def __init__(self, counts: list[int], lengths: list[int]) -> None:
        self.counts, self.lengths = counts, lengths

    def answer(self, questions, num_tokens, tick):
        for count in self.counts:
            tick(count)
        return self.lengths


def two_questions() -> list[Question]:
    draw = random.Random(3)
    return [checkpoint.question(TOKENIZER, draw, 40) for _ in range(2)]


def test_a_question_has_the_same_tokens_in_every_form():
    question = checkpoint.question(TOKENIZER, random.Random(7), 97)
    assert len(question.token_ids) == question.num_tokens == 97
    assert TOKENIZER(question.prompt)["input_ids"] == question.token_ids
    assert checkpoint.rendered(TOKENIZER, question.message) == question.prompt


def test_our_engine_gets_the_tokens_that_the_others_are_given(tmp_path):
    """timed_answer asserts the lengths of prompts and answers."""
    peer = Ours(checkpoint.TINY, "bfloat16")
    first, steps = timed_answer(peer, two_questions(), 5)
    assert first > 0 and len(steps) == 4
    peer.engine.close()


def test_only_steps_of_all_prompts_are_decode_steps():
    """One prompt comes to its first token before the other: those steps do not count."""
    _, steps = timed_answer(Scripted([0, 1, 2, 2, 2, 1], [40, 40]), two_questions(), 4)
    assert len(steps) == 2


@pytest.mark.parametrize("peer", [Scripted([2, 2], [40, 40]), Scripted([2, 2, 2], [40, 41])])
def test_missing_tokens_and_other_prompts_are_no_measurement(peer):
    with pytest.raises(AssertionError):
        timed_answer(peer, two_questions(), 3)


def test_ratios_are_taken_within_a_round():
    """The machine was twice as slow in round 1: the ratios are the same, and 1.5 and 2.5 have the median 2."""
    rows = [("ours:bfloat16", 0, 0.1), ("ours:bfloat16", 1, 0.2), ("vllm:float32", 0, 0.15), ("vllm:float32", 1, 0.5)]
    lines = [{"peer": peer, "round": number, "decode_1": {"median_s": s}} for peer, number, s in rows]
    printed = table(json.loads(json.dumps(lines)))
    assert "| ours:bfloat16 | 150 ms |" in printed
    assert "| vllm:float32 | **2.00 x (1.50-2.50)** 325 ms |" in printed
