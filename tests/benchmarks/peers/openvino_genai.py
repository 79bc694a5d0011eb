"""OpenVINO GenAI over an export of the same weights. Forms: the export's --weight-format (fp32, fp16, bf16, int8).

The export is made once, in the folder `openvino_FORM` beside the checkpoint.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
from PIL import Image

from tests.benchmarks.peers.timing import Question, Tick, measure

# torch's check of a trace computes the model three times more, and takes 18 GB and more of memory.
EXPORT = """
import functools, torch
torch.jit.trace = functools.partial(torch.jit.trace, check_trace=False)
from optimum.commands.optimum_cli import main
main()
"""


def exported(folder: Path, form: str) -> Path:
    target = folder.with_name(f"{folder.name}_openvino_{form}")
    if not (target / "openvino_tokenizer.xml").exists():
        words = ("export", "openvino", "-m", str(folder), "--task", "image-text-to-text", "--weight-format", form)
        subprocess.run([sys.executable, "-c", EXPORT, *words, str(target)], check=True, stdout=sys.stderr)
    return target


class OpenVino:
    def __init__(self, folder: Path, form: str) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = 8
        scheduler.cache_size = 1
        self.pipeline = genai.ContinuousBatchingPipeline(str(exported(folder, form)), scheduler, "CPU")
        self.count = 0

    def answer(self, questions: list[Question], num_tokens: int, tick: Tick) -> list[int]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_tokens, True, False
        config.apply_chat_template = False
        handles = []
        for each in questions:
            pictures = [each.picture] if each.picture else []
            tensors = [openvino.Tensor(np.array(Image.open(path))[None]) for path in pictures]
            handles.append(self.pipeline.add_request(self.count, each.prompt, tensors, config))
            self.count += 1
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            tick(
                sum(len(output.generated_ids) for each in handles if each.can_read() for output in each.read().values())
            )
        return [each.num_tokens for each in questions]


if __name__ == "__main__":
    measure(OpenVino, ("openvino", "openvino-genai", "optimum-intel", "nncf", "transformers", "torch"))
