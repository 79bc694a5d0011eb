"""ANLS: average normalised Levenshtein similarity, of documents (Mathew et al. 2021, threshold 0.5).

Equal to eval_mm/infographicsvqa_eval.py of QwenLM/Qwen-VL and to lmms-eval's `anls`: case and runs of spaces are not
compared, yet the length that the distance is divided by is that of the texts as they stand.
"""

from dataset.sample import Sample
from executor.evaluate.scoring.score import BoxSpace, Score

THRESHOLD = 0.5


def score(text: str, sample: Sample, space: BoxSpace | None = None) -> Score:
    """1 less the smallest normalised distance to an accepted answer; 0 where that is below 0.5."""
    text = text.strip()
    nearest = min(normalised_distance(text, reference) for reference in sample.references)
    similarity = 1 - nearest
    return Score(similarity if similarity >= THRESHOLD else 0.0, text)


def normalised_distance(said: str, reference: str) -> float:
    """0 for equal texts to 1 for texts with nothing in common."""
    length = max(len(reference.upper()), len(said.upper()))
    plain_said, plain_reference = (" ".join(each.strip().lower().split()) for each in (said, reference))
    return levenshtein(plain_reference, plain_said) / length if length else 0.0


def levenshtein(one: str, other: str) -> int:
    """How many characters to add, drop or exchange make `one` of `other`. Time: product of their lengths."""
    if len(one) > len(other):
        one, other = other, one
    before = list(range(len(one) + 1))
    for row, wanted in enumerate(other, start=1):
        current = [row]
        for column, found in enumerate(one, start=1):
            change = before[column - 1] + (found != wanted)
            current.append(min(change, before[column] + 1, current[-1] + 1))
        before = current
    return before[-1]
