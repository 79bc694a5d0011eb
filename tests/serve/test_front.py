"""Rank 0 and the leaders of its job's other replicas find each other, share, and end together."""

import asyncio
from contextlib import AsyncExitStack

from torch.distributed import HashStore

from executor.commands.serve.front import find_front, with_others
from executor.parallel.groups import Group, Parallel
from executor.recipe.schema import build_recipe
from executor.serve.gate import call
from executor.serve.remote import attend
from tests.serve.fakes import FakeBackend, ask_of

RECIPE = build_recipe({"model_config": {"model_path": "m"}, "scheduler_config": {"max_num_seqs": 2}})


def test_leaders_attend_rank_0_until_its_end() -> None:
    store = HashStore()
    places = [Parallel(world=Group(rank, 4, "h"), replicas=Group(rank // 2, 2, "h"), store=store) for rank in (0, 2)]
    backends = [FakeBackend(), FakeBackend()]

    async def leader() -> None:
        front, hello = await find_front(RECIPE, places[1], {})
        assert hello == {"rank": 2}
        await attend(await call(front, hello), backends[1])

    async def run() -> None:
        attending = asyncio.ensure_future(leader())
        async with AsyncExitStack() as replicas:
            router = await with_others(backends[0], RECIPE, places[0], replicas)
            for number in range(4):
                router.ask(ask_of(str(number), f"question {number}"))
            while len(backends[1].feeds) < 2:
                await asyncio.sleep(0.002)
            assert len(backends[0].feeds) == 2 and router.num_unfinished == 4
        assert await attending is None

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_job_of_a_cluster_says_who_it_is() -> None:
    variables = {"RECIPE_FRONT": '{"address": "10.0.0.1", "port": 7, "token": "t"}', "RECIPE_REPLICA": "3"}
    front, hello = asyncio.run(find_front(RECIPE, Parallel(replicas=Group(1, 2, "h")), variables))
    assert (front.address, front.port, front.token) == ("10.0.0.1", 7, "t")
    assert (hello["replica"], hello["leader"], hello["leaders"]) == (3, 1, 2)
    assert build_recipe(hello["recipe"]) == RECIPE
