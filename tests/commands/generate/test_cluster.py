"""A data set over jobs that die: ordered output, resume, a bad row alone, a lost job's rows again."""

import io
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import HashStore

from dataset.sample import Dataset, Sample
from executor.cluster import jobs
from executor.commands.generate.cluster import answer_over
from executor.commands.generate.dealer import MAX_LOSSES
from executor.commands.generate.front import FrontSpread
from executor.commands.generate.rows import failed_row
from executor.commands.generate.run import Printed
from executor.errors import UserError
from executor.parallel.groups import Parallel
from executor.recipe.schema import Recipe, build_recipe
from tests.cluster.fakes import FakeCluster, FakeJob

SAMPLES = [Sample(f"s{index}", ({"role": "user", "content": f"question {index}"},)) for index in range(40)]
COUNTS = ("prompt_tokens", "vision_tokens", "completion_tokens")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOOK_S", 0.005)
    monkeypatch.setattr(jobs, "FIRST_PAUSE_S", 0.005)


def row_of(index: int, number: int) -> dict:
    """An answer, and whose it is."""
    row = failed_row(index, SAMPLES[index], "") | dict.fromkeys(COUNTS, 1)
    return row | {"text": f"answer {index}", "error": None, "finish_reason": "stop", "ttft_ms": 1.0, "tpot_ms": 1.0,
                  "e2e_ms": 1.0, "cached_tokens": number}  # fmt: skip


class Crowd:
    """Jobs that answer out of order, and do with a row what `deeds` says."""

    def __init__(self, recipe: Recipe, samples: list[Sample] = SAMPLES) -> None:
        self.recipe, self.samples = recipe, samples
        self.deeds: dict[int, Callable[[FakeJob], dict | None]] = {}
        self.cluster = FakeCluster(self.body)
        self.num_loaded = 0
        self.asked: Counter[int] = Counter()
        self.barrier = threading.Barrier(2)  # both are ready before the first row is answered

    def body(self, job: FakeJob) -> None:
        dataset = Dataset(Path("questions"), self.samples)
        try:
            spread = FrontSpread(Parallel(store=HashStore()), dataset, self.recipe, 3, job.variables)
            if not spread.start():
                return
            self.num_loaded += 1
            samples = spread.samples()
            held = [next(samples)]
            if len(self.cluster.jobs) <= 2:
                self.barrier.wait(10)
            while True:
                taken = next(samples, "over")
                if taken == "over":
                    return
                held += [taken] if taken else []
                held = [each for each in held if each]
                if job.dying.is_set():
                    spread._connection.shutdown(socket.SHUT_RDWR)
                    return
                if taken is None and held:
                    self.answer(job, spread, held.pop()[0])
                time.sleep(0.001)
        except (RuntimeError, OSError):
            return  # the front door has let it go

    def answer(self, job: FakeJob, spread: FrontSpread, index: int) -> None:
        self.asked[index] += 1
        deed = self.deeds.get(index)
        row = deed(job) if deed else row_of(index, job.number)
        if row is not None:
            spread.send(row)

    def run(self) -> tuple[dict, int, str]:
        out = io.StringIO()
        document, status = answer_over(self.cluster, 2, Dataset(Path("questions"), self.samples), out, Printed())
        return document, status, out.getvalue()


def recipe_of(**data: object) -> Recipe:
    model = {"model_path": "models/tiny/qwen3_vl", "device": "cpu", "dtype": "float32"}
    return build_recipe({"model_config": model, "data_config": data})


def killed_once() -> Callable[[FakeJob], dict | None]:
    victims: list[FakeJob] = []

    def deed(job: FakeJob) -> dict | None:
        if not victims:
            victims.append(job)
            job.die()
            return None
        return row_of(7, job.number)

    return deed


def test_a_dead_job_s_rows_are_answered_and_a_bad_one_fails_alone(tmp_path: Path) -> None:
    results = tmp_path / "answers.jsonl"
    crowd = Crowd(recipe_of(results_path=str(results)))
    crowd.deeds[7] = killed_once()
    crowd.deeds[11] = lambda job: failed_row(11, SAMPLES[11], "the picture cannot be read")
    document, status, printed = crowd.run()
    rows = document["outputs"]
    assert (status, [row["index"] for row in rows]) == (2, list(range(40)))
    assert [row["text"] for row in rows if row["error"] is None] == [f"answer {i}" for i in range(40) if i != 11]
    assert rows[11]["error"] == "s11: the picture cannot be read"
    assert {row["cached_tokens"] for row in rows if row["error"] is None} == {0, 1}, "both have answered some"
    assert crowd.asked[7] == 2 and crowd.cluster.jobs[2].number in (0, 1), "it was started again"
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["index"] for row in found] == list(range(40))
    shown = [line for line in printed.splitlines() if line.startswith("[")]
    assert [line.split("/")[0] for line in shown] == [f"[{number}" for number in range(1, 41)]

    again = Crowd(crowd.recipe)
    document, status, _ = again.run()
    assert status == 0 and again.asked == {11: 1}, "what is answered is not asked again"
    assert document["outputs"][11]["text"] == "answer 11"

    nothing = Crowd(crowd.recipe)
    document, status, _ = nothing.run()
    assert status == 0 and len(document["outputs"]) == 40
    assert not nothing.asked and nothing.num_loaded == 0, "no weights are read for nothing"


def test_a_row_that_kills_is_given_up() -> None:
    crowd = Crowd(recipe_of())
    crowd.deeds[3] = lambda job: job.die()
    document, status, _ = crowd.run()
    assert status == 2
    assert [row["index"] for row in document["outputs"] if row["error"] is not None] == [3]
    assert document["outputs"][3]["error"] == f"s3: {MAX_LOSSES} jobs have died while they answered it; see their logs"


def test_a_node_with_another_data_set_is_refused() -> None:
    crowd = Crowd(recipe_of())
    with pytest.raises(UserError, match="copy the same files to every node"):
        answer_over(crowd.cluster, 2, Dataset(Path("questions"), SAMPLES[:-1]), io.StringIO(), Printed())


def test_a_job_that_cannot_start_ends_the_command_with_its_reason() -> None:
    cluster = FakeCluster(lambda job: job.die("model_config.model_path: there is no folder", 2))
    with pytest.raises(UserError, match="there is no folder"):
        answer_over(cluster, 2, Dataset(Path("questions"), SAMPLES), io.StringIO(), Printed())
