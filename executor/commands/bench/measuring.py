"""The runs of a benchmark over one engine: what each asks, what it took, and what it used."""

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from dataset.sample import Dataset, Sample
from executor.bench.drive import Question, drive
from executor.bench.floor import Gauge, StepLog
from executor.bench.replicas import Replicas
from executor.bench.results import Load, Point, Run, Startup
from executor.bench.workload import PlannedRun, planned_runs
from executor.commands.generate.ask import ask
from executor.engine.loop import EngineLoop
from executor.engine.stages import StageTimes
from executor.host.limits import peak_memory_bytes, restart_peak_memory
from executor.host.uptime import process_age_s
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes
from executor.schedule.request import SamplingParams

logger = logging.getLogger(__name__)


class Measuring:
    """Makes all runs; `runs` has those that count, by load, also after an interruption."""

    def __init__(
        self, recipe: Recipe, params: SamplingParams, dataset: Dataset, loop: EngineLoop, replicas: Replicas
    ) -> None:
        self.recipe, self.params, self.loop, self.replicas = recipe, params, loop, replicas
        self.engine = loop.engine
        self.dataset = dataset
        self.gauge = Gauge(recipe, self.engine.runner.dtype)
        self.runs: dict[Load, list[Run]] = {}
        self.steps: dict[Load, list[StepLog]] = {}  # of the same runs
        self.weights_s, self.first_token_s = process_age_s(), None
        self._samples: dict[int, Sample] = {}  # drawn and read before a run begins, once

    @property
    def startup(self) -> Startup:
        return Startup(self.weights_s, self.first_token_s)

    def all_runs(self) -> None:
        """KeyboardInterrupt ends it; whole runs are kept."""
        planned = list(planned_runs(self.recipe, len(self.dataset)))
        if any(len(set(run.places)) < len(run.places) for run in planned):
            logger.warning(
                "the data set has %d requests, and a batch has more: some are asked several times in one run, where "
                "the prefix cache knows them; see data_config.limit", len(self.dataset),
            )  # fmt: skip
        for number, run in enumerate(planned, 1):
            steps = StepLog()
            made = self._run(run, steps)
            kind = "warm-up" if run.is_warmup else "run"
            logger.info("%s %d of %d (%s): %.2f s", kind, number, len(planned), run.load.words, made.duration_s)
            if not run.is_warmup:
                self.runs.setdefault(run.load, []).append(made)
                self.steps.setdefault(run.load, []).append(steps)
                if self.replicas.is_first:
                    self.gauge.look()

    def points(self, shapes: ModelShapes) -> tuple[Point, ...]:
        """What was measured, beside its floors where the chip's speeds are known."""
        points, speeds = [], self.gauge.speeds
        for load, runs in self.runs.items():
            floor = None
            if speeds is not None:
                floors = [steps.floors(self.recipe, shapes, speeds) for steps in self.steps[load]]
                floor = floors[-1].of_point(speeds, is_one_batch=load.batch_size is not None)
                runs = [replace(run, floor_s=each.total_s) for run, each in zip(runs, floors, strict=True)]
            points.append(Point(load, tuple(runs), floor))
        return tuple(points)

    def _run(self, run: PlannedRun, steps: StepLog) -> Run:
        questions = [self._question(place) for place in self.replicas.share(run.places)]
        self.engine.scheduler.forget()
        self.replicas.begin()
        restart_peak_memory()
        self.engine.runner.device.restart_peak()
        before, drafts_before = self.engine.runner.clock.times(), self.engine.speculation
        age_s, started_s = process_age_s(), time.perf_counter()
        self.engine.watch = steps
        results = drive(self.loop, questions, self.params)
        self.engine.watch = None
        own_s = time.perf_counter() - started_s
        times = self.engine.runner.clock.times().since(before)
        self._judge(run, len(questions), steps)
        peak = self.engine.runner.device.peak_bytes() or peak_memory_bytes()
        results = self.replicas.gather(results)
        if self.first_token_s is None and age_s is not None:
            first_s = [result.token_times_s[0] for result in results if result.token_times_s]
            self.first_token_s = age_s + min(first_s) if first_s else None
        return Run(
            duration_s=max([own_s, *(result.ended_s for result in results)]),
            requests=tuple(results),
            stages_s=dict(times.by_stage()),
            model_tpot_s=model_tpot_s(times, steps.tokens_per_row),
            peak_memory_bytes=peak or None,
            beside=self.engine.speculation.since(drafts_before).figures(),
        )

    def _judge(self, run: PlannedRun, num_asked: int, steps: StepLog) -> None:
        """Say it where a batch has not been one."""
        if run.load.batch_size is not None and steps.most_rows < num_asked:
            logger.warning(
                "%s: at most %d of its %d requests were computed in one step: the KV cache has no room for more, or "
                "some had ended before others began (longer answers, or a larger max_num_batched_tokens)",
                run.load.words, steps.most_rows, num_asked,
            )  # fmt: skip

    def _question(self, place: int) -> Question:
        sample = self._samples.get(place)
        if sample is None:
            sample = self._samples[place] = self.dataset[place]
        make = partial(_made, self.engine, self.recipe, self.params, place, sample)
        return Question(make, "media" if sample.media_parts else "text")


def _made(engine: Any, recipe: Recipe, params: SamplingParams, place: int, sample: Sample) -> tuple[Any, Any]:
    """In a preparing thread."""
    asked = ask(engine, recipe, params, place, sample)
    return asked.prompt, asked.params


def model_tpot_s(times: StageTimes, tokens_per_row: float) -> float | None:
    """Of a token in the model: a decode step, shared by the tokens that a row got of it; None where no step was one."""
    return times.decode_s / times.num_decode_steps / tokens_per_row if times.num_decode_steps else None
