"""A report written is the report read; other files are refused in words."""

import json

import pytest

from executor.bench.results import Floor, Load, Point, Report, RequestResult, Run, Startup, load, recipe_tree, save
from executor.errors import UserError
from executor.recipe.schema import build_recipe


def report():
    requests = (
        RequestResult(0.0, 0.75, (0.25, 0.5, 0.75), 12, 4, 3, 0),
        RequestResult(0.125, 0.25, error="no such file"),
    )
    run = Run(1.5, requests, {"decode": 0.5, "host": 0.25}, 0.125, 2**30, 0.75)
    recipe = build_recipe({"model_config": {"model_path": "-"}, "server_config": {"api_key": "secret"}})
    points = (
        Point(Load(batch_size=2), (run, run), Floor("measured", 2e10, 1e12, 0.125, 0.0625)),
        Point(Load(request_rate=0.5, concurrency=4), (run,)),
    )
    return Report(
        "latency", "random", "2026-01-02T03:04:05+00:00", recipe_tree(recipe), {"tokens": [8]},
        {"cpu": "x", "cores": 2}, {"torch": "2"}, points, Startup(1.5, 2.0),
    )  # fmt: skip


def test_a_report_survives_its_file(tmp_path):
    path = tmp_path / "deeper" / "a.json"
    save(report(), path)
    assert load(path) == report()


def test_the_servers_key_is_not_written(tmp_path):
    save(report(), tmp_path / "a.json")
    assert "secret" not in (tmp_path / "a.json").read_text()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tree: {**tree, "form": "eval"}, "no results file of bench"),
        (lambda tree: {**tree, "schema_version": 99}, "schema_version 99"),
        (lambda tree: [tree], "no results file of bench"),
        (lambda tree: {key: value for key, value in tree.items() if key != "points"}, "no whole results file"),
        (lambda tree: {**tree, "strange": 1}, "no whole results file"),
        (lambda tree: {**tree, "points": [{"load": {}}]}, "no whole results file"),
    ],
)
def test_other_files_are_refused(tmp_path, change, words):
    path = tmp_path / "a.json"
    save(report(), path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=words):
        load(path)


@pytest.mark.parametrize(
    "place, value",
    [
        *((("points", 0, "runs", 0, "duration_s"), value) for value in (0, -1, None, "1", float("nan"))),
        *((("points", 0, "runs", 0, "requests", 0, "token_times_s"), value) for value in ([None], ["a"], {})),
        (("points", 0, "runs", 0, "requests", 0, "output_tokens"), "x"),
        (("points", 0, "runs", 0, "stages_s"), None),
        (("points", 0, "runs"), []),
        (("points",), []),
        (("recipe",), {}),
        (("machine",), None),
        (("versions",), []),
    ],
)
def test_damaged_files_are_refused(tmp_path, place, value):
    """Each of these was a traceback of `bench compare`, or NaN in its JSON."""
    path = tmp_path / "a.json"
    save(report(), path)
    tree = part = json.loads(path.read_text())
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="no whole results file|holds no JSON"):
        load(path)


def test_what_is_no_file_and_what_is_no_json(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "none.json")
    (tmp_path / "text").write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        load(tmp_path / "text")
    with pytest.raises(UserError, match="cannot be written"):
        save(report(), tmp_path / "text" / "a.json")
