"""`dataset: docvqa`: questions about scanned documents, with every accepted answer (Mathew et al. 2021).

Read are lmms-lab/DocVQA's Parquet files (the folder DocVQA of that repository); val_v1.0.json, with or without
"_withQT", of docvqa.org beside its documents/ or spdocvqa_images/; and VLMEvalKit's DocVQA_VAL.tsv.
"""

from functools import partial

from dataset.place import Place, Row, from_parquet, from_rows, from_tsv, picture_part, place_of, question, read_json
from dataset.sample import Dataset, Sample
from executor.recipe.schema import DataSection

TABLE = "DocVQA_VAL.tsv"  # of VLMEvalKit
SHORT_SPLITS = {"validation": "val"}
PICTURE_FOLDERS = ("documents", "spdocvqa_images", "../spdocvqa_images", "..")


def load(data: DataSection) -> Dataset:
    """The questions of one part. UserError where no form of the set is there."""
    place = place_of("docvqa", data)
    build = partial(_sample, place)
    files = [path for path in place.parquet() if path.parent.name != "InfographicVQA"]  # its neighbour on the hub
    if files:
        return from_parquet(place, files, build, needed=("question",), optional=("questionId", "answers"))
    if place.split == "validation" and (path := place.find(TABLE)):
        return from_tsv(place, path, build)
    short = SHORT_SPLITS.get(place.split, place.split)
    if path := place.find(f"{short}_v1.0.json", f"{short}_v1.0_withQT.json"):
        rows = (
            Row(f"{path.name} entry {number}", entry, partial(_picture, place, str(entry.get("image"))))
            for number, entry in enumerate(read_json(path, "data"), start=1)
        )
        return from_rows(place, rows, build, (path,))
    raise place.missing(f"{place.split}-*.parquet", f"{short}_v1.0.json with documents/", TABLE)


def _sample(place: Place, row: Row) -> Sample:
    text = place.published.ask(row.text("question"))
    return question(row, text, [picture_part(row.picture("image"))], references=row.answers("answers"))


def _picture(place: Place, name: str, column: str) -> str:
    return place.locate(name, *PICTURE_FOLDERS)
