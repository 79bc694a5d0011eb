"""The calibration set: what the model is shown while it is looked at.

A set is a folder of pictures and videos, or a file of rows (docs/datasets.md). A folder's file may have its question in
a text of the same name beside it; a folder with one JSONL file in it is that file's rows.
Legend: T tokens of a prompt, P visual tokens.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset.entries import DEFAULT_QUESTIONS, read_entry
from dataset.files import open_rows
from dataset.sample import Dataset, media_source
from dataset.sample import Sample as Row
from dataset.sources import folder_files, media_kind
from executor.calibrate.settings import Settings
from executor.engine.encode import Piece, passes, patches_of
from executor.errors import ODD_DATA_ERRORS, UserError
from executor.recipe.peak import ENCODE_TOKENS
from executor.schedule.request import Prompt

logger = logging.getLogger(__name__)

FEW = 8
"""Fewer samples than this give scales that other pictures do not fit."""
MOST_PIXELS = 1280 * 28 * 28
"""Of a picture of the calibration set: larger ones say nothing more of the activations, and cost time and memory."""
MOST_TOKENS = 8192
"""Of a prompt with a video, which has three quarters of them at most."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt. grids: of the pieces that its media are encoded in. spans: (start, count, piece, offset) each."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [3, T]
    grids: tuple[tuple[int, int, int], ...]
    spans: tuple[tuple[int, int, int, int], ...]

    def visual_index(self) -> Tensor:
        """Places of the visual tokens in the prompt, int64 [P]."""
        return torch.cat([torch.arange(start, start + count) for start, count, _, _ in self.spans])

    def placed(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Of every span the rows of its piece's features."""
        return [features[piece][offset : offset + count] for _, count, piece, offset in self.spans]

    def tensors(self) -> dict[str, Tensor]:
        """For a file, and back by `sample_of`."""
        return {
            "token_ids": self.token_ids,
            "positions": self.positions,
            "grids": torch.tensor(self.grids, dtype=torch.int64).view(-1, 3),
            "spans": torch.tensor(self.spans, dtype=torch.int64).view(-1, 4),
        }


def sample_of(tensors: dict[str, Tensor]) -> Sample:
    grids, spans = (tuple(map(tuple, tensors[name].tolist())) for name in ("grids", "spans"))
    return Sample(tensors["token_ids"], tensors["positions"], grids, spans)


def open_calibration(path: Path) -> Dataset:
    """The rows of a calibration set. UserError where it is neither a folder nor a file, or holds nothing."""
    if path.is_file():
        return open_rows(path)
    if not path.is_dir():
        raise UserError(f"--calibration: there is no folder or file {path}")
    files = sorted(path.glob("*.jsonl"))
    if len(files) == 1:
        return open_rows(files[0])
    rows: list[Row] = []
    for file in folder_files(path):
        rows += read_entry({"prompt": _question(file), "media": [str(file)]}, file.name, path)
    return Dataset(path, rows)


def _question(file: Path) -> str:
    text = file.with_suffix(".txt")
    if text.is_file():
        try:
            return text.read_text(encoding="utf-8-sig").strip() or DEFAULT_QUESTIONS[(media_kind(str(file)),)][0]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--calibration: {text} cannot be read as UTF-8: {error}") from error
    return DEFAULT_QUESTIONS[(media_kind(str(file)),)][0]


def chosen(data: Dataset, count: int) -> list[int]:
    """Numbers of `count` rows spread evenly over the set, or of all it has."""
    total = len(data)
    return list(range(total)) if total <= count else [index * total // count for index in range(count)]


def fingerprint(data: Dataset, settings: Settings) -> str:
    """Of the rows that are taken, and of the files they name."""
    digest = hashlib.sha256()
    for index in chosen(data, settings.samples):
        row = data[index]
        digest.update((row.error or row.fingerprint()).encode())
        for part in row.media_parts:
            source = media_source(part)
            if isinstance(source, str) and Path(source).is_file():
                digest.update(hashlib.sha256(Path(source).read_bytes()).digest())
    return digest.hexdigest()


def prompts(data: Dataset, settings: Settings, processor: Any) -> Iterator[Prompt]:
    """The prompts of the chosen rows, one at a time; rows that cannot be asked are named in the log and left out."""
    for index in chosen(data, settings.samples):
        row = data[index]
        try:
            if row.error:
                raise UserError(row.error)
            yield processor.build(
                list(row.messages), tools=row.tools or None, chat_template_kwargs=dict(row.template_kwargs) or None
            )
        except ODD_DATA_ERRORS as error:
            logger.warning("calibration: %s is left out: %s", row.id, error)


def pieces_of(prompt: Prompt, processor: Any, dtype: torch.dtype) -> tuple[Sample, dict[str, Tensor]]:
    """A prompt as a sample, and the patches of its media, `patches.N` each; long videos in pieces of some frames."""
    patches: dict[str, Tensor] = {}
    grids: list[tuple[int, int, int]] = []
    first_tokens: dict[int, list[tuple[int, int, int]]] = {}  # medium -> (first token, count, piece)
    for number, item in enumerate(prompt.media):
        for piece in (piece for batch in passes([item], ENCODE_TOKENS) for piece in batch):
            patches[f"patches.{len(grids)}"] = patches_of([piece], processor.picture, dtype, torch.device("cpu"))
            first_tokens.setdefault(number, []).append(_place(piece, len(grids)))
            grids.append(piece.grid)
    spans = []
    for span in prompt.spans:
        for first, count, piece in first_tokens[span.media_index]:
            low, high = max(first, span.offset), min(first + count, span.offset + span.num_tokens)
            if low < high:
                spans.append((span.start + low - span.offset, high - low, piece, low - first))
    token_ids = torch.tensor(prompt.token_ids, dtype=torch.int64)
    positions = torch.from_numpy(prompt.positions).contiguous()
    return Sample(token_ids, positions, tuple(grids), tuple(spans)), patches


def _place(piece: Piece, number: int) -> tuple[int, int, int]:
    tokens = piece.tokens
    return tokens.start, tokens.stop - tokens.start, number


def check_count(count: int, has_media: bool, settings: Settings, path: Path) -> None:
    """UserError for none, a warning for few, by what remains of the calibration set."""
    if not count:
        raise UserError(f"--calibration: none of the rows of {path} can be asked; the log names each with its reason")
    if count < FEW:
        logger.warning(
            "calibration: %d samples are few; scales measured on fewer than %d do not fit other pictures. About 32 "
            "of the kind that the model will see are better than any other setting",
            count,
            FEW,
        )
    if not has_media and settings.quantize_vision:
        raise UserError(
            f"--calibration: {path} holds no picture or video, so nothing is known of the vision encoder; add some, "
            "or leave the encoder float with --no-quantize_vision"
        )
