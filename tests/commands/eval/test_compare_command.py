"""`eval compare`: the document, what people read, and pictures that lie in the data set itself."""

import io
import json
import os
from pathlib import Path

import pytest

from executor.commands.eval import compare as command
from executor.commands.eval import run as evaluation
from executor.errors import UserError
from tests.commands.eval.test_eval import recipe_of
from tests.evaluate.report.test_write import data_of, shown
from tests.evaluate.rows_files import row, rows_file


def test_figures_flips_and_the_report(tmp_path):
    first = rows_file(tmp_path / "bf16.jsonl", [row(0), row(1, 0.0), row(2), row(3)])
    second = rows_file(tmp_path / "w8a8.jsonl", [row(0), row(1), row(2, 0.0), row(3, 0.0)])
    out = io.StringIO()
    document, status = command.run(recipe_of(tmp_path), (first, second), out=out)
    json.dumps(document)
    assert (status, document["command"], document["mode"], document["samples"]) == (0, "eval", "compare", 4)
    assert (document["first"]["score"], document["second"]["score"]) == (0.75, 0.5)
    assert document["difference"]["mean"] == -0.25
    assert document["flipped"] == {"worse": ["sample 2", "sample 3"], "better": ["sample 1"]}
    assert Path(document["report"]) == tmp_path / "output" / "eval" / "bf16-beside-w8a8.html"
    assert len(data_of(Path(document["report"]).read_text())["rows"]) == 4
    for told in ("-25.0 [", "worse in B: sample 2, sample 3", "better in B: sample 1", "may be chance", "report"):
        assert told in out.getvalue()


def test_runs_without_a_difference_are_not_said_to_differ_by_chance(tmp_path):
    first, second = (rows_file(tmp_path / f"{name}.jsonl", [row(0), row(1, 0.0)]) for name in "ab")
    out = io.StringIO()
    document, _ = command.run(recipe_of(tmp_path), (first, second), out=out)
    assert "no sample scores differently in B" in out.getvalue() and "chance" not in out.getvalue()
    assert document["difference"]["p_value"] == 1.0 and not document["difference"]["is_real"]


@pytest.mark.parametrize("has_summary", [True, False])
def test_pictures_of_the_little_world_are_drawn_again(tmp_path, has_summary, caplog):
    data = {"dataset": "tiny_world", "limit": 11, "results_path": str(tmp_path / "a.jsonl")}
    evaluation.run(recipe_of(tmp_path, data=data), out=io.StringIO())
    if not has_summary:
        (tmp_path / "a.summary.json").unlink()
    path = tmp_path / "r.html"
    recipe = recipe_of(tmp_path, eval={"report_path": str(path)})
    document, _ = command.run(recipe, (tmp_path / "a.jsonl", tmp_path / "a.jsonl"), out=io.StringIO())
    assert document["report"] == str(path)
    found = [shown(path.read_text(), number) for number in range(11)]  # pictures and clips
    if has_summary:
        assert [[picture.size for picture in pictures] for pictures, _ in found] == [[(112, 112)]] * 11
    else:
        assert [reasons for _, reasons in found] == [["the picture lies in the data set, which is not at hand"]] * 11
        assert "no summary lies beside it" in caplog.text


@pytest.mark.parametrize("place", ["a.jsonl", "b.jsonl", "b.summary.json", "folder", "x" * 300, "pipe"])
def test_a_report_takes_the_place_of_nothing_that_is_no_report(tmp_path, place):
    runs = tuple(rows_file(tmp_path / name, [row(0), row(1)]) for name in ("a.jsonl", "b.jsonl"))
    (tmp_path / "b.summary.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="eval_config.report_path"):
        command.run(recipe_of(tmp_path, eval={"report_path": str(tmp_path / place)}), runs, out=io.StringIO())
    assert sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("told", ['{"recipe": []}', '{"recipe": {"model_config": 5}}', "[]", "5"])
def test_a_summary_of_another_kind(tmp_path, told):
    runs = tuple(rows_file(tmp_path / name, [row(0), row(1)]) for name in ("a.jsonl", "b.jsonl"))
    (tmp_path / "b.summary.json").write_text(told)
    with pytest.raises(UserError, match="b.summary.json: no summary as eval writes them"):
        command.run(recipe_of(tmp_path), runs, out=io.StringIO())


@pytest.mark.parametrize("data", [5, {"dataset": "random"}, {"dataset": "no such"}, {"dataset_path": "/nowhere"}])
def test_a_data_set_that_is_gone_is_looked_for_once(tmp_path, data, caplog):
    rows = [row(number, sources=[None]) for number in range(8)]
    runs = tuple(rows_file(tmp_path / name, rows) for name in ("a.jsonl", "b.jsonl"))
    (tmp_path / "a.summary.json").write_text(json.dumps({"recipe": {"data_config": data}}))
    document, _ = command.run(recipe_of(tmp_path), runs, out=io.StringIO())
    pictures = [
        picture for each in data_of(Path(document["report"]).read_text())["rows"] for picture in each["pictures"]
    ]
    assert all("not at hand" in picture["reason"] for picture in pictures)
    assert caplog.text.count("its pictures are not shown") <= 1
