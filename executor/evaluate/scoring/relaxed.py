"""Relaxed accuracy, of charts: numbers may be 5 % off, texts must be equal but for case (Masry et al. 2022, 5.1).

Equal to `relaxed_correctness` of QwenLM/Qwen-VL's eval_mm/evaluate_vqa.py and of lmms-eval. A percent sign divides by
100 on both sides alike, and a true value of zero must be met as text.
"""

from dataset.sample import Sample
from executor.evaluate.scoring.score import BoxSpace, Score

MOST_RELATIVE_CHANGE = 0.05


def score(text: str, sample: Sample, space: BoxSpace | None = None) -> Score:
    """1 where any accepted answer is met, else 0."""
    said = text.strip()
    return Score(float(any(is_close(said, reference.strip()) for reference in sample.references)), said)


def is_close(said: str, reference: str) -> bool:
    """Whether both are numbers at most 5 % of the reference apart, or the same text."""
    number, wanted = number_of(said), number_of(reference)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= MOST_RELATIVE_CHANGE
    return said.lower() == reference.lower()


def number_of(text: str) -> float | None:
    """The value of a text that is a number, with or without a percent sign."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
