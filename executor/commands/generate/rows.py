"""One answer, or one refusal, as a row of the JSON document and of the results file."""

import logging
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from dataset.sample import Sample, media_source
from executor.errors import UserError, printable
from executor.recipe.schema import Recipe
from executor.schedule.request import Prompt, SamplingParams

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# What reading a picture again, drawing on it and saving it may raise: an answer is worth more than its drawing.
DRAW_ERRORS = (OSError, ValueError, TypeError, ArithmeticError, LookupError, MemoryError, RecursionError, SyntaxError)


@dataclass(frozen=True)
class Asked:
    """A request in the engine."""

    index: int
    sample: Sample
    params: SamplingParams
    prompt: Prompt
    build_s: float  # reading its media and making its prompt


def answered_row(asked: Asked, completion: Any, engine: Any, recipe: Recipe) -> Row:
    row: Row = {
        **_row_head(asked.index, asked.sample),
        "text": completion.texts[0],
        "finish_reason": str(completion.finish_reasons[0]),
        "prompt_tokens": completion.prompt_tokens,
        "vision_tokens": completion.vision_tokens,
        "completion_tokens": completion.completion_tokens,
        # The user waits for the media to be read, too.
        "ttft_ms": _ms(asked.build_s + completion.ttft_s),
        "tpot_ms": _ms(completion.tpot_s) if len(completion.token_ids[0]) > 1 else None,
        "e2e_ms": _ms(asked.build_s + completion.e2e_s),
        "error": None,
        "cached_tokens": completion.cached_tokens,
        "prepare_ms": _ms(asked.build_s),
        "media_sizes": [_sizes(item, engine.processor.box_convention) for item in asked.prompt.media],
        "warnings": list(completion.warnings),
    }
    if asked.params.n > 1:
        row["texts"] = list(completion.texts)
    if asked.params.temperature:
        row["seed"] = completion.seed
    if asked.sample.reference is not None:
        row["reference"] = asked.sample.reference
    if asked.params.logprobs is not None:
        row["logprobs"] = [[_plain(value) for value in answer] for answer in completion.logprobs]
    if recipe.generation.draw:
        row["drawn"] = None
        try:
            row["drawn"] = _draw(asked, completion.texts[0], engine.processor, recipe)
        except DRAW_ERRORS as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            row["warnings"].append(f"the answer could not be drawn: {reason}")
            logger.warning("request %d: %s", asked.index, row["warnings"][-1])
    return row


def _sizes(item: Any, box_convention: str) -> dict[str, list[int]]:
    """Height and width of a picture or video; and the width and height of it in the units of an answer's boxes."""
    is_absolute = box_convention == "absolute"
    return {
        "original": list(item.original_hw),
        "resized": list(item.resized_hw),
        "box_units": [*reversed(item.resized_hw)] if is_absolute else [1000, 1000],
    }


def failed_row(index: int, sample: Sample, error: str) -> Row:
    """`error` with the place of the row before it, where it does not name that itself."""
    place = sample.id.partition(" (")[0]
    error = printable(error if error.startswith(place) else f"{sample.id}: {error}")
    counts = ("text", "finish_reason", "prompt_tokens", "vision_tokens", "completion_tokens")
    times = ("ttft_ms", "tpot_ms", "e2e_ms")
    return {**_row_head(index, sample), **dict.fromkeys((*counts, *times)), "error": error, "warnings": []}


def _row_head(index: int, sample: Sample) -> Row:
    """`fingerprint` is for the results file, and is taken out of the row before anybody sees it."""
    return {
        "index": index,
        "id": sample.id,
        "media": sample.media,
        "prompt": sample.question,
        "fingerprint": sample.fingerprint(),
    }


def check_drawing(recipe: Recipe) -> None:
    """UserError where a recipe wants drawings and their folder cannot be written. Leaves no folder behind."""
    if not recipe.generation.draw:
        return
    folder = _drawn_folder(recipe)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"model_config.output_path: drawn pictures go to {folder}, which cannot be written ({reason}); "
            "give another folder, or set generation_config.draw: false"
        ) from error
    finally:
        for path in made:
            with suppress(OSError, ValueError):
                path.rmdir()


def _drawn_folder(recipe: Recipe) -> Path:
    return Path(recipe.model.output_path) / "drawn"


def _draw(asked: Asked, text: str, processor: Any, recipe: Recipe) -> str | None:
    """Save a copy of the prompt's first picture with the boxes and points of `text`; None if there is neither."""
    from PIL import Image

    from executor.media.draw import draw_marks, find_marks, to_pixels
    from executor.media.image import decode_image
    from executor.media.media import MediaLimits, load_media

    position = next((i for i, item in enumerate(asked.prompt.media) if item.kind == "image"), None)
    marks = find_marks(text)
    if position is None or not marks:
        return None
    item = asked.prompt.media[position]
    source = media_source(asked.sample.media_parts[position])
    # The picture as the model saw it: turned upright, without transparency.
    media = load_media(source, "image", processor.options.limits or MediaLimits())
    pixels = decode_image(media.content, source=media.source).permute(1, 2, 0).numpy()
    marks = to_pixels(marks, processor.box_convention, item.resized_hw, pixels.shape[:2])
    folder = _drawn_folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(asked.sample.media[position]).stem if isinstance(source, str) else "picture"
    path = folder / f"{asked.index:05d}_{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)[:60]}.png"
    draw_marks(Image.fromarray(pixels), marks).save(path)
    return str(path)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else value
