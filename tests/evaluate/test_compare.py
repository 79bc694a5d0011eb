"""Two runs paired: figures by hand, what is refused, and what is only said."""

import json
from pathlib import Path

import pytest

from executor.errors import UserError
from executor.evaluate.compare import compare
from executor.evaluate.interval import difference_of, estimate_of
from executor.evaluate.runs import read_run
from tests.evaluate.rows_files import row, rows_file

FIRST, SECOND = [1.0, 1.0, 0.0, 0.0, 1.0, 0.6], [1.0, 0.0, 1.0, 0.0, 0.0, 0.9]


@pytest.fixture
def runs(tmp_path: Path):
    """Reads two runs of these rows."""

    def read(first: list[dict], second: list[dict]):
        return (
            read_run(rows_file(tmp_path / "a.jsonl", first)),
            read_run(rows_file(tmp_path / "b.jsonl", second)),
        )

    return read


def test_pairs_their_figures_and_their_verdicts(runs):
    labels = [{"kind": "odd" if index % 2 else "even"} for index in range(6)]
    first = [row(index, score, labels=labels[index]) for index, score in enumerate(FIRST)]
    second = [row(index, score, labels=labels[index]) for index, score in enumerate(SECOND)]
    found = compare(*runs(first, second[::-1]))
    assert [pair.verdict for pair in found.pairs] == ["right", "worse", "better", "wrong", "worse", "better"]
    assert found.whole.first == estimate_of(FIRST) and found.whole.second == estimate_of(SECOND)
    assert found.whole.difference == difference_of(FIRST, SECOND)
    assert (found.whole.difference.better, found.whole.difference.worse) == (2, 2)
    assert found.whole.difference.mean == pytest.approx((-1 + 1 - 1 + 0.3) / 6)
    odd = found.breakdown["kind"]["odd"]
    assert list(found.breakdown["kind"]) == ["even", "odd"] and odd.first == estimate_of(FIRST[1::2])
    assert odd.difference == difference_of(FIRST[1::2], SECOND[1::2])
    assert found.warnings == ()


def test_samples_of_one_run_alone_are_left_out_and_told(runs):
    found = compare(*runs([row(0), row(1), row(2)], [row(1), row(7)]))
    assert [pair.first.id for pair in found.pairs] == ["sample 1"]
    assert ["2 samples of" in found.warnings[0], "1 sample of" in found.warnings[1]] == [True, True]


def test_other_words_and_failures_are_told(runs):
    failed = row(1, 0.0, text=None, extracted=None, error="sample 1: no such file")
    found = compare(*runs([row(0), row(1)], [row(0, prompt="Say: question 0?"), failed]))
    assert ["asked in other words" in found.warnings[0], "not answered" in found.warnings[1]] == [True, True]
    assert found.pairs[1].verdict == "worse"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"dataset": "docvqa"}, "their dataset is textvqa and docvqa"),
        ({"metric": "anls"}, "their metric is vqa_accuracy and anls"),
        ({"references": ["left"]}, "1 samples have other references .* sample 0"),
        ({"media": ["other.png"]}, "1 samples have other media .* sample 0"),
        ({"id": "elsewhere"}, "no sample in common: the first begins with sample 0, the second with elsewhere"),
    ],
)
def test_runs_that_cannot_be_compared(runs, changed, says):
    with pytest.raises(UserError, match=says):
        compare(*runs([row(0)], [row(0, **changed)]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there are no rows in it"),
        ("{", r"line 1: no JSON"),
        ("[1]\n", "line 1: no answer to a sample"),
        (json.dumps({"index": 0, "text": "an answer"}), "line 1: an answer without a score, as generate writes them"),
        (json.dumps(row(0, 1.5)), "the score is 1.5; scores are from 0 to 1"),
        (json.dumps(row(0, float("nan"))), "the score is nan"),
        (json.dumps(row(0, references=[3])), "media, references and sources hold texts"),
        (json.dumps(row(0, boxes=[[1, 2, 3]])), "boxes and said_boxes of a row are lists of four numbers"),
        (json.dumps(row(0, said_boxes=[[1, 2, 3, float("inf")]])), "lists of four numbers, all finite"),
        (json.dumps(row(0, labels=None)), "labels is missing or of another kind"),
        ("\n".join([json.dumps(row(0)), json.dumps(row(0))]), "the sample sample 0 is in it twice"),
        ("\n".join([json.dumps(row(0)), json.dumps(row(1, metric="anls"))]), "rows of more than one metric"),
    ],
)
def test_what_is_no_file_of_scored_rows(tmp_path, text, says):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_run(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_run(tmp_path / "a.jsonl")


def test_the_summary_beside_the_rows_names_the_model(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", [row(0)])
    assert (read_run(path).name, read_run(path).model) == ("a", "")
    recipe = {"model_config": {"model_path": "/models/qwen", "dtype": "bfloat16", "quantization": "none"}}
    (tmp_path / "a.summary.json").write_text(json.dumps({"recipe": recipe}))
    assert read_run(path).model == "qwen, bfloat16"
    (tmp_path / "a.summary.json").write_text("{")
    with pytest.raises(UserError, match="a.summary.json: cannot be read"):
        read_run(path)
