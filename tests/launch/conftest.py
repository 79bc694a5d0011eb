"""A job that is cleared away whatever a test does."""

import pytest

from tests.launch.jobs import Job


@pytest.fixture
def job(tmp_path):
    started = Job(tmp_path)
    yield started
    started.clear()
