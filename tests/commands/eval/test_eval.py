"""`eval` with the real engine over a tiny checkpoint: scores, failures, resuming, ranks, and what is refused."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from executor.commands.eval import run as command
from executor.errors import UserError
from executor.evaluate.interval import estimate_of
from executor.evaluate.runs import read_run
from executor.recipe.schema import Recipe, build_recipe
from tests.launch.jobs import Job
from tests.reference import REPO

MEDIA = REPO / "dataset" / "media"
OF_NOW = ("ttft_ms", "tpot_ms", "e2e_ms", "prepare_ms", "cached_tokens")  # what differs between equal runs


def recipe_of(folder: Path, **sections: dict) -> Recipe:
    tree = {
        "model_config": {
            **{"model_path": "models/tiny/qwen3_vl", "device": "cpu", "dtype": "float32"},
            "output_path": str(folder / "output"),
        },
        "scheduler_config": {"max_num_seqs": 4, "block_size": 16},
        "generation_config": {"max_new_tokens": 48},
    }
    for name, fields in sections.items():
        tree[f"{name}_config"] = tree.get(f"{name}_config", {}) | fields
    return build_recipe(tree)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def no_engine(*opened):
    raise AssertionError("an engine was made")


@pytest.fixture
def own(tmp_path: Path) -> dict:
    """data_config of three questions: one is answered right, one is wrong whatever is said, one has no picture."""
    told = json.loads((MEDIA / "questions.json").read_text())["word.png"][0]
    rows = [
        {"question": told["question"], "image": str(MEDIA / "word.png"), "answer": told["qwen3"]},
        {"question": told["question"], "image": str(MEDIA / "word.png"), "answer": "no word of this world"},
        {"question": "What?", "image": "later.png", "answer": "three"},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dataset": "jsonl", "dataset_path": str(tmp_path / "mine.jsonl")}


def test_failed_samples_count_as_0_and_are_named_and_tried_again(tmp_path, own):
    out = io.StringIO()
    document, status = command.run(recipe_of(tmp_path, data=own), out=out)
    estimate = estimate_of([1.0, 0.0, 0.0])
    assert (status, document["command"], document["dataset"]) == (2, "eval", "mine.jsonl")
    assert (document["metric"], document["samples"], document["score"]) == ("exact_match", 3, round(1 / 3, 5))
    assert document["ci95"] == [round(estimate.low, 5), round(estimate.high, 5)]
    assert document["failed"] == 1 and document["failed_samples"] == ["mine.jsonl:3"]
    for told in ("33.3 % (95 % interval 6.1 to 79.2), 3 samples, 1 of them failed", "mine.jsonl:3", "greedy"):
        assert told in out.getvalue()
    rows = rows_of(Path(document["rows"]))
    assert [(row["score"], row["error"] is None) for row in rows] == [(1.0, True), (0.0, True), (0.0, False)]
    assert rows[0]["references"] == [rows[0]["extracted"]] and rows[0]["sources"] == [str(MEDIA / "word.png")]
    run = read_run(Path(document["rows"]))
    assert (run.model, run.summary["score"]) == ("qwen3_vl, float32", document["score"])
    assert (
        run.summary["recipe"]["generation_config"]["temperature"] == 0 and "server_config" not in run.summary["recipe"]
    )

    # The picture is there now: only its sample is asked again, in the same file.
    (tmp_path / "later.png").write_bytes((MEDIA / "objects.png").read_bytes())
    document, status = command.run(recipe_of(tmp_path, data=own), out=out)
    assert (status, document["failed"], document["answered_before"]) == (0, 0, 2)
    assert rows_of(Path(document["rows"]))[:2] == rows[:2]


def test_answers_are_kept_and_scored_anew_by_another_metric(tmp_path, own):
    data = own | {"limit": 2, "results_path": str(tmp_path / "rows.jsonl")}
    first, _ = command.run(recipe_of(tmp_path, data=data), out=io.StringIO())
    other, _ = command.run(recipe_of(tmp_path, data=data, eval={"metric": "anls"}), build=no_engine, out=io.StringIO())
    assert (first["metric"], first["score"], other["metric"]) == ("exact_match", 0.5, "anls")
    assert {row["metric"] for row in rows_of(tmp_path / "rows.jsonl")} == {"anls"}
    again, _ = command.run(recipe_of(tmp_path, data=data), build=no_engine, out=io.StringIO())
    kept = ("score", "ci95", "metric", "samples", "failed", "breakdown")
    assert {key: again[key] for key in kept} == {key: first[key] for key in kept}


def test_the_little_world_by_kinds_and_its_first_samples(tmp_path):
    data = {"dataset": "tiny_world", "limit": 11}
    document, status = command.run(recipe_of(tmp_path, data=data), out=io.StringIO())
    assert status == 0 and document["samples"] == 11 and document["score"] >= 0.8
    kinds = document["breakdown"]["kind"]
    assert len(kinds) == 11 and {figures["samples"] for figures in kinds.values()} == {1}
    assert sum(figures["score"] for figures in kinds.values()) / 11 == pytest.approx(document["score"], abs=1e-4)

    # More of them go on from the same file.
    document, _ = command.run(recipe_of(tmp_path, data=data | {"limit": 13}), out=io.StringIO())
    assert (document["samples"], document["answered_before"]) == (13, 11)


def test_a_recipe_that_names_a_temperature_keeps_it(tmp_path, own):
    generation = {"temperature": 0.5, "seed": 3, "max_new_tokens": 4}
    data = own | {"limit": 1}
    document, _ = command.run(recipe_of(tmp_path, data=data, generation=generation), out=io.StringIO())
    assert (document["greedy_by_default"], document["seed"]) == (False, 3)
    assert rows_of(Path(document["rows"]))[0]["seed"] == 3


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"data": {"dataset": "default"}}, "data_config.dataset: default has no metric"),
        ({"data": {"prompt": "What?"}}, "data_config.prompt and media: eval scores a data set"),
        (
            {"data": {"dataset": "default"}, "eval": {"metric": "anls"}},
            "samples have no references to score an answer by",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_before_weights_are_read(tmp_path, sections, says):
    with pytest.raises(UserError, match=says):
        command.run(recipe_of(tmp_path, **sections), build=no_engine, out=io.StringIO())


def test_the_usual_file_is_that_of_the_same_answers(tmp_path):
    def path(**sections):
        return command.usual_path(recipe_of(tmp_path, **sections))

    data = {"dataset": "tiny_world"}
    usual = path(data=data)
    assert usual.parent == tmp_path / "output" / "eval" and usual.name.startswith("tiny_world-qwen3_vl-")
    same = ({"data": data | {"limit": 5}}, {"data": data, "scheduler": {"max_num_seqs": 1}}, {"data": data, "eval": {}})
    assert {path(**sections) for sections in same} == {usual}
    others = (
        {"data": data | {"random_seed": 1}},
        {"data": data | {"system_prompt": "Be brief."}},
        {"data": data, "generation": {"temperature": 1.0}},
        {"data": data, "model": {"kv_cache_dtype": "int8"}},
    )
    assert len({usual, *(path(**sections) for sections in others)}) == 5


def test_a_killed_run_goes_on_and_ends_in_the_same_file(tmp_path):
    line = [sys.executable, "-m", "executor", "config/quickstart.yaml", "eval", "--dataset", "tiny_world"]
    line += ["--num-prompts", "30", "--set", "scheduler_config.max_num_seqs=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(path: Path) -> subprocess.Popen:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*line, "--output", str(path)], cwd=REPO, env=environment, **quiet)

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    first = start(killed)
    deadline = time.monotonic() + 60
    while not (killed.exists() and killed.read_bytes().count(b"\n") >= 3):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert 3 <= len(rows_of_cut(killed)) < 30
    assert start(killed).wait(120) == 0 and start(whole).wait(120) == 0
    found, wanted = ([lasting(row) for row in rows_of(path)] for path in (killed, whole))
    assert found == wanted and len(found) == 30
    scores = [json.loads(path.with_suffix(".summary.json").read_text())["score"] for path in (killed, whole)]
    assert scores[0] == scores[1]


def rows_of_cut(path: Path) -> list[dict]:
    content = path.read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def lasting(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in OF_NOW}


@pytest.mark.parametrize(
    "degrees",
    [
        pytest.param(["parallel_config.attn_tp_size=1"], id="two replicas"),
        pytest.param([], id="two halves", marks=pytest.mark.long),
    ],
)
def test_two_ranks_give_what_one_gives(tmp_path, degrees):
    data = ["data_config.dataset=tiny_world", "data_config.limit=11", "scheduler_config.max_num_seqs=2"]
    job = Job(tmp_path)
    try:
        job.start(*data, *degrees, "parallel_config.world_size=2", run="eval")
        assert job.wait(120) == [0], job.err()
        several = job.document()
    finally:
        job.clear()
    alone, _ = command.run(recipe_of(tmp_path, data={"dataset": "tiny_world", "limit": 11}), out=io.StringIO())
    found, wanted = (
        [(row["id"], row["text"], row["score"]) for row in rows_of(Path(document["rows"]))]
        for document in (several, alone)
    )
    assert found == wanted and several["score"] == alone["score"]


@pytest.mark.parametrize("metric", ["vqa_accuracy", "anls", "box_iou"])
def test_saved_answers_that_another_metric_cannot_score(tmp_path, metric):
    data = {"dataset": "tiny_world", "limit": 11, "results_path": str(tmp_path / "a.jsonl")}
    command.run(recipe_of(tmp_path, data=data), out=io.StringIO())
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(UserError, match="cannot be scored now|answers of another run"):
        command.run(recipe_of(tmp_path, data=data, eval={"metric": metric}), build=no_engine, out=io.StringIO())
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_summary_that_cannot_be_written(tmp_path):
    data = {"dataset": "tiny_world", "limit": 2, "results_path": str(tmp_path / "a.jsonl")}
    (tmp_path / "a.summary.json").mkdir()
    with pytest.raises(UserError, match="the summary cannot be written"):
        command.run(recipe_of(tmp_path, data=data), out=io.StringIO())
    (tmp_path / "a.summary.json").rmdir()
    document, _ = command.run(recipe_of(tmp_path, data=data), build=no_engine, out=io.StringIO())
    assert document["answered_before"] == 2
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.jsonl", "a.summary.json"]


def test_random_prompts_have_no_answers(tmp_path):
    data = {"dataset": "random", "limit": 2}
    with pytest.raises(UserError, match="random has no metric"):
        command.run(recipe_of(tmp_path, data=data, eval={"metric": "anls"}), build=no_engine, out=io.StringIO())
