"""The `generate` command: answer a recipe's questions and print them.

Requests are prepared a few at a time while others are being answered, so thousands of videos are never in memory.
A request that cannot be answered has its error in its row; the others are answered, and the exit status is 2.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dataset.load import load_dataset
from dataset.sample import Dataset, Sample, media_source
from executor.commands.generate.results import ResultsFile, settings_of
from executor.errors import UserError
from executor.host.env import rank_place
from executor.recipe.generation import sampling_params
from executor.recipe.schema import Recipe
from executor.recipe.settle import Prepared, prepare
from executor.schedule.request import Prompt, SamplingParams

logger = logging.getLogger(__name__)

LOOK_AHEAD = 2  # prompts kept ready beyond those being answered
BUILD_SLICE_S = 0.05  # preparing prompts may hold running answers up for so long between two steps
BAR_AFTER_S = 5.0
SHOWN_CHARACTERS = 300  # of a question

Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A request in the engine."""

    index: int
    sample: Sample
    params: SamplingParams
    prompt: Prompt
    build_s: float  # reading its media and making its prompt


def run(recipe: Recipe, build: Callable[..., Any] | None = None, out: TextIO | None = None) -> tuple[Row, int]:
    """Answer everything `recipe` asks; returns the JSON document and the exit status.

    `build` makes the engine (executor.commands.build.engine_of). Raises UserError for what keeps all from starting.
    """
    out = out or sys.stdout
    place = rank_place()
    if place.rank:
        _assist(prepare(recipe, place.local_world_size), build)
        return {"command": "generate"}, 0
    dataset = load_dataset(recipe.data)
    prepared = prepare(recipe, place.local_world_size)
    recipe = prepared.recipe
    params = sampling_params(recipe.generation, prepared.generation_config)
    opened = nullcontext()
    if recipe.data.results_path:
        opened = ResultsFile(recipe.data.results_path, settings_of(recipe), dataset)
    with opened as results:
        rows = results.answered() if results else {}
        rows = {index: row for index, row in rows.items() if index < len(dataset)}
        if rows:
            logger.info("%d of %d answers are in %s already", len(rows), len(dataset), recipe.data.results_path)
        started = time.monotonic()
        if len(rows) < len(dataset) or recipe.parallel.world_size > 1:  # the other ranks wait for this one
            started = _answer_missing(prepared, params, dataset, rows, results, build, out)
        if results:
            results.sort()
    outputs = [rows[index] for index in sorted(rows)]
    num_failed = sum(row["error"] is not None for row in outputs)
    _print_summary(outputs, num_failed, time.monotonic() - started, out)
    document = {
        "command": "generate",
        "model": recipe.model.model_path,
        "device": recipe.model.device,
        "exe_mode": recipe.model.exe_mode,
        "outputs": outputs,
    }
    return document, 2 if num_failed else 0


def _answer_missing(
    prepared: Prepared,
    params: SamplingParams,
    dataset: Dataset,
    rows: dict[int, Row],
    results: ResultsFile | None,
    build: Callable[..., Any] | None,
    out: TextIO,
) -> float:
    """Fill `rows` with an answer (or an error) for every sample that has none, printing and saving each.

    Returns when the engine was ready, in monotonic seconds.
    """
    from executor.commands.build import open_rank  # loads torch: only when there is work for it
    from executor.commands.generate.spread import Spread

    device, parallel = open_rank(prepared.recipe)
    spread = Spread(parallel, dataset)
    if not spread.start([index for index in range(len(dataset)) if index not in rows]):
        parallel.disconnect()
        return time.monotonic()
    engine = _build(prepared, device, parallel, build)
    ready = time.monotonic()
    printer = _Printer(len(dataset), out, already=rows)
    on_screen = sys.stderr.isatty()
    interval_s = 0.2 if on_screen else 30.0  # a log file gets a line now and then
    with tqdm(total=len(dataset), initial=len(rows), unit="request", delay=BAR_AFTER_S, mininterval=interval_s) as bar:
        for row in _all_rows(engine, prepared.recipe, params, spread, len(dataset) - len(rows)):
            if results:
                results.append(row)
            rows[row["index"]] = row
            bar.update()
            if printer.has_next(row["index"]):
                shown = on_screen and bar.format_dict["elapsed"] > BAR_AFTER_S
                if shown:
                    bar.clear()
                printer.print_ready(rows)
                if shown:
                    bar.refresh()
    parallel.disconnect()
    return ready


def _build(prepared: Prepared, device: Any, parallel: Any, build: Callable[..., Any] | None) -> Any:
    if build is None:
        from executor.commands.build import engine_of as build
    return build(prepared, device, parallel)


def _assist(prepared: Prepared, build: Callable[..., Any] | None) -> None:
    """What a rank other than 0 does: answer for its replica, or follow the rank that does."""
    from executor.commands.build import open_rank
    from executor.commands.generate.spread import Spread

    recipe = prepared.recipe
    device, parallel = open_rank(recipe)
    spread = Spread(parallel, load_dataset(recipe.data) if parallel.leads else None)
    if spread.start():
        engine = _build(prepared, device, parallel, build)
        if parallel.leads:
            params = sampling_params(recipe.generation, prepared.generation_config)
            for row in _own_rows(engine, recipe, params, spread):
                if row is not None:
                    spread.send(row)
        else:
            engine.follow()
    parallel.disconnect()


def _all_rows(engine: Any, recipe: Recipe, params: SamplingParams, spread: Any, count: int) -> Iterator[Row]:
    """The rows of all replicas, `count` in all, as they are finished."""
    for row in _own_rows(engine, recipe, params, spread):
        arrived = [*([] if row is None else [row]), *spread.received()]
        count -= len(arrived)
        yield from arrived
    while count:
        for row in spread.received():
            count -= 1
            yield row
        spread.wait()


def _own_rows(engine: Any, recipe: Recipe, params: SamplingParams, spread: Any) -> Iterator[Row | None]:
    """This replica's rows, and None after each step."""
    yield from answer(engine, recipe, params, spread.mine(), spread.most)
    yield from engine.close()


def answer(
    engine: Any, recipe: Recipe, params: SamplingParams, samples: Iterable[tuple[int, Sample]], most: int
) -> Iterator[Row | None]:
    """Rows of all samples as they are finished, not in order, and None after each step.

    Bad samples yield a row with `error` set. At most `most` samples are taken at a time.
    """
    from executor.engine.engine import Collector

    collector, waiting, pending = Collector(), iter(samples), {}
    most = min(recipe.scheduler.max_num_seqs + LOOK_AHEAD, most)
    exhausted = False
    while pending or not exhausted:
        slice_end = time.monotonic() + BUILD_SLICE_S
        while not exhausted and len(pending) < most and (not pending or time.monotonic() < slice_end):
            index, sample = next(waiting, (None, None))
            if sample is None:
                exhausted = True
                break
            try:
                asked = _ask(engine, recipe, params, index, sample)
                request_id = engine.add(asked.prompt, asked.params)
            except UserError as error:
                yield _failed_row(index, sample, str(error))
                continue
            collector.expect(request_id, asked.params.n)
            pending[request_id] = asked
        if not pending:
            continue
        outputs = engine.step()
        assert outputs or engine.has_work, f"the engine lost {len(pending)} requests"
        for completion in collector.feed(outputs):
            asked = pending.pop(completion.request_id)
            yield _row(asked, completion, engine, recipe)
        yield None


def _ask(engine: Any, recipe: Recipe, params: SamplingParams, index: int, sample: Sample) -> Asked:
    """Read a sample's media and make its prompt. UserError for what cannot be asked."""
    from executor.engine.engine import random_seed

    if sample.error:
        raise UserError(sample.error)
    started = time.monotonic()
    messages = list(sample.messages)
    if recipe.data.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": recipe.data.system_prompt})
    prompt = engine.processor.build(messages, chat_template_kwargs=recipe.data.chat_template_kwargs or None)
    if params.temperature and recipe.generation.seed is None:
        params = replace(params, seed=random_seed())
    return Asked(index, sample, params, prompt, time.monotonic() - started)


def _row(asked: Asked, completion: Any, engine: Any, recipe: Recipe) -> Row:
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
    }
    if asked.params.n > 1:
        row["texts"] = list(completion.texts)
    if asked.params.temperature:
        row["seed"] = asked.params.seed
    if asked.sample.reference is not None:
        row["reference"] = asked.sample.reference
    if asked.params.logprobs is not None:
        row["logprobs"] = [[_plain(value) for value in answer] for answer in completion.logprobs]
    if recipe.generation.draw:
        row["drawn"] = _draw(asked, completion.texts[0], engine.processor.box_convention, recipe)
    return row


def _failed_row(index: int, sample: Sample, error: str) -> Row:
    counts = ("text", "finish_reason", "prompt_tokens", "vision_tokens", "completion_tokens")
    times = ("ttft_ms", "tpot_ms", "e2e_ms")
    return {**_row_head(index, sample), **dict.fromkeys((*counts, *times)), "error": error}


def _row_head(index: int, sample: Sample) -> Row:
    return {"index": index, "id": sample.id, "media": sample.media, "prompt": sample.question}


def _draw(asked: Asked, text: str, convention: str, recipe: Recipe) -> str | None:
    """Save a copy of the prompt's first picture with the boxes and points of `text`; None if there is neither."""
    from PIL import Image

    from executor.media.draw import draw_marks, find_marks, to_pixels
    from executor.media.image import decode_image
    from executor.media.media import load_media

    position = next((i for i, item in enumerate(asked.prompt.media) if item.kind == "image"), None)
    marks = find_marks(text)
    if position is None or not marks:
        return None
    item = asked.prompt.media[position]
    source = media_source(asked.sample.media_parts[position])
    # The picture as the model saw it: turned upright, without transparency.
    media = load_media(source, "image")
    pixels = decode_image(media.content, source=media.source).permute(1, 2, 0).numpy()
    marks = to_pixels(marks, convention, tuple(item.pixels.shape[-2:]), pixels.shape[:2])
    folder = Path(recipe.model.output_path) / "drawn"
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(asked.sample.media[position]).stem if isinstance(source, str) else "picture"
    path = folder / f"{asked.index:05d}_{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)[:60]}.png"
    draw_marks(Image.fromarray(pixels), marks).save(path)
    return str(path)


class _Printer:
    """Prints rows in the order of the data set, each as soon as all before it are there."""

    def __init__(self, total: int, out: TextIO, already: Iterable[int]) -> None:
        self._total, self._out, self._next = total, out, 0
        self._already = set(already)
        self._skip()

    def _skip(self) -> None:
        while self._next in self._already:
            self._next += 1

    def has_next(self, index: int) -> bool:
        return index == self._next

    def print_ready(self, rows: dict[int, Row]) -> None:
        while self._next in rows:
            print(self._block(rows[self._next]), file=self._out, flush=True)
            self._next += 1
            self._skip()

    def _block(self, row: Row) -> str:
        lines = [f"[{row['index'] + 1}/{self._total}] {', '.join(row['media']) or 'no media'}"]
        if row["prompt"]:
            lines.append(_field("question", _shorten(row["prompt"])))
        if row["error"] is not None:
            return "\n".join([*lines, _field("error", row["error"]), ""])
        for text in row.get("texts", [row["text"]]):
            lines.append(_field("answer", text))
        tokens = f"{row['vision_tokens']} vision, {row['prompt_tokens']} prompt, {row['completion_tokens']} completion"
        lines.append(_field("tokens", tokens))
        tpot = "-" if row["tpot_ms"] is None else f"{row['tpot_ms']:.1f} ms"
        lines.append(_field("time", f"TTFT {row['ttft_ms']:.1f} ms, TPOT {tpot}, e2e {row['e2e_ms']:.1f} ms"))
        if row.get("drawn"):
            lines.append(_field("drawn", row["drawn"]))
        return "\n".join([*lines, ""])


def _field(name: str, value: str) -> str:
    return f"  {name:<10}" + value.replace("\n", "\n" + " " * 12)


def _shorten(text: str) -> str:
    """For the eye; the JSON has it whole."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"


def _print_summary(outputs: list[Row], num_failed: int, seconds: float, out: TextIO) -> None:
    tokens = sum(row["completion_tokens"] or 0 for row in outputs)
    failed = f", {num_failed} failed" if num_failed else ""
    print(f"{len(outputs) - num_failed} answered{failed}, {tokens} tokens, {seconds:.1f} s", file=out, flush=True)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else value
