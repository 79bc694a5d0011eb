"""The published benchmarks: how each is asked, which part is scored, by which metric, and where it is published.

The prompts are those that published scores were taken with: the data sets' own, or lmms-eval's defaults. A loader (one
file each beside this one) reads a local folder in a form in which the set is published; nothing is downloaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from executor.errors import UserError, nearest

MOST_CHOICES = 26  # A to Z
VALIDATION = ("validation", "val")  # the same part, by two names


@dataclass(frozen=True)
class Published:
    """One benchmark. `prompt` is filled with {question} and, where there are choices, {options}."""

    title: str
    metric: str
    splits: tuple[str, ...]  # the first is the default
    prompt: str
    prompt_source: str
    published_as: str  # names of repositories and files, for people
    open_prompt: str = ""  # of a question without choices, where a set has both

    def split(self, asked: str | None) -> str:
        """The part to read. UserError for one that the set does not have."""
        if asked is None:
            return self.splits[0]
        wanted = VALIDATION if asked.lower() in VALIDATION else (asked.lower(),)
        same = [split for split in self.splits if split.lower() in wanted]
        if not same:
            raise UserError(
                f"data_config.split: {self.title} has no part {asked!r}{nearest(asked, self.splits)}; "
                f"it has {', '.join(self.splits)}"
            )
        return same[0]

    def ask(self, question: str, choices: Sequence[str] = ()) -> str:
        """The text of one question."""
        if len(choices) > MOST_CHOICES:
            raise UserError(f"there are {len(choices)} options, and {MOST_CHOICES} letters")
        if self.open_prompt and not choices:
            return self.open_prompt.format(question=question)
        options = "\n".join(f"{chr(ord('A') + index)}. {choice}" for index, choice in enumerate(choices))
        return self.prompt.format(question=question, options=options)


SHORT = "{question}\nAnswer the question using a single word or phrase."
LETTER = "{question}\n{options}\n\nAnswer with the option's letter from the given choices directly."
PUBLISHED = {
    "textvqa": Published(
        title="TextVQA",
        metric="vqa_accuracy",
        splits=("validation", "train", "test"),
        prompt=SHORT,
        prompt_source="lmms-eval, textvqa_val",
        published_as="lmms-lab/textvqa (Parquet), or TextVQA_0.5.1_val.json with train_images/ of textvqa.org",
    ),
    "docvqa": Published(
        title="DocVQA",
        metric="anls",
        splits=("validation", "test", "train"),
        prompt=SHORT,
        prompt_source="lmms-eval, docvqa_val",
        published_as="lmms-lab/DocVQA (Parquet, folder DocVQA), or val_v1.0.json with documents/ of docvqa.org",
    ),
    "chartqa": Published(
        title="ChartQA",
        metric="relaxed_accuracy",
        splits=("test", "val", "train"),
        prompt="{question}\nAnswer the question with a single word.",
        prompt_source="lmms-eval, chartqa",
        published_as="lmms-lab/ChartQA (Parquet), or vis-nlp/ChartQA: test_human.json, test_augmented.json and png/",
    ),
    "mmmu": Published(
        title="MMMU",
        metric="mmmu_accuracy",
        splits=("validation", "dev", "test"),
        prompt=LETTER,
        prompt_source="lmms-eval, mmmu_val",
        published_as="MMMU/MMMU (Parquet, a folder for each subject) or lmms-lab/MMMU (Parquet, all in one)",
        open_prompt="{question}\n\nAnswer the question using a single word or phrase.",
    ),
    "ocrbench": Published(
        title="OCRBench",
        metric="ocrbench_accuracy",
        splits=("test",),
        prompt="{question}",
        prompt_source="lmms-eval, ocrbench",
        published_as="echo840/OCRBench (Parquet), or OCRBench.json with OCRBench_Images/ of Yuliang-Liu/MultimodalOCR",
    ),
    "refcoco": Published(
        title="RefCOCO",
        metric="box_iou",
        splits=("val", "testA", "testB", "test"),
        prompt='Locate every object that matches the description "{question}" in the image. '
        "Report bbox coordinates in JSON format.",
        prompt_source="lmms-eval, refcoco_grounding; AISBench, refcoco",
        published_as="lmms-lab/RefCOCO, RefCOCOplus, RefCOCOg (Parquet), or refcoco_val.jsonl of Qwen-VL's eval_mm",
    ),
    "video_mc": Published(
        title="video multiple choice (Video-MME, MVBench)",
        metric="choice_accuracy",
        splits=("test", "train", "validation"),
        prompt="Select the best answer to the following multiple-choice question based on the video. Respond with only "
        "the letter (A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:",
        prompt_source="Video-MME, frames without subtitles",
        published_as="lmms-lab/Video-MME (Parquet) with its videos, or OpenGVLab/MVBench: json/ and video/",
    ),
}
METRICS_OF_OTHERS = {"tiny_world": "exact_match", "jsonl": "exact_match"}


def default_metric(dataset: str) -> str | None:
    """The metric a data set is scored with unless the recipe names one; None for sets without accepted answers."""
    return PUBLISHED[dataset].metric if dataset in PUBLISHED else METRICS_OF_OTHERS.get(dataset)
