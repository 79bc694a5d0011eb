"""VLMEvalKit's tables: texts over several lines, pictures of other rows, and files that are none."""

import pytest

from executor.errors import UserError
from tests.dataset.forms import base64_of, load, picture_of, png, table


def row(index: int, **changes: str) -> dict[str, str]:
    return {"index": str(index), "image": base64_of(png(index)), "question": f"Q{index}?", "answer": "x"} | changes


def test_rows_are_found_wherever_they_begin(tmp_path):
    asked = ['Two\nlines, a "quote"\tand a tab?', "Wo ist die Straße? 在哪里", "Plain?"]
    rows = [row(index, question=text) for index, text in enumerate(asked)]
    path = table(tmp_path / "DocVQA_VAL.tsv", [*rows, row(3, image="1"), row(4, image="0"), row(5)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    samples = load("docvqa", tmp_path)
    assert [sample.question.rpartition("\n")[0] for sample in samples] == [*asked, "Q3?", "Q4?", "Q5?"]
    assert [picture_of(sample) for sample in samples] == [png(index) for index in (0, 1, 2, 1, 0, 5)]
    assert samples[5].id == "DocVQA_VAL.tsv row 6 (5)"


def test_pictures_that_are_none(tmp_path):
    table(tmp_path / "DocVQA_VAL.tsv", [row(0), row(1, image="9"), row(2, image="!" * 80), row(3, image="")])
    good, other, odd, empty = load("docvqa", tmp_path)
    assert good.error is None
    assert "row with index '9', which is not there" in other.error
    assert "the column image is no base64" in odd.error
    assert "the column image is empty" in empty.error


def test_tables_that_are_none(tmp_path):
    path = tmp_path / "DocVQA_VAL.tsv"
    for content, words in (
        (b"", "there is no column question, answer, image; it has nothing"),
        (b"index\tquestion\tanswer\n0\tQ?\tx\n", "there is no column image; it has index, question, answer"),
        (b"index\timage\tquestion\tanswer\n0\tQ?\n", "row 1 of .* has 2 fields and the heading 4"),
        (b"index\timage\tquestion\tanswer\n\xff\t\t\t\n", "is no readable table"),
        (b"index\timage\tquestion\tanswer\n", "hold no rows"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            load("docvqa", tmp_path)


def test_a_table_is_of_one_part(tmp_path):
    table(tmp_path / "DocVQA_VAL.tsv", [row(0)])
    with pytest.raises(UserError, match="DocVQA, part test, needs one of"):
        load("docvqa", tmp_path, split="test")
