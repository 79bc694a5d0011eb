"""One rank of a test job: `torchrun ... -m tests.parallel.ranks CASES.json OUT.json`.

Answers every case's questions as the generate command does, and leaves what rank 0 saw: tokens, collectives of each
decode step, of every rank how much of the checkpoint it has read, and the results file. Cases follow each other in the
same processes; a case's key `before` names a file that is there `as` another from then on.
"""

import io
import json
import logging
import os
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from executor.checkpoint.weights import LoadReport
from executor.commands import build
from executor.commands.generate import run as generate
from executor.engine.runner import Runner
from executor.recipe.schema import build_recipe

FIELDS = ("text", "world", "replicas")


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    found = [run(case) for case in cases]
    if found[0] is not None:
        out.write_text(json.dumps(found))


def run(case: dict[str, Any]) -> dict[str, Any] | None:
    """What rank 0 saw of one case; None on the other ranks."""
    if before := case.pop("before", None):
        _put(Path(before["file"]), Path(before["as"]))
    watched = Watched(case.pop("prompt_logprobs", None), case.pop("overlaps", False))
    recipe = build_recipe(case)
    document, status = generate.run(recipe, build=watched.build, out=io.StringIO())
    if "outputs" not in document:
        return None
    rows = document["outputs"]
    return {
        "status": status,
        "answers": [row["text"] if row["error"] is None else row["error"] for row in rows],
        "token_ids": [
            [token["token_id"] for token in row["logprobs"][0]] if "logprobs" in row else None for row in rows
        ],
        "logprobs": [[token["logprob"] for token in row["logprobs"][0]] if "logprobs" in row else None for row in rows],
        "prompt_logprobs": watched.prompt_logprobs,
        "steps": watched.steps,
        "loads": watched.loads,
        "results": Path(recipe.data.results_path).read_text() if recipe.data.results_path else None,
    }


def _put(file: Path, place: Path) -> None:
    """A copy that is whole as soon as it is there: every rank puts it, and may read what another one put."""
    partial = place.with_name(f"{place.name}.{os.getpid()}")
    shutil.copyfile(file, partial)
    partial.replace(place)


class AnonymousMemory:
    """How much this process's own memory (no mapped files) grew at most while inside."""

    grown_bytes = 0

    def __enter__(self) -> "AnonymousMemory":
        self._before, self._ended = _anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.grown_bytes = max(self.grown_bytes, _anonymous_bytes() - self._before)


def _anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watched:
    """An engine whose steps and loading are counted; every request may be asked for its prompt's logprobs as well."""

    def __init__(self, num_prompt_logprobs: int | None, overlaps: bool) -> None:
        self.num_prompt_logprobs = num_prompt_logprobs
        self.overlaps = overlaps
        self.prompt_logprobs: dict[str, list[float]] = {}  # prompt -> behind its first token
        # Of every decode step of rank 0: collectives, rows, drafts, its graph's q_len, whether it continues another.
        self.steps: list[list[int]] = []
        self.loads: list[list[int]] = []  # of every rank: bytes read, bytes estimated, growth of its memory

    def build(self, prepared: Any, device: Any, parallel: Any) -> Any:
        load, reports, peaks = build.load_model, [], []

        def noted(*args: Any) -> tuple[Any, LoadReport]:
            with AnonymousMemory() as memory:
                model, report = load(*args)
            reports.append(report)
            peaks.append(memory.grown_bytes)
            return model, report

        build.load_model = noted
        try:
            engine = build.engine_of(prepared, device, parallel)
        finally:
            build.load_model = load
        report = reports[0]
        mine = [report.bytes_read, prepared.memory.weights_bytes, peaks[0]]
        self.loads = [mine]
        if parallel.job.size > 1:
            self.loads = [None] * parallel.job.size
            dist.all_gather_object(self.loads, mine, group=parallel.job.handle)
        self._count(engine.runner)
        engine.overlaps |= self.overlaps
        if self.num_prompt_logprobs is not None:
            self._score(engine)
        return engine

    def _score(self, engine: Any) -> None:
        add, advance = engine.add, engine.advance

        def scored() -> list[Any]:
            pieces = advance()
            for piece in pieces:
                if piece.prompt_logprobs:
                    scores = [x.logprob for x in piece.prompt_logprobs[1:]]
                    prompt = piece.answer.request.prompt  # ids are given in the order in which prompts are ready
                    self.prompt_logprobs[prompt.text + "".join(item.digest.hex() for item in prompt.media)] = scores
            return pieces

        engine.add = lambda prompt, params: add(prompt, replace(params, prompt_logprobs=self.num_prompt_logprobs))
        engine.advance = scored

    def _count(self, runner: Runner) -> None:
        parallel, forward = runner.replica.parallel, runner.forward
        groups = {id(group): group for group in (getattr(parallel, name) for name in FIELDS)}.values()

        def counted(plan: Any, *scores: Any) -> Any:
            before = sum(group.traffic.collectives for group in groups)
            logits = forward(plan, *scores)
            if plan.rows and all(row.num_tokens == 1 and not row.scored for row in plan.rows):
                num_drafts = sum(len(row.draft_ids) for row in plan.rows)
                collectives = sum(group.traffic.collectives for group in groups) - before
                q_len, continues = plan.graph.q_len if plan.graph else 0, plan.continues is not None
                self.steps.append([collectives, len(plan.rows), num_drafts, q_len, int(continues)])
            return logits

        runner.forward = counted


if __name__ == "__main__":
    main()
