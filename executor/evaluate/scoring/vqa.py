"""VQA accuracy: how many of ten people gave the answer, three being enough.

Equal to TextVQAAccuracyEvaluator and EvalAIAnswerProcessor of facebookresearch/mmf, also as lmms-eval has them: both
sides are normalised, and the score is the mean over all leave-one-out subsets of min(1, matches / 3).
"""

import re
from functools import cache

from dataset.sample import Sample
from executor.evaluate.scoring.score import BoxSpace, Score

ENOUGH_MATCHES = 3
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_->' + "<@`,?!"
MOST_PERIODS = 32  # the public code hands re.sub a flag as its count: the periods behind the 32nd stay
_PERIOD = re.compile(r"\.(?!\d)")

# What is written for a word that lacks one of these apostrophes; of two apostrophes either may be lacking.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def score(text: str, sample: Sample, space: BoxSpace | None = None) -> Score:
    """The share that a voter's set of answers would give, in steps of a tenth where there are ten."""
    said = normalise(text)
    matches = sum(normalise(reference) == said for reference in sample.references)
    others = len(sample.references)
    if others == 1:  # nobody is left to agree with: the only answer counts whole
        return Score(float(matches), said)
    # A voter who agrees with the answer is left out of his own subset.
    agreeing = matches * min(1.0, (matches - 1) / ENOUGH_MATCHES)
    rest = (others - matches) * min(1.0, matches / ENOUGH_MATCHES)
    return Score((agreeing + rest) / others, said)


def normalise(text: str) -> str:
    """`text` without case, articles and punctuation, with digits for number words and apostrophes put back."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for sign in PUNCTUATION:  # between two words a sign is a space, beside a space it is nothing
        plain = plain.replace(sign, "" if f"{sign} " in text or f" {sign}" in text else " ")
    plain = _PERIOD.sub("", plain, count=MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(contractions().get(word, word) for word in words if word not in ARTICLES)


@cache
def contractions() -> dict[str, str]:
    """{word without one apostrophe: word}."""
    found = {"somebody'd": "somebodyd"}  # as the public table has it
    for word in CONTRACTED.split():
        for at, sign in enumerate(word):
            if sign == "'":
                found[word[:at] + word[at + 1 :]] = word
    return found
