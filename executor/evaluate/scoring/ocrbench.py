"""OCRBench accuracy: an accepted answer stands somewhere in the text (Liu et al. 2023).

Equal to OCRBench/example.py of Yuliang-Liu/MultimodalOCR: case is not compared and line breaks are spaces. Handwritten
formulas (the part HME100k) are compared with case and without any spaces.
"""

from dataset.sample import Sample
from executor.evaluate.scoring.score import BoxSpace, Score

FORMULAS = "HME100k"


def score(text: str, sample: Sample, space: BoxSpace | None = None) -> Score:
    """1 where any accepted answer is contained, else 0."""
    plain = without_spaces if sample.labels.get("dataset") == FORMULAS else without_case
    said = plain(text)
    return Score(float(any(plain(reference) in said for reference in sample.references)), said)


def without_case(text: str) -> str:
    """As words are compared."""
    return text.lower().strip().replace("\n", " ")


def without_spaces(text: str) -> str:
    """As formulas are compared."""
    return text.strip().replace("\n", " ").replace(" ", "")
