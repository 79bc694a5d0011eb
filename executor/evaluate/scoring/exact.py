"""Exact match: the answer is one of the accepted texts, or its box the box asked for.

Nothing is forgiven but white space around the answer. A box is right where each of its four numbers is the wanted one
rounded to the model's units; other words around it do not count.
"""

from dataset.sample import Sample
from executor.evaluate.scoring.boxes import boxes_in, in_units
from executor.evaluate.scoring.score import BoxSpace, Score


def score(text: str, sample: Sample, space: BoxSpace | None = None) -> Score:
    """1 or 0."""
    if sample.boxes:
        assert space is not None, "boxes are compared in the model's units"
        said = boxes_in(text)
        if not said:
            return Score(0.0, "")
        wanted = [[round(value) for value in in_units(box, space)] for box in sample.boxes]
        return Score(float(list(said[0]) in wanted), str(list(said[0])))
    said_text = text.strip()
    return Score(float(any(said_text == reference.strip() for reference in sample.references)), said_text)
