"""A checkpoint to a quantized one, stage by stage, with the built-in calibrator.

What one run needs at most: the largest stage's weights, a linear of it in float32, the longest prompt's activations.
Everything else lies on the disk: the activations between two stages of all samples, and what is written.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from executor.calibrate.identity import identity
from executor.calibrate.layer import Job, linears_of_stage, run_stage, without_memory
from executor.calibrate.linears import LinearSource
from executor.calibrate.memory import check_memory, most_bytes, patches_of_longest
from executor.calibrate.plan import plan
from executor.calibrate.sample import (
    MOST_PIXELS,
    MOST_TOKENS,
    check_count,
    fingerprint,
    open_calibration,
    pieces_of,
    prompts,
)
from executor.calibrate.settings import Settings
from executor.calibrate.stages import Bench, Stage, stages_of, tensors_of, with_cache
from executor.calibrate.work import NAME, Work
from executor.calibrate.write import is_other_file, pack
from executor.checkpoint.weights import Checkpoint
from executor.checkpoint.writing import copy_files
from executor.device import ops
from executor.device.ops import Ops
from executor.errors import UserError
from executor.host.limits import host_memory_bytes, peak_memory_bytes, process_memory_bytes
from executor.prompt.options import MediaOptions

logger = logging.getLogger(__name__)

GO_ON = "the same words go on where this stopped"


@dataclass(frozen=True)
class Report:
    """What was done. kinds: linears of each type.

    peak_bytes: the most memory that the process has held; bound_bytes: what it was to hold at most.
    """

    kinds: dict[str, int]
    source_bytes: int
    written_bytes: int
    num_samples: int
    seconds: float
    peak_bytes: int
    bound_bytes: int


@dataclass(frozen=True)
class Source:
    """A float checkpoint, and its family's builders. config: config.json, with its head settled."""

    folder: Path
    config: Mapping[str, Any]
    runner: Any  # models.FAMILY.runner
    dtype: str  # of its weights, as config.json says


def quantize(
    source: Source,
    out: Path,
    settings: Settings,
    calibration: Path | None,
    device: Ops,
    verify: Callable[[Path], None],
) -> Report:
    """Quantize `source` into `out`. Raises UserError for what the settings and the checkpoint do not allow.

    `verify`: called with the finished folder before what is needed to go on is removed.
    RuntimeError where `out` cannot be written; started again it goes on from there.
    """
    try:
        return _quantized(source, out, settings, calibration, device, verify)
    except OSError as error:
        raise RuntimeError(
            f"{error.filename or out}: {error.strerror or error}; once that is mended, {GO_ON}"
        ) from error
    except KeyboardInterrupt as stop:
        if not (out / NAME).is_dir():
            raise
        raise type(stop)(f"{out}: {GO_ON}") from stop


def _quantized(
    source: Source,
    out: Path,
    settings: Settings,
    calibration: Path | None,
    device: Ops,
    verify: Callable[[Path], None],
) -> Report:
    started = time.monotonic()
    ops.bind(device)
    checkpoint = Checkpoint(source.folder)
    bench = Bench(device, getattr(torch, settings.dtype), checkpoint)
    job = Job(settings, bench, lambda: source.runner.build_model(source.config), {}, source.dtype == "float16")
    model = without_memory(job)
    stages = stages_of(model)
    names = tensors_of(stages, checkpoint.catalog)
    linears = [linears_of_stage(model, stage, checkpoint) for stage in stages]
    job = replace(job, kinds=plan([linear for held in linears for linear in held], settings))
    data = _calibration(settings, calibration)
    marks = "" if data is None else fingerprint(data, settings)
    with Work(out, identity(settings, checkpoint, is_other_file, marks, device)) as work:
        bound = process_memory_bytes()
        if not work.is_written:
            if data is not None and work.num_samples is None:
                _gather(job, source, work, data, calibration)
            bound = _written(job, source, out, model, stages, names, linears, work)
            verify(out)
        work.finish()
    types = Counter(job.kinds.values())
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    seconds = time.monotonic() - started
    samples, peak = work.num_samples or 0, peak_memory_bytes()
    return Report(dict(types), checkpoint.total_bytes, written, samples, seconds, peak, bound)


def _written(
    job: Job,
    source: Source,
    out: Path,
    model: Any,
    stages: list[Stage],
    names: list[list[str]],
    linears: list[list[LinearSource]],
    work: Work,
) -> int:
    """Everything that is written, from the samples on; the most memory that it was to take.

    `model`: without memory.
    """
    settings, catalog, dtype = job.settings, job.checkpoint.catalog, job.bench.dtype
    samples = [sample for _, sample in work.samples()]
    num_tokens = max((len(sample.token_ids) for sample in samples), default=0)
    num_patches = patches_of_longest([grid for sample in samples for grid in sample.grids]) if samples else 0
    more = most_bytes(stages, names, linears, catalog, settings, num_tokens, num_patches, dtype.itemsize)
    bound = process_memory_bytes() + more
    check_memory(more, host_memory_bytes(), source.folder.name)
    logger.info("memory: at most %.2f GB, of which this process holds %.2f", bound / 1e9, (bound - more) / 1e9)
    if num_tokens:
        job = replace(job, bench=with_cache(job.bench, model, num_tokens))
    _run_stages(job, stages, names, linears, work)
    pack(work, len(stages), out, settings.kinds.linears, _metadata(settings))
    copy_files(source.folder, out, is_other_file)
    return bound


def _calibration(settings: Settings, path: Path | None) -> Any:
    if not settings.needs_activations:
        return None
    if path is None:
        raise UserError(
            f"--calibration: {settings.scheme} measures activations: name a folder of about 32 pictures, or a file of "
            "rows (docs/datasets.md), of the kind that the model will see. w8a16, and w8a8_dynamic with --smooth 0, "
            "need none"
        )
    return open_calibration(path)


def _gather(job: Job, source: Source, work: Work, data: Any, path: Path) -> None:
    """The prompts of the calibration set, each with the patches of its media, into the work's folder."""
    options = MediaOptions(max_model_len=MOST_TOKENS)
    processor = source.runner.build_processor(source.folder, options)
    most = max(MOST_PIXELS, processor.picture.min_pixels)
    if processor.picture.max_pixels > most:
        processor = source.runner.build_processor(source.folder, replace(options, max_pixels=most))
    count, has_media = 0, False
    for prompt in prompts(data, job.settings, processor):
        sample, patches = pieces_of(prompt, processor, job.bench.dtype)
        work.keep_sample(count, sample, patches)
        count, has_media = count + 1, has_media or bool(patches)
    check_count(count, has_media, job.settings, path)
    work.samples_are_kept(count)


def _run_stages(
    job: Job, stages: list[Stage], names: list[list[str]], linears: list[list[LinearSource]], work: Work
) -> None:
    on_terminal = sys.stderr.isatty()
    if work.done:
        logger.info("going on with stage %d of %d", work.done + 1, len(stages))
    bar = tqdm(total=len(stages), initial=work.done, desc="quantizing", file=sys.stderr, disable=not on_terminal)
    with bar:
        for number in range(work.done, len(stages)):
            started = time.monotonic()
            run_stage(job, stages[number], number, work, names[number], linears[number])
            bar.update()
            if not on_terminal:
                logger.info(
                    "%d of %d, %s: %.1f s, peak memory %.2f GB",
                    number + 1, len(stages), stages[number].name, time.monotonic() - started, peak_memory_bytes() / 1e9,
                )  # fmt: skip


def _metadata(settings: Settings) -> dict[str, Any]:
    """What the description says of how it was made."""
    return {"quantized_with": {"tool": "executor.commands.quantize", **asdict(settings)}}
