"""transformers' `generate`. Forms: the type that weights and activations have."""

from pathlib import Path

import torch
from PIL import Image

from tests import torchvision_reference
from tests.benchmarks.peers.timing import Question, Tick, measure

torchvision_reference.install()  # before transformers, whose processors are built on it
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, StoppingCriteria  # noqa: E402


class Ticking(StoppingCriteria):
    """Never stops; is asked once a step, when the step's tokens are chosen."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.tick(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Transformers:
    def __init__(self, folder: Path, form: str) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, form)).eval()
        self.model.generation_config.eos_token_id = None

    def answer(self, questions: list[Question], num_tokens: int, tick: Tick) -> list[int]:
        pictures = [Image.open(each.picture) for each in questions if each.picture]
        inputs = self.processor(text=[each.prompt for each in questions], images=pictures or None, return_tensors="pt")
        with torch.inference_mode():
            self.model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, stopping_criteria=[Ticking(tick)])
        return inputs["attention_mask"].sum(1).tolist()


if __name__ == "__main__":
    measure(Transformers, ("torch", "transformers"))
