"""MMMU: letters of multiple choice, numbers and phrases of open questions.

Equal to eval/eval_utils.py of MMMU-Benchmark/MMMU, with one exception: where no choice can be read out of an answer the
public code draws one at random. Here such an answer is wrong, and says so by an empty `extracted`: equal runs have
equal scores, which are lower by what luck would have given (a quarter of such answers, of four choices).
"""

import re

from dataset.sample import Sample
from executor.evaluate.scoring.choice import letters
from executor.evaluate.scoring.score import BoxSpace, Score

Value = str | float
WORDS_OF_A_SENTENCE = 5  # in longer answers an option's own text is looked for
DECIMALS = 2
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_STRIPPED_SIGNS = ",.!?;:'"  # one kind after the other, from both ends
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def score(text: str, sample: Sample, space: BoxSpace | None = None) -> Score:
    """1 or 0: the letter of a sample with choices, else whether an accepted value or phrase is among those said."""
    if sample.choices:
        said = chosen(text, sample.choices)
        return Score(float(said in sample.references), said)
    values = said_values(text)
    accepted = [value for reference in sample.references for value in as_values(reference)]
    shown = "; ".join(dict.fromkeys(str(value) for value in values))
    return Score(float(any(_is_met(value, accepted) for value in values)), shown)


def chosen(text: str, choices: tuple[str, ...]) -> str:
    """The letter that an answer decides for, "" for none: "(A)", then "A ", then "A.", then an option's own text.

    Of several the last one counts.
    """
    for sign in _STRIPPED_SIGNS:
        text = text.strip(sign)
    text = f" {text} "
    known = letters(len(choices))
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in known if form.format(letter) in text]
        if found:
            return found[0] if len(found) == 1 else max(found, key=lambda each: text.rfind(place.format(each)))
    if len(text.split()) <= WORDS_OF_A_SENTENCE:
        return ""
    plain = text.lower()
    found = [letter for letter, option in zip(known, choices, strict=True) if option.lower() in plain]
    return max(found, key=lambda each: plain.rfind(choices[known.index(each)].lower()), default="")


def said_values(text: str) -> list[Value]:
    """What an answer to an open question says: the ends of its sentences behind words such as "is", and the numbers
    in them, as `as_values` has them."""
    phrases = _key_phrases(text)
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    return [value for said in (*phrases, *numbers) for value in as_values(said)]


def as_values(text: str) -> list[Value]:
    """A number rounded to two places, or the text in lower case; a single character with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), DECIMALS)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_phrases(text: str) -> list[str]:
    """Of every sentence the shortest end behind an indicator; of the last one also behind an equals sign."""
    text = text.strip().strip(".").lower()
    sentences = _SENTENCES.split(text)
    found = []
    for index, sentence in enumerate(sentences):
        signs = (*INDICATORS, "=") if index == len(sentences) - 1 else INDICATORS
        shortest = ""
        for end in (sentence.split(sign)[-1].strip() for sign in signs if sign in sentence):
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in TRIVIAL:
            found.append(shortest)
    return found or [text]


def _is_met(said: Value, accepted: list[Value]) -> bool:
    """A number must be one of the accepted; a text must hold one of the accepted texts."""
    if isinstance(said, str):
        return any(isinstance(value, str) and value in said for value in accepted)
    return said in accepted
