"""Times of an answer's tokens in a process of one's own."""

from executor.bench.drive import _Answer
from executor.engine.outputs import Output


def test_each_token_has_a_time_and_those_of_one_step_the_same():
    answer = _Answer(0.0, 0.0)
    for token_ids in ((1,), (), (2, 3, 4), (5,)):
        answer(Output("a", 0, "", token_ids, None, None))
    first, *step, last = answer.token_times_s
    assert len(step) == 3 and len(set(step)) == 1 and first < step[0] < last
