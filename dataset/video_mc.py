"""`dataset: video_mc`: multiple choice about videos, in the forms of Video-MME and MVBench.

Video-MME: lmms-lab/Video-MME's Parquet files, and its videos as VIDEO_ID.mp4 in data/, video/ or videos/. MVBench:
OpenGVLab/MVBench's json/TASK.json and video/ with the folders of their sources; where a question is about a stretch of
its video, only that is looked at. A JSON list or JSON Lines file of one's own has MVBench's keys: video, question,
candidates (or options) and answer, as a text or a letter.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from dataset.place import Place, Row, from_parquet, from_rows, is_within, place_of, question, read_json, read_json_lines
from dataset.sample import Dataset, Sample
from executor.errors import UserError
from executor.recipe.schema import DataSection

VIDEO_FOLDERS = ("data", "video", "videos")
ENDINGS = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov")
_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s+(.*)$", re.DOTALL)  # an option that brings its letter: "A. Apples."


def load(data: DataSection) -> Dataset:
    """The questions, of one part where the set has parts. UserError where no form of the set is there."""
    place = place_of("video_mc", data)
    videos = Videos(place.root)
    build = partial(_sample, place, videos)
    if files := place.parquet():
        return from_parquet(
            place,
            files,
            build,
            needed=("question", "options", "answer"),
            optional=("videoID", "video_id", "video", "question_id", "duration", "domain", "sub_category", "task_type"),
            media=(),
        )
    if place.file is not None:
        paths = [place.file] if place.file.suffix in (".json", ".jsonl") else []
    else:
        folder = place.root / "json" if (place.root / "json").is_dir() else place.root
        paths = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    if not paths:
        raise place.missing(
            f"{place.split}-*.parquet with data/*.mp4", "json/*.json with video/", "*.jsonl with video/"
        )
    rows = [row for path in paths for row in _json_rows(path)]
    return from_rows(place, rows, build, paths)


class Videos:
    """The video files below a folder, found once: sets have thousands, in folders of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """Files by their names with and without ending, and folders of frames by theirs."""
        found: dict[str, list[Path]] = {}
        for folder in (self.root / name for name in VIDEO_FOLDERS):
            for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
                if path.suffix in ENDINGS:
                    found.setdefault(path.stem, []).append(path)
                if path.suffix in ENDINGS or path.is_dir():
                    found.setdefault(path.name, []).append(path)
        return found

    def find(self, name: str) -> Path:
        """A video, or a folder of its frames. UserError where there is none, or there are several of that name."""
        if not is_within(name):
            raise UserError(f"the video {name} is outside of {self.root}; put it, or a link to it, in there")
        direct = self.root / name
        if direct.is_file() or direct.is_dir() and direct != self.root:
            return direct
        found = self._by_name.get(Path(name).name, [])
        found = [path for path in found if path.as_posix().endswith(f"/{name}")] or found
        if not found:
            folders = ", ".join(f"{folder}/" for folder in VIDEO_FOLDERS)
            raise UserError(f"there is no video {name} (looked in {folders} of {self.root})")
        if len(found) > 1:
            places = ", ".join(str(path.relative_to(self.root)) for path in found[:3])
            raise UserError(f"there are {len(found)} videos {name}: {places}; name the one that is meant by its path")
        return found[0]


def _sample(place: Place, videos: Videos, row: Row) -> Sample:
    choices = tuple(_without_letter(text, index) for index, text in enumerate(row.texts("options", "candidates")))
    if len(choices) < 2:
        raise UserError(f"there are {len(choices)} options; two are the fewest")
    video = {"type": "video", "video": str(videos.find(row.text("videoID", "video", "video_id")))} | _stretch(
        row.values
    )
    labels = row.labels(task="task", duration="duration", domain="domain", task_type="task_type")
    text = place.published.ask(row.text("question"), choices)
    letter = _letter(row.values.get("answer"), choices)
    return question(row, text, [video], references=(letter,), choices=choices, labels=labels)


def _without_letter(option: str, index: int) -> str:
    """An option's text, without the letter of its place where it brings that along."""
    match = _LETTERED.match(option)
    return match[2].strip() if match and match[1] == chr(ord("A") + index) else option.strip()


def _letter(answer: Any, choices: tuple[str, ...]) -> str:
    """The letter of the right choice, from that letter or from the choice's text."""
    text = str(answer).strip()
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    if text in choices:
        return letters[choices.index(text)]
    if text.upper() in letters:
        return text.upper()
    spelled = _LETTERED.match(f"{text} ")  # "(B)", "B.", or with the option's text behind it
    if spelled and spelled[1] in letters and spelled[2].strip() in ("", choices[letters.index(spelled[1])]):
        return spelled[1]
    raise UserError(f"answer must be one of the options or its letter, got {answer!r}")


def _stretch(values: Mapping[str, Any]) -> dict[str, float]:
    """From where to where a video is looked at, in seconds, where a question says so."""
    start, end = values.get("start"), values.get("end")
    if start is None or end is None:
        return {}
    return {"video_start": float(start), "video_end": float(end)}


def _json_rows(path: Path) -> Iterator[Row]:
    lines = path.suffix == ".jsonl"
    for number, entry in enumerate(read_json_lines(path) if lines else read_json(path), start=1):
        where = f"{path.name}:{number}" if lines else f"{path.name} entry {number}"
        yield Row(where, {"task": path.stem, **entry}, _no_picture)


def _no_picture(column: str) -> str:
    raise AssertionError(f"a question about a video has no column {column}")
