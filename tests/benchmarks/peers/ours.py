"""This project's engine, by its Python interface. Forms: bfloat16, wint8, or a scheme of `quantize`.

The folder of a scheme is made once, beside the checkpoint, without smoothing, on which times do not depend.
"""

import subprocess
import sys
from pathlib import Path

from executor.commands.build import build_engine
from executor.recipe.schema import load_recipe
from executor.schedule.request import SamplingParams
from tests.benchmarks.peers.timing import MAX_LENGTH, Question, Tick, measure
from tests.reference import REPO


def quantized(folder: Path, scheme: str) -> Path:
    target = folder.with_name(f"{folder.name}_{scheme}")
    if not target.exists():
        words = ("--model_path", folder, "--save_directory", target, "--scheme", scheme, "--tool", "builtin")
        words += ("--calibration", folder / "picture_0.png", "--samples", "1", "--smooth", "0")
        command = [sys.executable, "-m", "executor.commands.quantize", *map(str, words)]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=REPO)
    return target


class Ours:
    def __init__(self, folder: Path, form: str) -> None:
        if form not in ("bfloat16", "wint8"):
            folder = quantized(folder, form)
        settings = [
            f"model_config.model_path={folder}",
            "model_config.dtype=bfloat16",
            f"model_config.quantization={'none' if form == 'bfloat16' else form}",
            f"scheduler_config.max_model_len={MAX_LENGTH}",
            "scheduler_config.max_num_seqs=8",
        ]
        self.engine = build_engine(load_recipe(REPO / "config/quickstart_qwen2_5_vl.yaml", settings))

    def answer(self, questions: list[Question], num_tokens: int, tick: Tick) -> list[int]:
        params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, temperature=0)
        for each in questions:
            content = [{"type": "text", "text": each.message}]
            if each.picture:
                content.insert(0, {"type": "image", "image": each.picture})
            self.engine.add([{"role": "user", "content": content}], params)
        lengths: dict[str, int] = {}
        while self.engine.has_work:
            outputs = self.engine.step()
            tick(sum(len(output.token_ids) for output in outputs))
            lengths |= {output.request_id: len(output.request.prompt.token_ids) for output in outputs}
        return list(lengths.values())


if __name__ == "__main__":
    measure(Ours, ("torch", "transformers"))
