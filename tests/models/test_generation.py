"""Our engine against transformers' models on random weights: the same logits, the same greedy tokens, whatever the
chunk size, the batch, the order of arrival and the prefix cache."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from executor.engine.runner import Runner
from executor.schedule.request import SamplingParams
from tests.engines import engine_over
from tests.reference import FAMILIES, config_of, greedy, random_model, save_checkpoint, tokenizer_of

NUM_TOKENS = 12
GREEDY = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)


def picture(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(seed: int, frames: int, height: int, width: int) -> list[Image.Image]:
    return [picture(seed * 100 + index, height, width) for index in range(frames)]


def ask(*parts) -> list[dict]:
    """A user turn of texts, pictures and videos (lists of pictures)."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, list):
            content.append({"type": "video", "video": part})
        else:
            content.append({"type": "image", "image": part})
    return [{"role": "user", "content": content}]


CASES = {
    "text": ask("What color is the circle? Count the objects, please."),
    "picture": ask(picture(1, 90, 150), "What is this?"),
    "pictures": ask(picture(2, 64, 64), picture(3, 200, 80), "Which one", picture(4, 70, 120), "is red?"),
    "video": ask(clip(5, 5, 84, 112), "What moves?"),
    "mixed": ask("First", picture(6, 112, 112), "then", clip(7, 4, 56, 84), clip(8, 2, 112, 56), "and?"),
    "turns": [
        {"role": "system", "content": "You answer in one word."},
        *ask(picture(9, 112, 84), "Which shape?"),
        {"role": "assistant", "content": "circle"},
        *ask(picture(10, 56, 56), "And this?"),
    ],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(checkpoint folder, prompts by case, transformers' tokens and logits by case)."""
    name = request.param
    model = random_model(name, config_of(name, tokenizer_of(name)))
    folder = save_checkpoint(tmp_path_factory.mktemp(name), name, model)
    engine = engine_over(folder)
    prompts = {case: engine.processor.build(messages) for case, messages in CASES.items()}
    wanted = {case: greedy(model, prompt, engine.runner.pixel_format, NUM_TOKENS) for case, prompt in prompts.items()}
    return folder, prompts, wanted


class RecordedLogits:
    """Keeps the logits of a runner's steps while the context is open."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.logits = runner, []

    def __enter__(self) -> "RecordedLogits":
        forward = self.runner.forward

        def recorded(plan):
            logits = forward(plan)
            self.logits.append(logits)
            return logits

        self.runner.forward = recorded
        return self

    def __exit__(self, *_) -> None:
        del self.runner.forward


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logits_equal_transformers(family, case):
    folder, prompts, wanted = family
    tokens, logits = wanted[case]
    engine = engine_over(folder)
    with RecordedLogits(engine.runner) as recorded:
        (completion,) = engine.generate([prompts[case]], GREEDY)
    assert list(completion.token_ids[0]) == tokens
    ours = torch.cat(recorded.logits)
    assert (ours - logits).abs().max() <= 1e-4 * logits.abs().max()
    engine.scheduler.check()


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunks_change_nothing(family, chunk):
    folder, prompts, wanted = family
    engine = engine_over(folder, max_num_batched_tokens=chunk)
    cases = ["mixed", "text"] if chunk == 1 else list(CASES)
    for case, completion in zip(cases, engine.generate([prompts[case] for case in cases], GREEDY), strict=True):
        assert list(completion.token_ids[0]) == wanted[case][0], case


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_batches_and_order_change_nothing(family, prefix_caching):
    folder, prompts, wanted = family
    for order in itertools.islice(itertools.permutations(CASES), 0, 720, 250):
        engine = engine_over(folder, enable_prefix_caching=prefix_caching, max_num_batched_tokens=100)
        for case, completion in zip(order, engine.generate([prompts[c] for c in order], GREEDY), strict=True):
            assert list(completion.token_ids[0]) == wanted[case][0], case


def test_prefix_hits_change_nothing(family):
    """Asked again, all but the last block of the prompt is found, pictures included, and nothing is encoded."""
    folder, prompts, wanted = family
    engine = engine_over(folder)
    engine.generate(list(prompts.values()), GREEDY)
    encoded = []
    engine.runner.encode = encoded.append
    again = engine.generate(list(prompts.values()), GREEDY)
    for case, completion in zip(CASES, again, strict=True):
        assert list(completion.token_ids[0]) == wanted[case][0], case
        assert completion.cached_tokens >= completion.prompt_tokens - 16 - completion.prompt_tokens % 16, case
    assert not encoded


def test_preemption_changes_nothing(family):
    """Too few blocks for all: some requests give theirs back and are computed again."""
    folder, prompts, wanted = family
    largest = max(len(prompt.token_ids) for prompt in prompts.values())
    engine = engine_over(folder, num_blocks=-(-largest // 16) + 3)
    names = [name for name in CASES for _ in range(2)]
    for case, completion in zip(names, engine.generate([prompts[case] for case in names], GREEDY), strict=True):
        assert list(completion.token_ids[0]) == wanted[case][0], case
    engine.scheduler.check()


def test_a_tiny_encoder_cache_changes_nothing(family):
    folder, prompts, wanted = family
    engine = engine_over(folder, encoder_cache_tokens=16, max_num_batched_tokens=40)
    for case, completion in zip(CASES, engine.generate(list(prompts.values()), GREEDY), strict=True):
        assert list(completion.token_ids[0]) == wanted[case][0], case


def test_bfloat16_loses_no_more_than_transformers(family):
    """bf16 logits are as near to the fp32 ones as those of transformers' own bf16 model, within a factor."""
    folder, prompts, wanted = family
    import transformers

    from executor.commands.build import build_engine
    from executor.recipe.schema import build_recipe

    recipe = {"model_config": {"model_path": str(folder), "device": "cpu", "dtype": "bfloat16"}}
    recipe["scheduler_config"] = {"max_model_len": 512, "block_size": 16, "max_num_seqs": 1}
    engine = build_engine(build_recipe(recipe))
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    losses = {"ours": [], "theirs": []}
    for case in ("text", "picture", "video"):
        exact = wanted[case][1][0]
        with RecordedLogits(engine.runner) as recorded:
            engine.generate([prompts[case]], SamplingParams(max_new_tokens=1, ignore_eos=True))
        losses["ours"].append((recorded.logits[0][0] - exact).square().mean().sqrt())
        theirs = greedy_bfloat16(model, prompts[case], engine.runner.pixel_format)
        losses["theirs"].append((theirs - exact).square().mean().sqrt())
    ours, theirs = (float(torch.stack(losses[who]).mean()) for who in ("ours", "theirs"))
    assert ours <= 1.5 * theirs, (ours, theirs)


def greedy_bfloat16(model, prompt, pixel_format) -> torch.Tensor:
    return greedy(model, prompt, pixel_format, 1)[1][0].float()
