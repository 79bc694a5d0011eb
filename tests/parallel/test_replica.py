"""What a leader tells is what its followers run: every plan, whatever the scheduler does to requests in between."""

import random
from collections import deque

import pytest
import torch

from executor.engine.graphs import DecodeGraphs
from executor.engine.replica import SMALL_BYTES, Replica, deal
from executor.parallel.groups import Group, Parallel
from executor.schedule.plan import GraphShape, Plan, Row
from tests.schedule.fakes import FakeRunner, media, request, scheduler


class Wire(Replica):
    """Broadcasts through a queue instead of a network."""

    def __init__(self, wire: deque, rank: int) -> None:
        super().__init__(Parallel(control=Group(rank, 2, object())), lambda grid: 1.0, shares_experts=False)
        self.wire = wire
        self.leader = rank == 0

    def _broadcast(self, x):
        if self.leader:
            self.wire.append(x.clone())
            return x
        return x.copy_(self.wire.popleft())


@pytest.fixture
def pair() -> tuple[Wire, Wire]:
    wire: deque = deque()
    return Wire(wire, 0), Wire(wire, 1)


@pytest.mark.parametrize("seed", range(6))
def test_followers_run_the_leaders_plans(pair, seed) -> None:
    rng = random.Random(seed)
    leader, follower = pair
    plans = follower.follow()
    # Few blocks: requests are preempted and get others.
    s = scheduler(num_blocks=14, max_num_seqs=4, max_num_batched_tokens=24, max_yield=1 + 2 * (seed % 2))
    runner = FakeRunner(s, random.Random(seed))
    for number in range(12):
        words = [rng.randrange(9) for _ in range(rng.randrange(1, 16))]
        segments = (words, media(f"m{rng.randrange(3)}", 5), [1, 2]) if rng.random() < 0.5 else (words,)
        for segment in segments:
            if not isinstance(segment, list):
                object.__setattr__(segment, "pixels", torch.full((1, 3, 4, 4), number, dtype=torch.uint8))
        params = {"max_new_tokens": rng.randrange(1, 40), "prompt_logprobs": rng.choice([None, 2])}
        s.add(request(f"r{number}", *segments, ignore_eos=True, **params))
    alive, steps, preempted, num_scored = {}, 0, 0, 0
    while s.has_work:
        plan = s.schedule()
        assert leader.lead(plan, graphs=None) is plan
        told = next(plans)
        steps += 1
        assert (told.release, [m.digest for m in told.encode]) == (plan.release, [m.digest for m in plan.encode])
        for ours, theirs in zip(told.encode, plan.encode, strict=True):
            assert torch.equal(ours.pixels, theirs.pixels) and ours.grid_thw == theirs.grid_thw
        for ours, theirs in zip(told.rows, plan.rows, strict=True):
            assert ours.start == theirs.start
            assert (ours.num_tokens, ours.max_yield) == (theirs.num_tokens, theirs.max_yield)
            assert ours.scored == theirs.scored
            theirs.request.prompt_logprobs += [0.0] * len(theirs.scored)
            num_scored += len(theirs.scored)
            end = ours.start + ours.num_tokens
            assert ours.request.token_ids(0, end) == theirs.request.token_ids(0, end)
            assert ours.request.block_ids == theirs.request.block_ids
            assert ours.request.prompt.spans == theirs.request.prompt.spans
            assert (ours.request.prompt.positions == theirs.request.prompt.positions).all()
            alive[theirs.request.id] = theirs.request
        for ended, _ in s.update(plan, runner.execute(plan)):
            if ended.finished:
                preempted += ended.num_preemptions
                leader.forget(ended)
    assert steps > 10 and len(alive) == 12 and preempted
    awaited = [each for each in alive.values() if each.params.prompt_logprobs is not None]
    assert num_scored == sum(len(each.prompt.token_ids) - 1 for each in awaited) > 0
    leader.dismiss()
    assert list(plans) == []


def test_a_decode_step_is_one_small_message(pair) -> None:
    leader, follower = pair
    plans = follower.follow()
    s = scheduler(num_blocks=2048, max_num_seqs=16, max_num_batched_tokens=8192, max_model_len=512)
    runner = FakeRunner(s)
    for number in range(16):
        s.add(request(f"r{number}", [number] * 300, max_new_tokens=8, ignore_eos=True))
    sizes = []
    while s.has_work:
        plan = s.schedule()
        leader.lead(plan, graphs=None)
        sizes.append([len(x) for x in leader.wire])
        assert next(plans).rows
        s.update(plan, runner.execute(plan))
    assert len(sizes[0]) == 2, "the prompts of sixteen requests take a second broadcast"
    assert sizes[-1] == [SMALL_BYTES]


def test_a_whole_prompt_longer_than_a_message_arrives(pair) -> None:
    leader, follower = pair
    s = scheduler(num_blocks=4096, max_num_batched_tokens=20000, max_model_len=20000)
    s.add(request("long", [*range(9000)], max_new_tokens=2))
    leader.lead(s.schedule(), graphs=None)
    assert next(follower.follow()).rows[0].request.prompt.token_ids == [*range(9000)]


class Peers:
    """The other replica's numbers, with which this one's are compared."""

    size, rank = 2, 0

    def __init__(self, *others: int) -> None:
        self.others = others

    def max(self, *numbers: int) -> tuple[int, ...]:
        return tuple(max(pair) for pair in zip(numbers, self.others, strict=True))


class Graphs:
    """Of 1, 2 and 4 rows, in lengths of 1 and 4; none of 4 rows of 4 tokens."""

    shapes = (GraphShape(1, 1), GraphShape(2, 1), GraphShape(1, 4), GraphShape(4, 1), GraphShape(2, 4))
    fitting = DecodeGraphs.fitting


def decode_rows(*drafts: int) -> tuple[Row, ...]:
    asked = [request(f"r{number}", [1, 2], max_new_tokens=9) for number in range(len(drafts))]
    for each in asked:
        each.output_token_ids.append(5)
    return tuple(Row(each, 2, 1, 8, draft_ids=(7,) * count) for each, count in zip(asked, drafts, strict=True))


@pytest.mark.parametrize(
    "drafts, others, graph, padded_tokens",
    [  # of the other replica: tokens, whether it runs eagerly, rows, tokens of its longest row, whether it goes on
        ((0,), (1, 0, 1, 1, 1), (1, 1), 1),
        ((0,), (2, 0, 2, 1, 1), (2, 1), 2),
        ((0, 0), (3, 0, 1, 3, 1), (2, 4), 3),  # its drafts make this one's rows longer
        ((3, 1), (1, 0, 1, 1, 1), (2, 4), 6),
        ((), (4, 0, 1, 4, 1), (1, 4), 4),  # nothing to do here but to help
        ((0, 0, 0), (4, 0, 1, 4, 1), None, 4),  # each had a graph, both together have none
        ((3,), (30, 1, 0, 1, 1), None, 30),  # it reads a prompt
        ((4,), (1, 0, 1, 1, 1), None, 5),  # more drafts than any graph has
    ],
)
def test_replicas_that_share_experts_replay_one_graph(drafts, others, graph, padded_tokens) -> None:
    replica = Replica(Parallel(replicas=Group(0, 2), peers=Peers(*others)), lambda grid: 1.0, shares_experts=True)
    plan = replica.lead(Plan(decode_rows(*drafts)), Graphs())
    assert (plan.graph, plan.padded_tokens) == (graph, padded_tokens)
    assert replica.lead(Plan(decode_rows(*drafts)), None).graph is None


def test_a_replica_of_its_own_replays_what_holds_its_rows() -> None:
    replica = Replica(Parallel(), lambda grid: 1.0, shares_experts=True)
    found = [replica.lead(Plan(decode_rows(*drafts)), Graphs()).graph for drafts in ((0,), (0,) * 3, (0, 2), (0,) * 5)]
    assert found == [(1, 1), (4, 1), (2, 4), None]
    asked = request("r", [1, 2, 3], max_new_tokens=9)
    prompt = Row(asked, 2, 1, 8)  # the last token of a prompt is no decode step: others are expected of its place
    assert replica.lead(Plan((prompt,)), Graphs()).graph is None


def test_pictures_are_dealt_by_cost() -> None:
    assert deal([], 4) == []
    assert deal([3.0, 1.0], 1) == [0, 0]
    costs = [5.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    owners = deal(costs, 2)
    assert sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == owners[0]) == 5.0
    rng = random.Random(0)
    for _ in range(50):
        costs = [rng.uniform(1, 100) for _ in range(rng.randrange(1, 40))]
        owners = deal(costs, 8)
        loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(8)]
        assert max(loads) <= 4 / 3 * max(sum(costs) / 8, max(costs)) + 1e-9  # Graham's bound for largest first


def test_a_plan_made_ahead_says_that_its_tokens_come_later(pair) -> None:
    leader, follower = pair
    plans = follower.follow()
    s = scheduler(max_num_seqs=4)
    runner, num_ahead = FakeRunner(s), 0
    for number in range(3):
        s.add(request(f"r{number}", [number] * 5, max_new_tokens=4 + number, ignore_eos=True))

    def lead(plan: Plan) -> Plan:
        leader.lead(plan, graphs=None)
        told = next(plans)
        assert (told.is_decode, told.continues is not None) == (plan.is_decode, plan.continues is not None)
        places = [(row.start, row.request.block_ids) for row in plan.rows]
        assert [(row.start, row.request.block_ids) for row in told.rows] == places
        for row in told.rows:  # of a plan made ahead the last token is not known
            assert row.start + row.num_tokens - row.request.num_tokens == (plan.continues is not None)
        return plan

    while s.has_work:
        plan = lead(s.schedule())
        tokens = runner.execute(plan)
        while (ahead := s.schedule_ahead(plan)) is not None:
            following = runner.execute(lead(ahead), before=tokens)
            s.update(plan, tokens)
            plan, tokens, num_ahead = ahead, following, num_ahead + 1
        s.update(plan, tokens)
    assert num_ahead == 5
