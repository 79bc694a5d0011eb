"""Every metric on answers whose score the public implementations' own texts, papers or code give."""

import math

import pytest

from dataset.sample import Sample
from executor.evaluate.metrics import METRICS
from executor.evaluate.scoring import anls, choice, mmmu, relaxed, vqa
from executor.evaluate.scoring.boxes import boxes_in, iou
from executor.evaluate.scoring.score import BoxSpace

ABCD = ("4", "5", "6", "seven days")


def value(metric: str, text: str, space: BoxSpace | None = None, **fields) -> float:
    return METRICS[metric].score(text, Sample("s", **fields), space).value


@pytest.mark.parametrize(
    "said, plain",
    [
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont walk", "don't walk"),
        ("couldn'tve", "couldn't've"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("well-known", "well known"),
        ("well - known", "well known"),
        ("sam's", "sam 's"),
        ("a/b\nc", "b c"),
        ("(yes)", "yes"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_in_mmf(said, plain):
    assert vqa.normalise(said) == plain


def test_vqa_accuracy_counts_the_people_who_agree():
    """With n of ten people agreeing, the mean over ten leave-one-out subsets of nine: 0, 0.3, 0.6, 0.9, 1."""
    for agreeing, wanted in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        answers = ("nokia",) * agreeing + tuple(f"other {index}" for index in range(10 - agreeing))
        assert math.isclose(value("vqa_accuracy", "Nokia.", references=answers), wanted, abs_tol=1e-12), agreeing
    assert value("vqa_accuracy", "nokia", references=("Nokia",)) == 1


def test_anls_is_zero_below_a_half():
    assert value("anls", "Hello", references=("hello", "unlike")) == 1
    assert math.isclose(value("anls", "helo", references=("hello",)), 0.8)
    assert value("anls", "abcd", references=("abxx",)) == 0.5
    assert value("anls", "abcde", references=("abxyz",)) == 0
    assert value("anls", "", references=("word",)) == 0
    assert anls.levenshtein("kitten", "sitting") == anls.levenshtein("sitting", "kitten") == 3


@pytest.mark.parametrize(
    "said, wanted, right",
    [
        ("104.9", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("50%", "0.5", True),
        ("50", "0.5", False),
        ("0.04", "0", False),
        ("0", "0", True),
        ("Yes", "yes", True),
        ("yes, it is", "yes", False),
        ("-100", "100", False),
        ("2,000", "2000", False),
    ],
)
def test_relaxed_accuracy_forgives_five_per_cent(said, wanted, right):
    assert relaxed.is_close(said, wanted) is right


@pytest.mark.parametrize(
    "said, letter",
    [
        ("A", "A"),
        ("(B)", "B"),
        ("B.", "B"),
        ("The answer is (C).", "C"),
        ("(A) is wrong, so it is (B)", "B"),
        ("It could be A or B but the best is C here", "C"),
        ("I believe that it takes seven days in all", "D"),
        ("seven days", ""),  # five words or fewer: the public code draws a letter
        ("", ""),
    ],
)
def test_mmmu_choices_are_read_as_by_its_authors(said, letter):
    assert mmmu.chosen(said, ABCD) == letter
    assert value("mmmu_accuracy", said, references=("C",), choices=ABCD) == float(letter == "C")


def test_mmmu_open_answers_are_numbers_or_phrases():
    assert value("mmmu_accuracy", "The result is 1,234.567", references=("1234.57",)) == 1
    assert value("mmmu_accuracy", "x = 3", references=("3.0",)) == 1
    assert value("mmmu_accuracy", "It is the Renaissance.", references=("renaissance", "rebirth")) == 1
    assert value("mmmu_accuracy", "It is 8", references=("7",)) == 0
    assert value("mmmu_accuracy", "about", references=("a",)) == 0  # a single letter is met with a space beside it


def test_ocrbench_contains_and_formulas_have_no_spaces():
    assert value("ocrbench_accuracy", 'The text says "CENTRE\nNOW".', references=("centre now",)) == 1
    assert value("ocrbench_accuracy", "center", references=("centre", "cent")) == 1
    assert value("ocrbench_accuracy", "x ^ { 2 }", references=("x^{2}",), labels={"dataset": "HME100k"}) == 1
    assert value("ocrbench_accuracy", "X ^ { 2 }", references=("x^{2}",), labels={"dataset": "HME100k"}) == 0
    assert value("ocrbench_accuracy", "x ^ { 2 }", references=("x^{2}",), labels={"dataset": "IAM"}) == 0


@pytest.mark.parametrize(
    "said, letter",
    [
        ("B", "B"),
        (" b. ", "B"),
        ("The correct answer is (B).", "B"),
        ("The answer is B. Apples", "B"),
        ("(A) is tempting but the answer is D", "D"),
        ("Option C: because", "C"),
        ("Answer: C, since A and B are too few", "C"),
        ("\\boxed{D} fits, A and B do not", "D"),
        ("**B**", "B"),
        ("not 7 but seven days or so", "D"),
        ("B: a red cup", "B"),
        ("seven days", "D"),
        ("It lasts seven days, I think", "D"),
        ("In the USA.", ""),
        ("Because", ""),
        ("答案是B", "B"),
        ("选C", "C"),
        ("", ""),
    ],
)
def test_letters_are_read_out_of_answers(said, letter):
    assert choice.chosen(said, ABCD) == letter
    assert value("choice_accuracy", said, references=("B",), choices=ABCD) == float(letter == "B")


def test_an_option_within_another_is_not_meant():
    assert choice.chosen("I see a red apple here", ("red apple", "dog", "apple")) == "A"
    assert choice.chosen("I see an apple here", ("red apple", "dog", "apple")) == "C"
    assert choice.chosen("I see pineapples and dogma", ("red apple", "dog", "apple")) == ""
    assert choice.chosen("an apple or a dog", ("red apple", "dog", "apple")) == ""


def test_boxes_of_both_families_score_alike():
    """The same place in a picture that is 640x480 and is seen as 644x476."""
    true = {"boxes": ((0.25, 0.25, 0.75, 0.75),)}
    qwen3 = '```json\n[\n\t{"bbox_2d": [250, 250, 750, 750], "label": "cup"}\n]\n```'
    qwen2_5 = '[{"bbox_2d": [161, 119, 483, 357], "label": "cup"}]'
    for text, space in ((qwen3, BoxSpace(1000, 1000)), (qwen2_5, BoxSpace(644, 476))):
        found = METRICS["box_iou"].score(text, Sample("s", **true), space)
        assert found.value == 1 and math.isclose(found.details["iou"], 1), text
        assert value("exact_match", text, space, **true) == 1
    wrong_units = METRICS["box_iou"].score(qwen3, Sample("s", **true), BoxSpace(644, 476))
    assert wrong_units.value == 0 and 0 < wrong_units.details["iou"] < 0.5


def test_the_first_box_counts_and_half_is_enough():
    space, true = BoxSpace(100, 100), {"boxes": ((0.0, 0.0, 1.0, 0.5),)}
    assert value("box_iou", "[0, 0, 100, 100]", space, **true) == 1  # exactly 0.5
    assert value("box_iou", "[0, 0, 100, 100.1]", space, **true) == 0
    assert value("box_iou", '{"bbox_2d": [0, 90, 9, 99]}, {"bbox_2d": [0, 0, 100, 50]}', space, **true) == 0
    assert value("box_iou", "no box", space, **true) == 0
    assert not METRICS["box_iou"].score("no box", Sample("s", **true), space).parsed
    assert boxes_in("[9, 9, 9, 9] then {'bbox_2d': [1, 2, 3.5, 4]}") == [(1, 2, 3.5, 4)]
    assert boxes_in("<ref>cup</ref><box>(1,2),(3,4)</box>") == [(1, 2, 3, 4)]
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == 1 / 7
    assert iou((2, 2, 0, 0), (0, 0, 2, 2)) == iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_exact_match_forgives_only_outer_space():
    assert value("exact_match", " top left\n", references=("left", "top left")) == 1
    assert value("exact_match", "Top left", references=("top left",)) == 0


def test_half_of_a_box_is_half_of_it_in_any_units():
    for space in (BoxSpace(1000, 1000), BoxSpace(1120, 560), BoxSpace(644, 476)):
        true = (0.1, 0.1, 0.5, 0.5)
        half = [0.1 * space.width, 0.1 * space.height, 0.5 * space.width, 0.3 * space.height]
        assert value("box_iou", str(half), space, boxes=(true,)) == 1.0
        less = [*half[:3], 0.299 * space.height]
        assert value("box_iou", str(less), space, boxes=(true,)) == 0.0


def test_hundreds_of_digits_are_no_box():
    assert boxes_in(f"[{'9' * 400}, 1, 2, 3]") == []
    assert boxes_in(f"[{'9' * 400}, 1, 2, 3] or [1, 2, 3, 4]") == [(1, 2, 3, 4)]
