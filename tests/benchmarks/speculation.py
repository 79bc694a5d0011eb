"""Answers with drafts beside the same answers without: one process, the same weights, runs in turns, ratios.

    python -m tests.benchmarks.speculation [--layers 8] [--tokens 96] [--repeats 3] [--batch 1]
                                           [--methods ngram,lookahead] [--parts copy,json,prose,random]
                                           [--num-drafts 7] [--always] [--folder FOLDER]

The model has Qwen2.5-VL-3B's layer shapes and random weights (tests.benchmarks.against_transformers), and every step
is computed in full. Random weights repeat nothing by themselves. What a step chooses is therefore replaced by a script:
the answer that somebody who can read would give, as long as the drafts before it agree with it; behind a wrong draft
the model's own choice stays. So proposers, verification and adaptivity run as they are, and the share of right drafts
is that of the text. Texts are cut into tokens as Qwen2's tokenizer cuts them before its merges (words, single digits,
runs of punctuation), which are fewer and longer than real ones.

copy    a table of ten rows out of a picture's caption, word by word
json    the same table as a list of JSON objects
prose   a description of a picture: nothing is copied, phrases hardly repeat
random  random tokens: nothing repeats at all
Decode alone is timed: from the first token to the last. `gain` is least, median and most of the runs' tokens by second
over those without; `gain_cpu` the same by the seconds of all cores, which other processes disturb less. A new
`Speculator` in every run, so that it learns the machine's costs anew. Not a test: timings on shared machines vary.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from executor.commands.build import text_proposer
from executor.device import ops
from executor.device.cpu.ops import open_cpu
from executor.device.table import DeviceSettings
from executor.engine.engine import Engine
from executor.engine.places import Places
from executor.engine.speculation.speculator import Speculator
from executor.recipe.schema import SpeculativeSection
from executor.schedule.request import Prompt, SamplingParams
from tests.benchmarks.against_transformers import canonical_tensors, our_engine, reference_model
from tests.reference import tokenizer_of

NAMES = (
    *("Anchor bolt", "Bearing", "Cable tie", "Dowel", "Elbow pipe", "Flange", "Gasket", "Hinge", "Insulator"),
    "Mounting plate",
)
PROSE = """A narrow street climbs between whitewashed houses toward a small harbour chapel whose bell hangs silent in
the noon heat. On the left, an elderly fisherman mends green nets beside three upturned boats; his dog sleeps under a
bench with peeling blue paint. Bougainvillea spills over the balcony above him and throws purple shade across uneven
cobbles. Two children chase a paper kite past the bakery, where trays of sesame rings cool on open windowsills. Farther
up, laundry flutters like signal flags and a cyclist, leaning hard against the slope, balances melons in a wicker
basket. The sea appears only as a bright triangle at the end of this lane, crossed by one white sail. Shadows are short
and sharp, so the photograph was probably taken around midday in early summer. Nobody looks toward the camera except a
tabby cat perched on an electricity box, whose yellow eyes catch more light than anything else here."""


def table_rows() -> list[tuple[str, str, str, str]]:
    draw = random.Random(4)
    return [
        (name, f"{draw.randrange(10, 99)}-{draw.randrange(1000, 9999)}", str(draw.randrange(2, 400)),
         f"{draw.randrange(1, 90)}.{draw.randrange(10, 99)}")
        for name in NAMES
    ]  # fmt: skip


def table() -> str:
    lines = ["| Item | Part number | Quantity | Price |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table_rows())])


def as_json() -> str:
    keys = ("item", "part_number", "quantity", "price")
    return json.dumps([dict(zip(keys, row, strict=True)) for row in table_rows()], indent=1)


class Words:
    """Texts as tokens."""

    def __init__(self) -> None:
        self._cut = tokenizer_of("qwen2_5_vl").backend_tokenizer.pre_tokenizer.pre_tokenize_str
        self._ids: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        return [self._ids.setdefault(piece, 1000 + len(self._ids)) for piece, _ in self._cut(text)]


def parts(num_tokens: int) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and answer of each."""
    words = Words()
    caption = words("The picture shows a page of a catalogue with this table:\n" + table() + "\n\n")
    draw = random.Random(0)
    noise = [draw.randrange(1000, 150_000) for _ in range(256 + num_tokens)]
    found = {
        "copy": (caption + words("Copy the table."), words(table())),
        "json": (caption + words("Give its rows as JSON with item, part_number, quantity, price."), words(as_json())),
        "prose": (caption + words("Describe the next picture."), words(PROSE.replace("\n", " "))),
        "random": (noise[:256], noise[256:]),
    }
    return {name: (prompt, answer[:num_tokens]) for name, (prompt, answer) in found.items()}


class Scripted:
    """A sampler that computes what the model chooses and gives the script's token in its place."""

    def __init__(self, engine: Engine, answer: list[int]) -> None:
        self.sampler, self.answer = engine.runner.sampler, answer
        self.sample_all = self.sampler.sample
        self.sampler.sample = self

    def __call__(self, logits, requests, num_tokens=None, drafts=None):
        sampled = self.sample_all(logits, requests, num_tokens, drafts)
        places = Places(requests, num_tokens, drafts)
        for number, request in enumerate(requests):
            known, begin = list(places.drafts_of(number)), len(request.output_token_ids)
            for count, row in enumerate(places.rows_of(number)):
                right = self.answer[begin : begin + count + 1]
                if len(right) > count and right[:count] == known[:count]:
                    sampled.token_ids[row] = right[count]
        return sampled

    def remove(self) -> None:
        del self.sampler.sample


def decode_s(engine: Engine, prompt: list[int], answer: list[int], method: str | None, args) -> tuple:
    """Seconds a token, seconds of all cores a token, and what became of the drafts. `method` None: without."""
    engine.runner.speculator, engine.scheduler.max_yield = None, 1
    if method is not None:
        engine.runner.speculator = Speculator(
            text_proposer(SpeculativeSection(method=method)), args.num_drafts, is_adaptive=not args.always
        )
        engine.scheduler.max_yield = 1 + args.num_drafts
    script = Scripted(engine, answer)
    positions = np.broadcast_to(np.arange(len(prompt)), (3, len(prompt))).copy()
    params = SamplingParams(max_new_tokens=len(answer), ignore_eos=True)
    found = {engine.add(Prompt(list(prompt), positions, 0), params): [] for _ in range(args.batch)}
    num_before, clocks = 0, []
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += output.token_ids
        if not clocks and all(found.values()):  # all have begun
            num_before, clocks = sum(map(len, found.values())), [time.perf_counter(), time.process_time()]
    num_tokens = sum(map(len, found.values())) - num_before
    wall_s, cpu_s = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    script.remove()
    assert all(token_ids == answer for token_ids in found.values()), "drafts have changed an answer"
    return wall_s / num_tokens, cpu_s / num_tokens, engine.speculation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--num-drafts", type=int, default=7)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["ngram", "lookahead"])
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["copy", "json", "prose", "random"])
    parser.add_argument("--folder", help="where the weights are, or stay for the next run")
    parser.add_argument("--always", action="store_true", help="adaptive: false")
    args = parser.parse_args()
    device = open_cpu(DeviceSettings("bfloat16"))
    ops.bind(device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / "model.safetensors").exists():
            save_file(canonical_tensors(reference_model(args.layers)), folder / "model.safetensors")
            gc.collect()
        engine = our_engine(folder, args.layers)
    report = {"layers": args.layers, "threads": torch.get_num_threads(), "isa": device.capability.isa, **vars(args)}
    known = parts(args.tokens)
    decode_s(engine, *known["random"], None, args)
    for name in args.parts:
        prompt, answer = known[name]
        rounds = [
            {method: decode_s(engine, prompt, answer, method, args) for method in (None, *args.methods)}
            for _ in range(args.repeats)
        ]
        plain = [each[None][0] for each in rounds]
        found = {"tokens": len(answer), "without_tokens_per_s": round(1 / statistics.median(plain), 2)}
        for method in args.methods:
            found[method] = {key: round(value, 3) for key, value in rounds[-1][method][2].figures().items()}
            for column, name_of in enumerate(("gain", "gain_cpu")):
                ratios = [each[None][column] / each[method][column] for each in rounds]
                found[method][name_of] = [round(figure(ratios), 3) for figure in (min, statistics.median, max)]
        report[name] = found
        print(name, found, file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
