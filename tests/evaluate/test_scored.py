"""From answers to scored rows and their summary."""

from pathlib import Path

import pytest

from dataset.sample import Dataset, Sample
from executor.errors import UserError
from executor.evaluate.interval import estimate_of
from executor.evaluate.metrics import METRICS
from executor.evaluate.scored import scored, summary_of, with_answers

EXACT, BOXES = METRICS["exact_match"], METRICS["box_iou"]


def sample(number: int, **fields) -> Sample:
    image = {"type": "image", "image": f"/pictures/{number}.png"}
    text = {"type": "text", "text": "What?"}
    return Sample(f"rows.jsonl:{number}", ({"role": "user", "content": [image, text]},), **fields)


def answer(text: str | None, **fields) -> dict:
    return {"id": "rows.jsonl:1", "text": text, "error": None, "reference": "old"} | fields


def test_a_row_has_what_it_was_scored_by():
    found = scored(answer(" red\n"), sample(1, references=("blue", "red"), labels={"kind": "color"}), EXACT, "rows")
    assert "reference" not in found
    assert (found["score"], found["extracted"], found["references"]) == (1.0, "red", ["blue", "red"])
    assert (found["dataset"], found["metric"], found["labels"]) == ("rows", "exact_match", {"kind": "color"})
    assert found["sources"] == ["/pictures/1.png"]
    again = scored(found | {"text": "green"}, sample(1, references=("red",)), EXACT, "rows")
    assert (again["score"], again["extracted"], again["labels"]) == (0.0, "green", {})


def test_a_failed_row_scores_0():
    found = scored(answer(None, error="no such file"), sample(1, references=("red",)), EXACT, "rows")
    assert (found["score"], found["extracted"]) == (0.0, None)


@pytest.mark.parametrize(("units", "said"), [([1000, 1000], (250, 500, 500, 1000)), ([128, 64], (32, 32, 64, 64))])
def test_boxes_are_read_in_the_models_units(units, said):
    row = answer(f'[{{"bbox_2d": {list(said)}, "label": "x"}}]', media_sizes=[{"box_units": units}])
    found = scored(row, sample(1, boxes=((0.25, 0.5, 0.5, 1.0),)), BOXES, "refcoco")
    assert (found["score"], found["details"]) == (1.0, {"iou": 1.0})
    assert found["boxes"] == found["said_boxes"] == [[0.25, 0.5, 0.5, 1.0]]


def test_a_row_of_another_release_does_not_know_its_units():
    with pytest.raises(UserError, match="units of its boxes"):
        scored(answer("[1, 2, 3, 4]", media_sizes=[{}]), sample(1, boxes=((0, 0, 1, 1),)), BOXES, "refcoco")


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("/a/b.png", "/a/b.png"),
        ("https://example.org/a.png", "https://example.org/a.png"),
        (b"\x89PNG", None),
        ("data:image/png;base64,AAAA", None),
        (["/a/0.png", "/a/1.png"], "/a/0.png"),
    ],
)
def test_where_a_picture_lies(source, place):
    kind = "video" if isinstance(source, list) else "image"
    messages = ({"role": "user", "content": [{"type": kind, kind: source}]},)
    found = scored(answer("red"), Sample("rows.jsonl:1", messages, references=("red",)), EXACT, "rows")
    assert found["sources"] == [place]


def test_samples_without_answers_are_refused_at_once():
    samples = [sample(1, references=("red",)), sample(2), sample(3), Sample("rows.jsonl:4", error="no JSON")]
    with pytest.raises(UserError, match="2 of 4 samples have no references or boxes .* rows.jsonl:2"):
        with_answers(Dataset(Path("rows.jsonl"), samples), EXACT)


def test_long_rows_without_answers_are_told_when_it_is_their_turn():
    samples = [lambda: sample(1, references=("red",)), lambda: sample(2)]
    found = with_answers(Dataset(Path("rows.jsonl"), samples), EXACT)
    assert found[0] == sample(1, references=("red",))
    assert found[1].error == "rows.jsonl:2: it has no references or boxes to score an answer by"


def test_a_summary_counts_failures_and_breaks_down():
    scores = [1.0, 0.0, 1.0, 0.5]
    rows = [
        {
            "id": str(index),
            "score": score,
            "error": None,
            "labels": {"kind": "ab"[index % 2]},
            "details": {"iou": score},
            "extracted": "" if index == 1 else "x",
        }
        for index, score in enumerate(scores)
    ]
    rows.append({"id": "4", "score": 0.0, "error": "no such file", "labels": {}, "extracted": None})
    found = summary_of(rows)
    estimate = estimate_of([*scores, 0.0])
    assert (found["score"], found["samples"]) == (0.5, 5)
    assert found["ci95"] == [round(estimate.low, 5), round(estimate.high, 5)]
    assert found["unparsed"] == 1
    assert (found["failed"], found["failed_samples"], found["details"]) == (1, ["4"], {"iou": 0.5})
    assert {value: each["score"] for value, each in found["breakdown"]["kind"].items()} == {"a": 1.0, "b": 0.25}


def test_an_answer_that_its_sample_cannot_score_any_more():
    lacking = Sample("rows.jsonl:1", error="rows.jsonl:1: it has no references to score an answer by")
    with pytest.raises(UserError, match="which cannot be scored now: rows.jsonl:1: it has no references"):
        scored(answer("red"), lacking, METRICS["vqa_accuracy"], "rows")
    assert scored(answer(None, error="bad"), lacking, EXACT, "rows")["score"] == 0.0
