"""Our metrics beside lmms-eval's own functions, on thousands of generated answers; each way they differ is counted.

    pip install --no-deps --target DIR lmms-eval
    PYTHONPATH=DIR python -m pytest -m long tests/evaluate/scoring/test_lmms_eval.py

Its modules import much that is not needed here, so that single functions are taken out of their files.
"""

import ast
import importlib.util
import json
import math
import random
import re
import statistics
import string
import typing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset.sample import Sample
from executor.evaluate.metrics import METRICS
from executor.evaluate.scoring import anls, boxes, choice, mmmu, relaxed, vqa
from executor.evaluate.scoring.score import BoxSpace

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"),
]
ROUNDS = 20_000
WORDS = (
    *(
        "the",
        "a",
        "An",
        "none",
        "zero",
        "Ten",
        "dont",
        "couldntve",
        "couldn'tve",
        "she's",
        "yall",
        "ow's'at",
        "o'clock",
    ),
    *(
        "red",
        "Blue",
        "answer",
        "is",
        "so",
        "result",
        "final",
        "therefore",
        "option",
        "I",
        "choose",
        "USA",
        "Because",
        "=",
    ),
    *(
        "A",
        "B",
        "C",
        "D",
        "E",
        "(A)",
        "(B)",
        "(D)",
        "B.",
        "C:",
        "D)",
        "a",
        "b",
        "[A]",
        "答案是B",
        "选C",
        "Ａ",
        "ẞ",
        "İ",
    ),
    *("3", "3.0", "-4", "1,234", "12,34", "5e3", "0.5", "50%", "5.25", "100", "95", "0", "nan", "inf", "1_000", "٣"),
    *("cat", "dog", "red apple", "apple", "well-known", "a/b", "$5", "x^2", "\n", "\t", ".", ",", "?", "!", "..", "'s"),
)
OPTIONS = ("red apple", "dog", "apple", "3.0", "Blue", "cat", "100", "a cat")


@cache
def public(file: str, *names: str) -> dict[str, Any]:
    """Functions, classes and constants of one file of lmms-eval, without what the rest of the file needs."""
    root = Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0])
    found: dict[str, Any] = {**vars(typing), "re": re, "random": random, "np": np, "json": json}
    for node in ast.parse((root / file).read_text(encoding="utf-8")).body:
        targets = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
        if getattr(node, "name", None) in names or set(targets) & set(names):
            node.decorator_list = []
            exec(compile(ast.Module([node], []), file, "exec"), found)  # noqa: S102
    assert all(name in found for name in names), names
    return found


def words(rng: random.Random, most: int = 8) -> str:
    """A text that a model might give, or that no model would."""
    if rng.random() < 0.1:
        return "".join(rng.choice(string.printable) for _ in range(rng.randint(0, 12)))
    text = rng.choice((" ", " ", " ", "", ", ", "\n")).join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))
    return text.swapcase() if rng.random() < 0.1 else text


def test_vqa_accuracy_is_the_same():
    processor = public("tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")["EvalAIAnswerProcessor"]()
    theirs = {word: whole for word, whole in processor.CONTRACTIONS.items() if word == word.lower() and word != whole}
    assert vqa.contractions() == theirs
    rng = random.Random(0)
    for _ in range(ROUNDS):
        said, answers = words(rng, 4), tuple(words(rng, 2) for _ in range(rng.choice((2, 3, 10))))
        if rng.random() < 0.5:
            answers = (said,) * rng.randint(1, 4) + answers
        plain, theirs = processor(said), [processor(answer) for answer in answers]
        assert vqa.normalise(said) == plain, said
        accuracy = statistics.mean(
            min(1, sum(other == plain for at, other in enumerate(theirs) if at != index) / 3)
            for index in range(len(theirs))
        )
        ours = METRICS["vqa_accuracy"].score(said, Sample("s", references=answers), None)
        assert math.isclose(ours.value, accuracy, abs_tol=1e-12), (said, answers)


def test_anls_is_the_same_for_answers_without_outer_space():
    theirs = public("api/metrics.py", "levenshtein_distance", "anls")["anls"]
    rng = random.Random(1)
    for _ in range(ROUNDS // 4):
        said = words(rng, 4).strip()
        answers = [words(rng, 4) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.7:  # near ones: below and above the threshold
            letters = list(said.upper() if rng.random() < 0.5 else said)
            for _ in range(rng.randint(0, 5)):
                letters.insert(rng.randint(0, len(letters)), rng.choice("ab 1"))
            answers.append("".join(letters))
        ours = METRICS["anls"].score(said, Sample("s", references=tuple(answers)), None).value
        assert ours == theirs(answers, [said])["anls"], (said, answers)
    assert anls.THRESHOLD == 0.5


def test_relaxed_accuracy_is_the_same_for_answers_without_outer_space():
    theirs = public("tasks/chartqa/utils.py", "relaxed_correctness")["relaxed_correctness"]
    rng, right = random.Random(2), 0
    for _ in range(ROUNDS):
        wanted = rng.choice((words(rng, 1), f"{rng.uniform(-100, 100):.{rng.randint(0, 3)}f}", "0", "50%"))
        near = f"{rng.uniform(0.9, 1.1) * (relaxed.number_of(wanted) or 0):.4f}"
        said, wanted = rng.choice((words(rng, 1), near, near + "%", wanted.upper())).strip(), wanted.strip()
        assert relaxed.is_close(said, wanted) == theirs(said, wanted), (said, wanted)
        right += relaxed.is_close(said, wanted)
    assert ROUNDS * 0.2 < right < ROUNDS * 0.8


class NothingDrawn:
    """In place of the module random: what is drawn is told from what is read."""

    @staticmethod
    def choice(choices: list[str]) -> str:
        return ""


def test_mmmu_choices_are_the_same_but_for_drawn_letters():
    found = public("tasks/_task_utils/mmmu_mcq_utils.py", "parse_mmmu_multi_choice_response")
    found["random"] = NothingDrawn
    rng, none = random.Random(3), 0
    for _ in range(ROUNDS):
        said, count = words(rng), rng.randint(2, 8)
        known = choice.letters(count)
        options = dict(zip(known, OPTIONS, strict=False))
        theirs = found["parse_mmmu_multi_choice_response"](said, known, options)
        assert mmmu.chosen(said, OPTIONS[:count]) == theirs, (said, count)
        none += theirs == ""
    assert ROUNDS * 0.1 < none < ROUNDS * 0.9


def test_mmmu_open_answers_are_the_same():
    found = public(
        "tasks/mmmu/utils.py", "eval_open", "normalize_str", "check_is_number", "extract_numbers", "parse_open_response"
    )
    rng, right = random.Random(4), 0
    for _ in range(ROUNDS):
        said, answers = words(rng), [words(rng, 1) for _ in range(rng.randint(1, 2))]
        theirs = found["eval_open"](answers, found["parse_open_response"](said))
        ours = METRICS["mmmu_accuracy"].score(said, Sample("s", references=tuple(answers)), None).value
        assert ours == theirs, (said, answers)
        right += theirs
    assert ROUNDS * 0.05 < right < ROUNDS * 0.95


def test_ocrbench_is_the_same_but_for_characters_of_full_width():
    found = public("tasks/ocrbench/utils.py", "_fold_fullwidth_ascii", "ocrbench_process_results")
    rng, other = random.Random(5), 0
    for _ in range(ROUNDS):
        said, answers = words(rng), tuple(words(rng, 1) for _ in range(2))
        doc = {"answer": list(answers), "dataset": rng.choice(("HME100k", "IAM")), "question_type": "x"}
        theirs = found["ocrbench_process_results"](doc, [said])["ocrbench_accuracy"]["score"]
        sample = Sample("s", references=answers, labels={"dataset": doc["dataset"]})
        if METRICS["ocrbench_accuracy"].score(said, sample, None).value != theirs:
            other += 1
            assert found["_fold_fullwidth_ascii"](said + "".join(answers)) != said + "".join(answers), (said, answers)
    assert other < ROUNDS / 100


def test_boxes_overlap_the_same():
    theirs = public("tasks/refcoco/utils_rec.py", "compute_iou", "parse_float_sequence_within")
    rng = random.Random(6)
    for _ in range(ROUNDS):
        corners = [sorted(rng.uniform(0, 100) for _ in range(2)) for _ in range(4)]
        one, other = ((corners[at][0], corners[at + 1][0], corners[at][1], corners[at + 1][1]) for at in (0, 2))
        assert math.isclose(boxes.iou(one, other), theirs["compute_iou"](one, other), abs_tol=1e-12)
        text = f"{words(rng, 2)} [{', '.join(f'{value:.{rng.randint(0, 3)}f}' for value in one)}] {words(rng, 2)}"
        assert list(boxes.boxes_in(text)[0]) == theirs["parse_float_sequence_within"](text), text


def test_grounding_is_never_kinder_than_lmms_eval():
    """lmms-eval counts the best of all boxes in the better of two units; here the first one counts, in the model's."""
    found = public(
        "tasks/refcoco_grounding/utils.py",
        *("_xywh_to_xyxy", "_extract_bbox_from_dict", "_try_parse_json", "_bbox_list_from_json", "_BBOX_REGEX"),
        *("_regex_fallback_boxes", "_parse_pred_boxes", "_pick_best_box", "_scale_pred_to_pixel", "_compute_iou"),
        *("refcoco_grounding_process_result", "_GROUNDING_METRICS"),
    )
    rng, same, kinder = random.Random(7), 0, 0

    class Picture:
        size = (640, 480)

    for _ in range(ROUNDS // 10):
        said = [
            [rng.randint(0, 500), rng.randint(0, 500), rng.randint(501, 1000), rng.randint(501, 1000)] for _ in "ab"
        ]
        said = said[: rng.randint(1, 2)]
        text = json.dumps([{"bbox_2d": box, "label": "cup"} for box in said])
        text = rng.choice((text, f"```json\n{text}\n```"))
        true = [rng.uniform(0, 300), rng.uniform(0, 200), rng.uniform(10, 340), rng.uniform(10, 280)]
        doc = {"bbox": true, "image": Picture, "answer": "cup"}
        result = found["refcoco_grounding_process_result"](doc, [text])["refcoco_grounding_IoU"]
        theirs = found["_compute_iou"](result["bbox"], result["pred"])
        box = (true[0] / 640, true[1] / 480, (true[0] + true[2]) / 640, (true[1] + true[3]) / 480)
        ours = METRICS["box_iou"].score(text, Sample("s", boxes=(box,)), BoxSpace(1000, 1000)).details["iou"]
        assert ours <= theirs + 1e-9
        same += math.isclose(ours, theirs, abs_tol=1e-9)
        kinder += not math.isclose(ours, theirs, abs_tol=1e-9)
    assert same and kinder


def test_letters_differ_only_as_documented():
    """Of answers as models give them lmms-eval reads the same letter; of the others it takes letters out of words."""
    theirs = public(
        "tasks/_task_utils/mcq_extract.py",
        "extract_mcq_answer",
        "_DEFAULT_CHOICES",
        "_ANSWER_PHRASES",
        "_FORMAT_PRIORITY",
    )["extract_mcq_answer"]
    rng, known = random.Random(8), choice.letters(4)
    forms = (
        *("{0}", "({0})", "{0}.", "{0})", "{0}: {1}", "{0}. {1}", "({0}) {1}", "The answer is {0}", "Answer: {0}"),
        *("The correct answer is ({0}).", "the best option is {0}", "It must be ({0}) of these", "I choose {0}"),
        *("Therefore, the answer is {0}.", "**{0}**", "\n{0}\n", "Option {0}", "so it is {0}) that fits"),
    )
    for _ in range(ROUNDS):
        letter, option = rng.choice(known), rng.choice(("red cup", "seven days", "no one", "green tree"))
        text = rng.choice(forms).format(letter, option)
        assert choice.chosen(text, ("w", "x", "y", "z")) == theirs(text, known) == letter, text
    in_words = of_options = behind_phrases = 0
    for _ in range(ROUNDS):
        text = words(rng)
        ours, lettered = choice.chosen(text, OPTIONS[:4]), theirs(text, known)
        if ours == lettered:
            continue
        if not lettered:
            of_options += 1
            assert (
                text.strip(string.punctuation + string.whitespace).upper() == ours
                or OPTIONS[known.index(ours)].lower() in text.lower()
            )
        elif not re.search(f"(?<![A-Za-z0-9]){lettered}(?![A-Za-z0-9])", text):
            in_words += 1
        else:
            behind_phrases += 1
    assert behind_phrases < ROUNDS * 0.02
    print(
        f"of {ROUNDS} random texts letters differ: {in_words} in a word, {of_options} options, {behind_phrases} other"
    )
