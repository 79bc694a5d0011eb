"""An engine over a tiny checkpoint, one for each file that has none of its own, and what every test leaves of it."""

from collections.abc import Iterator

import pytest

from executor.engine.engine import Engine
from tests.engines import engine_over
from tests.reference import REPO


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with engine_over(REPO / "models" / "tiny" / "qwen3_vl", max_num_seqs=6) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        assert not engine.has_work
        engine.scheduler.check()
        engine.runner.sampler.check(())
