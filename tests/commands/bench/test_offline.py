"""`bench latency` and `bench throughput` over a tiny checkpoint, in this process."""

import io
import json
import re
from pathlib import Path

import pytest

from executor.bench import probe
from executor.bench.results import load
from executor.bench.statistics import figures
from executor.commands.bench import run as bench
from executor.errors import UserError
from executor.recipe.schema import load_recipe
from tests.reference import REPO

TEXTS = ["Name a colour.", "Count to three, please.", "What is two and two?"]


@pytest.fixture(autouse=True)
def short_probe(monkeypatch):
    """The speeds of this machine matter to no test."""
    for name, value in (("READ_BYTES", 2**22), ("ROWS", 16), ("SIZE", 256), ("TRY_S", 0.0)):
        monkeypatch.setattr(probe, name, value)


@pytest.fixture
def recipe(tmp_path):
    """Three short texts, five tokens each, one repetition more than none."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": text}) + "\n" for text in TEXTS))
    overrides = [
        *("data_config.dataset=jsonl", f"data_config.dataset_path={rows}", f"model_config.output_path={tmp_path}"),
        *("generation_config.max_new_tokens=5", "bench_config.repetitions=2", "scheduler_config.num_blocks=64"),
    ]
    return load_recipe(REPO / "config" / "quickstart.yaml", overrides)


def measured(recipe):
    out = io.StringIO()
    document, status = bench.run(recipe, out)
    return document, status, out.getvalue()


def test_latency_measures_each_batch_size(recipe):
    recipe = recipe.replace(bench={"mode": "latency", "batch_sizes": (1, 3)})
    document, status, printed = measured(recipe)
    assert status == 0
    assert [point["batch_size"] for point in document["points"]] == [1, 3]
    assert [point["requests"] for point in document["points"]] == [1, 3]
    assert [point["output_tokens"] for point in document["points"]] == [5, 15]  # end tokens end no answer
    assert printed.count(" Serving Benchmark Result ") == 2
    best = max(document["points"], key=lambda point: point["output_tokens_per_s"])
    assert document["tpot_ms"] == best["tpot_ms"] and document["load"] == best["load"]
    report = load(Path(document["results_path"]))
    assert [len(point.runs) for point in report.points] == [2, 2]  # the warm-up is not among them
    for point in report.points:
        found = figures(point.runs)
        assert found["failed"].most == 0 and found["cached_tokens"].most == 0  # every run begins with empty caches
        for measured_run in point.runs:
            for request in measured_run.requests:
                times = (request.sent_s, *request.token_times_s, request.ended_s, measured_run.duration_s)
                assert len(request.token_times_s) == 5 and list(times) == sorted(times)
            assert 0 < measured_run.model_tpot_s < measured_run.duration_s
            steps_s = sum(seconds for name, seconds in measured_run.stages_s.items() if name != "media")
            assert 0 < steps_s <= measured_run.duration_s
            assert measured_run.peak_memory_bytes > 2**20 and measured_run.floor_s > 0
        assert point.floor.origin == "measured" and point.floor.tpot_s > 0 and point.floor.ttft_s > 0
    assert 0 < report.startup.weights_s <= report.startup.first_token_s


def test_tokens_of_a_step_with_drafts_are_counted(recipe):
    """Of one request: all its tokens but the first share the time of the decode steps, however many a step gave."""
    speculative = {"method": "ngram", "ngram_min": 1, "adaptive": False}
    recipe = recipe.replace(speculative=speculative, generation={"max_new_tokens": 40, "ignore_eos": True})
    document, _, _ = measured(recipe.replace(bench={"mode": "latency", "batch_sizes": (1,), "warmups": 0}))
    (point,) = load(Path(document["results_path"])).points
    assert all(run.beside["accepted_draft_tokens"] > 0 for run in point.runs)
    for run in point.runs:
        assert run.model_tpot_s == pytest.approx(run.stages_s["decode"] / 39, rel=0.01)
    assert point.floor.tpot_s * 39 < point.runs[-1].floor_s


def test_a_batch_that_is_none_and_answers_that_are_cut_are_told(recipe, caplog):
    """Of three rows the pool has room for two; the context ends answers before their twelve tokens."""
    scheduler = {"max_model_len": 32, "num_blocks": 4, "block_size": 16}
    recipe = recipe.replace(scheduler=scheduler, generation={"max_new_tokens": 12}, bench={"mode": "latency"})
    document, status, _ = measured(recipe.replace(bench={"batch_sizes": (3,), "warmups": 0, "repetitions": 1}))
    assert status == 0 and document["output_tokens"] < 36
    assert re.search("at most [12] of its 3 requests", caplog.text)
    assert "answers ended before max_new_tokens" in caplog.text


def test_keys_of_another_mode_are_told(caplog):
    settings = ["bench_config.mode=throughput", "bench_config.request_rates=[2]", "bench_config.batch_sizes=[3]"]
    with caplog.at_level("WARNING"):
        bench.check(load_recipe(REPO / "config" / "quickstart.yaml", settings))
    assert [record.message for record in caplog.records] == [
        "bench_config.batch_sizes: got (3,), which has no effect on bench throughput; what reads it: latency",
        "bench_config.request_rates: got (2.0,), which has no effect on bench throughput; what reads it: serve",
    ]


def test_throughput_asks_all_at_once_and_names_what_failed(recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + json.dumps({"question": "What?", "image": "none.png"}) + "\n")
    document, status, printed = measured(recipe.replace(bench={"warmups": 0, "repetitions": 1}))
    assert status == 0  # a failed request is a result
    assert (document["mode"], document["requests"], document["failed"]) == ("throughput", 4, 1)
    assert document["output_tokens"] == 15
    assert "none.png" in next(iter(document["errors"])) and list(document["errors"].values()) == [1]
    assert "Failed requests:                         1" in printed.splitlines()
    assert "points" not in document


def test_all_failed_is_still_a_report(recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "What?", "image": "none.png"}) + "\n")
    document, status, printed = measured(recipe)
    assert status == 2 and document["failed"] == document["requests"] == 1
    assert document["ttft_ms"] == {"mean": None, "median": None, "p99": None}
    assert "Mean TTFT (ms):                          -" in printed.splitlines()


def test_answers_may_end_where_the_recipe_says_so(recipe):
    """An end token of the model's ends an answer only where ignore_eos is false."""
    recipe = recipe.replace(generation={"max_new_tokens": 200}, bench={"warmups": 0, "repetitions": 1})
    document, _, _ = measured(recipe.replace(generation={"ignore_eos": False}))
    assert document["output_tokens"] < 3 * 200


def test_results_go_where_the_recipe_says(recipe, tmp_path):
    place = tmp_path / "deep" / "mine.json"
    recipe = recipe.replace(bench={"results_path": str(place), "warmups": 0, "repetitions": 1})
    document, _, printed = measured(recipe)
    assert document["results_path"] == str(place) and f"results: {place}" in printed
    assert load(place).workload["max_new_tokens"] == 5


def test_files_of_other_kinds_are_not_overwritten(recipe, tmp_path):
    place = tmp_path / "mine.txt"
    place.write_text("dear")
    with pytest.raises(UserError, match="holds no results of bench"):
        measured(recipe.replace(bench={"results_path": str(place)}))
    assert place.read_text() == "dear"


def test_an_interruption_leaves_what_was_measured(recipe, tmp_path, monkeypatch):
    from executor.commands.bench import measuring

    place, whole = tmp_path / "mine.json", measuring.drive
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(measuring, "drive", interrupted)
    recipe = recipe.replace(bench={"results_path": str(place), "warmups": 1, "repetitions": 3})
    with pytest.raises(KeyboardInterrupt, match="mine.json"):
        measured(recipe)
    assert [len(point.runs) for point in load(place).points] == [1]


@pytest.mark.parametrize(
    "bench_section, generation, words",
    [
        ({"mode": "latency", "batch_sizes": (1, 64)}, {}, "max-num-seqs 64"),
        ({}, {"n": 2}, "one answer"),
        ({"results_path": "/dev/null/a.json"}, {}, "cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(recipe, monkeypatch, bench_section, generation, words):
    from executor.commands.bench import offline

    monkeypatch.setattr(offline, "engine_of", lambda *arguments: pytest.fail("nothing is loaded for it"))
    with pytest.raises(UserError, match=words):
        bench.run(recipe.replace(bench=bench_section, generation=generation), io.StringIO())


def test_drafts_are_told_of_each_run(recipe):
    speculative = {"method": "ngram", "ngram_min": 1, "adaptive": False}
    recipe = recipe.replace(speculative=speculative, generation={"max_new_tokens": 40}, bench={"mode": "latency"})
    document, status, printed = measured(recipe.replace(bench={"batch_sizes": (1, 2), "repetitions": 1}))
    assert status == 0
    for point in document["points"]:
        beside = point["beside"]
        assert 0 < beside["accepted_draft_tokens"] <= beside["draft_tokens"]
        assert beside["acceptance_rate"] == pytest.approx(
            beside["accepted_draft_tokens"] / beside["draft_tokens"], abs=1e-4
        )
        assert 1 < beside["acceptance_length"] <= 8
    assert printed.count("Acceptance length:") == 2 and "Server and Client" not in printed
