"""`dataset: mmmu`: college questions of 30 subjects about up to seven pictures each (Yue et al. 2024).

Read are the Parquet files of MMMU/MMMU (a folder for each subject) and of lmms-lab/MMMU (all subjects in one). Pictures
stand where the question or its options say <image 1>. Scores are broken down by `subject`, `discipline` and
`question_type`.
"""

import re
from functools import partial
from typing import Any

from dataset.place import Place, Row, from_parquet, literal_list, picture_part, place_of
from dataset.sample import Dataset, Sample
from executor.errors import UserError
from executor.recipe.schema import DataSection

PICTURES = tuple(f"image_{number}" for number in range(1, 8))
UNKNOWN = "?"  # the answers of the part test
DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy"),
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power"),
        *("Materials", "Mechanical_Engineering"),
    ),
}
_SUBJECT = re.compile(r"[a-z]+_(.+)_\d+")  # validation_Accounting_1
_MARK = re.compile(r"<image (\d+)>")


def load(data: DataSection) -> Dataset:
    """The questions of one part, of every subject that is there. UserError where none is."""
    place = place_of("mmmu", data)
    files = place.parquet()
    if not files:
        raise place.missing(f"SUBJECT/{place.split}-*.parquet", f"data/{place.split}-*.parquet")
    needed = ("id", "question", "options", "answer", "question_type")
    return from_parquet(place, files, partial(_sample, place), needed=needed, media=PICTURES)


def _sample(place: Place, row: Row) -> Sample:
    asked, choices = row.text("question"), ()
    if row.values["question_type"] == "multiple-choice":
        choices = literal_list(row.values["options"], "options")
        if not choices:
            raise UserError("a multiple-choice question has no options")
    name = row.text("id")
    subject = _SUBJECT.fullmatch(name)
    discipline = next((group for group, subjects in DISCIPLINES.items() if subject and subject[1] in subjects), None)
    labels = {"question_type": row.text("question_type")}
    labels |= {"subject": subject[1]} if subject else {}
    labels |= {"discipline": discipline} if discipline else {}
    return Sample(
        f"{row.where} ({name})",
        ({"role": "user", "content": _interleaved(place.published.ask(asked, choices), row)},),
        references=_references(row.values["answer"], len(choices)),
        choices=choices,
        labels=labels,
    )


def _references(answer: Any, num_choices: int) -> tuple[str, ...]:
    """The letter of a choice, or the accepted values: the Parquet files write several as the text of a list."""
    text = "" if answer is None else str(answer).strip()
    if text in ("", UNKNOWN):
        return ()
    if not num_choices:
        accepted = literal_list(text, "answer") if text[0] == "[" and text[-1] == "]" else (text,)
        return tuple(each for each in accepted if each.strip())
    if text not in [chr(ord("A") + index) for index in range(num_choices)]:
        raise UserError(f"the answer {text[:80]!r} is none of the letters of {num_choices} options")
    return (text,)


def _interleaved(text: str, row: Row) -> list[dict[str, Any]]:
    """The text with each picture where it is first named; one that is named again stays a name. A question that names
    none has its first picture before it."""
    parts: list[dict[str, Any]] = []
    placed: set[str] = set()
    start = 0
    for mark in _MARK.finditer(text):
        if mark[1] in placed:
            continue
        placed.add(mark[1])
        before = text[start : mark.start()].strip()
        parts += [{"type": "text", "text": before}] if before else []
        parts.append(picture_part(row.picture(f"image_{mark[1]}")))
        start = mark.end()
    if not placed:
        parts.append(picture_part(row.picture(PICTURES[0])))
    rest = text[start:].strip()
    return [*parts, {"type": "text", "text": rest}] if rest else parts
