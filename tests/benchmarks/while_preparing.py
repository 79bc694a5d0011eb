"""How much running answers slow down while another request brings a large picture or a video.

    python -m tests.benchmarks.while_preparing [--model models/tiny/qwen3_vl] [--old]

Eight answers run; the time between their tokens is taken alone, and from the moment a ninth request is handed in until
its first token: once a picture of 12 megapixels, once a minute of 1080p video. `--old` prepares it on the engine's own
thread, for comparison. Two cores: the engine computes with one of them, and the other must be free of other processes.
Not a test: timings on shared machines vary.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from executor.commands.build import build_engine
from executor.engine.loop import EngineLoop
from executor.recipe.schema import build_recipe
from executor.schedule.request import SamplingParams

NUM_ANSWERS = 8
MAX_MODEL_LEN = 32_768
ENDLESS = SamplingParams(max_new_tokens=100_000, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/tiny/qwen3_vl")
    parser.add_argument("--old", action="store_true", help="prepare on the engine's thread")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {"model": args.model, "torch": torch.__version__, "prepared": "on the engine's thread" if args.old else ""}
    with tempfile.TemporaryDirectory() as folder, build_engine(build_recipe(recipe_of(args.model, folder))) as engine:
        media = {"picture": picture(Path(folder) / "p.jpg"), "video": video(Path(folder) / "v.mp4")}
        for name, part in media.items():
            report[name] = measure(engine, part, args.old)
    print(json.dumps(report))


def recipe_of(model: str, folder: str) -> dict:
    """For a copy of the model that takes prompts as long as the published ones do."""
    copy = Path(folder) / "model"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (config.get("text_config") or config)["max_position_embeddings"] = MAX_MODEL_LEN
    (copy / "config.json").write_text(json.dumps(config))
    return {
        "model_config": {"model_path": str(copy), "device": "cpu", "dtype": "float32"},
        "scheduler_config": {"max_num_seqs": 12, "block_size": 16, "max_model_len": MAX_MODEL_LEN},
    }


def picture(path: Path) -> dict:
    """4000 x 3000 pixels, as a camera's JPEG."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (75, 100, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((4000, 3000), Image.Resampling.BICUBIC).save(path, quality=90)
    return {"type": "image", "image": str(path)}


def video(path: Path) -> dict:
    """A minute of 1920 x 1080 at 25 frames a second, H.264."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 255, (9, 16, 3), dtype=np.uint8)) for _ in range(8)]
    frames = [np.asarray(each.resize((1920, 1080), Image.Resampling.BICUBIC)) for each in coarse]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "50"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for number in range(60 * 25):
            frame = av.VideoFrame.from_ndarray(np.roll(frames[number // 200 % 8], 4 * number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {"type": "video", "video": str(path), "max_pixels": 128 * 128}


def measure(engine, part: dict, old: bool) -> dict:
    """Milliseconds between tokens: alone, and while `part` is prepared and taken in."""
    stamps: list[float] = []  # of one answer's tokens
    message = [{"role": "user", "content": [part, {"type": "text", "text": "What do you see?"}]}]
    with EngineLoop(engine) as loop:
        handles = [loop.submit("Count.", ENDLESS, on_event=ignore) for _ in range(NUM_ANSWERS - 1)]
        handles.append(loop.submit("Count.", ENDLESS, on_event=lambda event: stamps.append(time.perf_counter())))
        run_until(loop, lambda: len(stamps) > 50)
        stamps.clear()
        run_until(loop, lambda: len(stamps) > 300)
        alone = between(stamps)
        stamps.clear()
        first: list[float] = []
        machine = machine_seconds()
        started = time.perf_counter()
        prompt = engine.prompt(message) if old else message
        late = loop.submit(
            prompt, SamplingParams(max_new_tokens=1), on_event=lambda event: first.append(time.perf_counter())
        )
        run_until(loop, lambda: first)
        during, seconds = between([started, *stamps]), first[0] - started
        others = [after - before for before, after in zip(machine, machine_seconds(), strict=True)]
        assert late.failure is None and late.completion is not None, late.failure
        for handle in handles:
            handle.abort()
        loop.turn()
    return {
        "ratio_of_medians": round(statistics.median(during) / statistics.median(alone), 3),
        "alone_ms": summary(alone),
        "during_ms": summary(during),
        "steps": len(during),
        "cores_taken_by_other_processes": round((others[0] - others[1]) / seconds, 2),
        "seconds_to_its_first_token": round(seconds, 2),
        "prepare_s": round(late.prepare_s, 2),
        "prompt_tokens": len(late.prompt.token_ids),
    }


def machine_seconds() -> tuple[float, float]:
    """CPU time that the whole machine has spent, and this process: a core must be free, or the figures mean nothing."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    busy = sum(fields) - fields[3] - fields[4]  # idle, waiting for a disk
    own = os.times()
    return busy / os.sysconf("SC_CLK_TCK"), own.user + own.system


def ignore(event: object) -> None: ...


def run_until(loop: EngineLoop, is_done) -> None:
    while not is_done():
        for handle in loop.turn(0.05):
            if handle.failure is not None:
                raise handle.failure


def between(stamps: list[float]) -> list[float]:
    return [1000 * (after - before) for before, after in zip(stamps, stamps[1:], strict=False)]


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(values), 2),
        "mean": round(statistics.mean(values), 2),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
        "max": round(ordered[-1], 2),
    }


if __name__ == "__main__":
    main()
