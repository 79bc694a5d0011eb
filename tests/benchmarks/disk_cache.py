"""The first token of a long prompt with a picture: cold, from the prefix cache on disk of an earlier engine, and from
that in memory.

    python -m tests.benchmarks.disk_cache FOLDER [--dtype bfloat16] [--tokens 1500] [--pixels 700] [--prompts 3]

FOLDER: a checkpoint. Each of `--prompts` prompts, `--tokens` tokens of text behind a square picture of noise, is asked
in a first engine (`cold_s`, with nothing on disk), and again there (`memory_s`), then in a second one over the same
folder (`disk_s`, its files in the page cache; `read_s` of it: reading and checking). Seconds from `add` to the first
token, medians with the least and the largest; another prompt is answered before as a warm-up. With `--plain` `plain_s`:
cold as well, without a cache on disk, which shows what copying blocks away and writing them costs. Not a test.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from executor.commands.build import build_engine
from executor.engine.engine import Engine
from executor.recipe.schema import build_recipe
from executor.schedule.request import Prompt, SamplingParams

ONE = SamplingParams(max_new_tokens=1, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--pixels", type=int, default=700)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    found: dict[str, list[float]] = {"plain_s": [], "cold_s": [], "memory_s": [], "disk_s": [], "read_s": []}
    with tempfile.TemporaryDirectory() as path:
        if given.plain:
            with opened(given, None) as engine:
                found["plain_s"] = [first_token_s(engine, each) for each in prompts(engine, given)]
        with opened(given, path) as engine:
            for each in prompts(engine, given):
                found["cold_s"].append(first_token_s(engine, each))
                found["memory_s"].append(first_token_s(engine, each))
            num_tokens = len(each.token_ids)
        written_bytes = engine.runner.disk_cache.stats().written_bytes
        with opened(given, path) as engine:
            fetch = engine.runner.disk_cache.fetch

            def timed(*args) -> None:
                started_s = time.perf_counter()
                fetch(*args)
                found["read_s"].append(time.perf_counter() - started_s)

            engine.runner.disk_cache.fetch = timed
            asked = prompts(engine, given)
            found["read_s"].clear()  # the warm-up's
            found["disk_s"] = [first_token_s(engine, each) for each in asked]
            loaded = engine.scheduler.num_store_hits / given.prompts
    document = {name: [round(x, 4) for x in (statistics.median(times), min(times), max(times))]
                for name, times in found.items() if times}  # fmt: skip
    document |= {
        "prompt_tokens": num_tokens,
        "loaded_tokens": loaded,
        "written_mb": round(written_bytes / 1e6, 1),
        "cold_to_disk": round(document["cold_s"][0] / document["disk_s"][0], 2),
        "cold_to_memory": round(document["cold_s"][0] / document["memory_s"][0], 2),
    }
    if given.plain:
        document["cold_to_plain"] = round(document["cold_s"][0] / document["plain_s"][0], 3)
    print(json.dumps(document))


def opened(given: argparse.Namespace, path: str | None) -> Engine:
    model = {"model_path": str(given.folder), "device": "cpu", "dtype": given.dtype}
    sizes = {"max_model_len": given.tokens + 1024, "max_num_seqs": 2, "prefix_cache_path": path}
    return build_engine(build_recipe({"model_config": model, "scheduler_config": sizes}))


def prompts(engine: Engine, given: argparse.Namespace) -> list[Prompt]:
    """The prompts, after another one of the same kind has been answered."""
    made = []
    for seed in range(given.prompts + 1):
        rng = np.random.default_rng(seed)
        picture = Image.fromarray(rng.integers(0, 256, (given.pixels, given.pixels, 3), dtype=np.uint8))
        built = engine.processor.build([{"role": "user", "content": [{"type": "image", "image": picture}]}])
        more = rng.integers(engine.vocab_size // 4, engine.vocab_size // 2, given.tokens).tolist()
        count = len(built.token_ids)
        positions = built.positions.max() + 1 + np.arange(given.tokens)
        made.append(
            Prompt(
                [*built.token_ids, *more],
                np.concatenate([built.positions, np.broadcast_to(positions, (3, given.tokens))], axis=1),
                int(positions[-1]) + 1 - count - given.tokens,
                built.media,
                built.spans,
            )
        )
    engine.generate(made[-1], ONE)
    return made[:-1]


def first_token_s(engine: Engine, prompt: Prompt) -> float:
    started_s = time.perf_counter()
    (answer,) = engine.generate(prompt, ONE)
    assert answer.error is None, answer.error
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
