"""`dataset: textvqa`: questions about text in photographs, with ten people's answers each (Singh et al. 2019).

Read are lmms-lab/textvqa's Parquet files; TextVQA_0.5.1_val.json of textvqa.org with train_images/ (test_images/ for
the part test); textvqa_val.jsonl with textvqa_val_annotations.json, as Qwen-VL's eval_mm and AISBench have them; and
VLMEvalKit's TextVQA_VAL.tsv.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dataset.place import (
    Place,
    Row,
    from_parquet,
    from_rows,
    from_tsv,
    picture_part,
    place_of,
    question,
    read_json,
    read_json_lines,
)
from dataset.sample import Dataset, Sample
from executor.errors import UserError
from executor.recipe.schema import DataSection

TABLE = "TextVQA_VAL.tsv"  # of VLMEvalKit
SHORT_SPLITS = {"validation": "val"}
PICTURE_FOLDERS = ("train_images", "test_images", "train_val_images/train_images")


def load(data: DataSection) -> Dataset:
    """The questions of one part. UserError where no form of the set is there."""
    place = place_of("textvqa", data)
    build = partial(_sample, place)
    if files := place.parquet():
        return from_parquet(place, files, build, needed=("question",), optional=("question_id", "answers"))
    if place.split == "validation" and (path := place.find(TABLE)):
        return from_tsv(place, path, build)
    short = SHORT_SPLITS.get(place.split, place.split)
    official, lines = f"TextVQA_0.5.1_{short}.json", f"textvqa_{short}.jsonl"
    if path := place.find(official):
        return from_rows(place, _official_rows(place, path), build, (path,))
    if path := place.find(lines):
        annotations = path.with_name(f"{path.stem}_annotations.json")
        if not annotations.is_file():
            raise UserError(f"{path} has its answers in {annotations.name}, which is not beside it")
        return from_rows(place, _line_rows(place, path, annotations), build, (path, annotations))
    raise place.missing(
        f"{place.split}-*.parquet",
        f"{official} with train_images/",
        f"{lines} with textvqa_{short}_annotations.json and train_images/",
        TABLE,
    )


def _sample(place: Place, row: Row) -> Sample:
    asked = row.text("question").strip()
    text = place.published.ask(asked[:1].upper() + asked[1:])
    return question(row, text, [picture_part(row.picture("image"))], references=row.answers("answers"))


def _official_rows(place: Place, path: Path) -> Iterator[Row]:
    for number, entry in enumerate(read_json(path, "data"), start=1):
        picture = partial(_picture, place, f"{entry.get('image_id')}.jpg")
        yield Row(f"{path.name} entry {number}", entry, picture)


def _line_rows(place: Place, path: Path, annotations: Path) -> Iterator[Row]:
    answers = {entry.get("question_id"): entry.get("answers") for entry in read_json(annotations, "annotations")}
    for number, entry in enumerate(read_json_lines(path), start=1):
        told = answers.get(entry.get("question_id")) or []
        accepted = [each.get("answer") if isinstance(each, dict) else each for each in told]
        picture = partial(_picture, place, str(entry.get("image")))
        yield Row(f"{path.name}:{number}", {**entry, "answers": accepted}, picture)


def _picture(place: Place, name: str, column: str) -> str:
    return place.locate(name, *PICTURE_FOLDERS)
