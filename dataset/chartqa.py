"""`dataset: chartqa`: questions about charts, half of them written by people and half made from summaries.

Read are the Parquet files of lmms-lab/ChartQA and HuggingFaceM4/ChartQA, vis-nlp/ChartQA's test_human.json and
test_augmented.json beside png/, and VLMEvalKit's ChartQA_TEST.tsv (Masry et al. 2022).
Scores are broken down by `part`: human, augmented.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dataset.place import Place, Row, from_parquet, from_rows, from_tsv, picture_part, place_of, question, read_json
from dataset.sample import Dataset, Sample
from executor.errors import UserError
from executor.recipe.schema import DataSection

TABLE = "ChartQA_TEST.tsv"  # of VLMEvalKit
PARTS = ("human", "augmented")
MACHINE = {"0": "human", "1": "augmented"}  # of the column human_or_machine


def load(data: DataSection) -> Dataset:
    """The questions of one part of the set. UserError where no form of it is there."""
    place = place_of("chartqa", data)
    build = partial(_sample, place)
    if files := place.parquet():
        return from_parquet(
            place,
            files,
            build,
            needed=(),
            optional=("question", "query", "answer", "label", "type", "human_or_machine"),
        )
    if place.split == "test" and (path := place.find(TABLE)):
        return from_tsv(place, path, build)
    paths = [place.find(f"{place.split}_{part}.json", f"*/{place.split}/{place.split}_{part}.json") for part in PARTS]
    if there := [path for path in paths if path is not None]:
        rows = [row for path in there for row in _official_rows(place, path)]
        return from_rows(place, rows, build, there)
    raise place.missing(
        f"{place.split}-*.parquet", f"{place.split}_human.json and {place.split}_augmented.json with png/", TABLE
    )


def _sample(place: Place, row: Row) -> Sample:
    text = place.published.ask(row.text("question", "query"))
    picture = picture_part(row.picture("image"))
    references = row.answers("answer", "label")
    if not references:
        raise UserError("there is no answer or label")
    return question(row, text, [picture], references=references, labels=_labels(row))


def _labels(row: Row) -> dict[str, str]:
    kind = row.values.get("type") or row.values.get("split") or MACHINE.get(str(row.values.get("human_or_machine")))
    part = next((part for part in PARTS if part in str(kind)), None)
    return {"part": part} if part else {}


def _official_rows(place: Place, path: Path) -> Iterator[Row]:
    part = path.stem.rpartition("_")[2]
    for number, entry in enumerate(read_json(path), start=1):
        picture = partial(_picture, place, path.parent, str(entry.get("imgname")))
        yield Row(f"{path.name} entry {number}", {**entry, "type": part}, picture)


def _picture(place: Place, folder: Path, name: str, column: str) -> str:
    return place.locate(name, "png", str(folder / "png"))
