"""The letter of a multiple choice out of an answer in any words.

The forms and their order are those of extract_mcq_answer (lmms-eval 0.7.3, tasks/_task_utils/mcq_extract.py): a letter
at the start, at the end, behind "the answer is", then (A), A., A:, A) and a bare A; of several of one form the last
counts. It departs from that function in three ways. A letter must stand alone, where that one takes it out of words
("USA.", "Because"). Behind "the answer is" or "Answer:" the nearest letter counts, not the last ("The answer is B. A is
red"). An option's own text is a choice too, where no letter stands in the answer, and so is a lone small letter.
"""

import re

from dataset.sample import Sample
from executor.evaluate.scoring.score import BoxSpace, Score

DEFAULT_CHOICES = 8  # letters that are looked for where a sample names no choices
_OUTER_SIGNS = (",", ".", "!", "?", ";", ":", "'", '"')
_PHRASES = re.compile(
    r"(?:answer|option|choice) is|answer\s*[:：]|i (?:choose|select|pick)|boxed\{|"
    r"(?:答案|选项)[是为]|答案[:：]|正确答案|选|정답은|답은|답[:：]|옵션|答えは",
    re.IGNORECASE,
)
_FORMS = (r"\({}\)", r"{}\.", "{}:", r"{}\)", "{}")


def score(text: str, sample: Sample, space: BoxSpace | None = None) -> Score:
    """1 where the letter is the accepted one, else 0; an answer without a letter is wrong."""
    said = chosen(text, sample.choices)
    return Score(float(said in {reference.strip().upper() for reference in sample.references}), said)


def letters(count: int) -> list[str]:
    """["A", "B", ...]"""
    return [chr(ord("A") + index) for index in range(count)]


def chosen(text: str, choices: tuple[str, ...]) -> str:
    """The letter an answer decides for, "" for none."""
    for sign in _OUTER_SIGNS:
        text = text.strip().strip(sign)
    text = text.strip()
    known = letters(len(choices) or DEFAULT_CHOICES)
    alone = {letter: option.strip().strip(".").lower() for letter, option in zip(known, choices, strict=False)}
    same = [letter for letter, option in alone.items() if option == text.lower()]
    if len(same) == 1 and text.upper() not in known:
        return same[0]
    if text.upper() in known:
        return text.upper()
    any_letter = "[" + "".join(known) + "]"
    standing = f"(?<![A-Za-z0-9])({any_letter})(?![A-Za-z0-9])"
    return _by_form(text, standing) or _by_option(text, alone)


def _by_form(text: str, standing: str) -> str:
    """The letter in the first form that the text has."""
    at_start = re.match(standing, text)
    at_end = re.search(standing + "$", text)
    if at_start or at_end:
        return (at_start or at_end)[1]
    phrases = list(_PHRASES.finditer(text))
    behind = [re.search(standing, text[phrase.end() :]) for phrase in phrases]
    behind = [match for match in behind if match]
    if behind:
        return behind[-1][1]
    for form in _FORMS:
        found = re.findall(form.format(standing), text)
        if found:
            return found[-1]
    return ""


def _by_option(text: str, options: dict[str, str]) -> str:
    """The letter of the only option whose text the answer holds; one that is part of another that it holds is none."""
    words = "(?<![A-Za-z0-9]){}(?![A-Za-z0-9])"
    held = {each: text_of for each, text_of in options.items() if text_of}
    held = {
        each: text_of for each, text_of in held.items() if re.search(words.format(re.escape(text_of)), text.lower())
    }
    whole = [
        each for each, text_of in held.items() if not any(text_of in other for other in set(held.values()) - {text_of})
    ]
    return whole[0] if len(whole) == 1 else ""
