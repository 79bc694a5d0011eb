"""`dataset: ocrbench`: 1,000 questions about text of ten kinds, from line pictures to formulas (Liu et al. 2023).

Read are echo840/OCRBench's Parquet files, OCRBench.json of Yuliang-Liu/MultimodalOCR beside OCRBench_Images/, and
VLMEvalKit's OCRBench.tsv.
Scores are broken down by `question_type` and by `dataset`, the set that a question was taken from.
"""

from functools import partial

from dataset.place import Place, Row, from_parquet, from_rows, from_tsv, picture_part, place_of, question, read_json
from dataset.sample import Dataset, Sample
from executor.errors import UserError
from executor.recipe.schema import DataSection

TABLE = "OCRBench.tsv"  # of VLMEvalKit
OFFICIAL_NAMES = {"dataset_name": "dataset", "type": "question_type", "answers": "answer"}  # its columns on the hub
FORMULAS = ("Handwritten Mathematical Expression Recognition", "HME100k")  # VLMEvalKit's table has no column dataset


def load(data: DataSection) -> Dataset:
    """All questions. UserError where no form of the set is there."""
    place = place_of("ocrbench", data)
    build = partial(_sample, place)
    if files := place.parquet():
        needed = ("question", "answer", "dataset", "question_type")
        return from_parquet(place, files, build, needed=needed)
    if path := place.find(TABLE):
        return from_tsv(place, path, build)
    if path := place.find("OCRBench.json"):
        rows = (
            Row(
                f"{path.name} entry {number}",
                {OFFICIAL_NAMES.get(key, key): value for key, value in entry.items()},
                partial(_picture, place, str(entry.get("image_path"))),
            )
            for number, entry in enumerate(read_json(path), start=1)
        )
        return from_rows(place, rows, build, (path,))
    raise place.missing("test-*.parquet", "OCRBench.json with OCRBench_Images/", TABLE)


def _sample(place: Place, row: Row) -> Sample:
    text = place.published.ask(row.text("question").strip())
    references = row.answers("answer")
    if not references:
        raise UserError("there is no answer")
    kind = row.text("question_type", "category")
    source = row.values.get("dataset") or (FORMULAS[1] if kind == FORMULAS[0] else None)
    labels = {"question_type": kind} | ({"dataset": str(source)} if source else {})
    return question(row, text, [picture_part(row.picture("image"))], references=references, labels=labels)


def _picture(place: Place, name: str, column: str) -> str:
    return place.locate(name, "OCRBench_Images", "../OCRBench_Images")
