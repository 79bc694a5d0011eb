"""W8A8SC on the emulated 300I DUO: the logits of a compressed folder are those of the weights it was made of."""

import pytest
import torch

from executor.commands.build import build_engine
from executor.commands.compress.__main__ import work
from executor.device.npu import compressed
from executor.device.npu.soc import SOCS
from executor.device.weights import CompressedInt8
from executor.errors import UserError
from executor.recipe.schema import build_recipe
from executor.schedule.request import SamplingParams
from tests.device.inside.npu import A2, DUO, backend, fast_products
from tests.msmodelslim.folders import expected
from tests.quant.compressing import stand_in
from tests.reference import REPO


def engine_of(folder):
    """As a recipe makes it that leaves the scheme to the folder."""
    fast_products()
    model = {"model_path": str(folder), "device": "npu_emulated", "soc": DUO}
    settings = {"max_model_len": 512, "block_size": 16, "max_num_seqs": 4, "num_blocks": 64}
    return build_engine(build_recipe({"model_config": model, "scheduler_config": settings}))


def logits_of(engine, cases) -> tuple[torch.Tensor, list[list[int]]]:
    """Of every step the logits of all its rows, and greedy tokens."""
    prompts = []
    for case in cases:
        picture = {"type": "image", "image": (REPO / case["picture"]).read_bytes()}
        content = [picture, {"type": "text", "text": case["question"]}]
        prompts.append(engine.processor.build([{"role": "user", "content": content}]))
    forward, logits = type(engine.runner).forward, []
    engine.runner.forward = lambda plan: logits.append(forward(engine.runner, plan)) or logits[-1]
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=6, temperature=0.0))
    return torch.cat(logits), [list(answer.token_ids[0]) for answer in answers]


def test_logits_are_those_of_the_uncompressed_weights(msmodelslim, tmp_path):
    source, target = msmodelslim("qwen3_vl_w8a8s"), tmp_path / "w8a8sc"
    work(["--model_path", str(source), "--save_directory", str(target), "--executable", str(stand_in(tmp_path))])
    cases = expected(source)["cases"]
    wanted, tokens = logits_of(engine_of(source), cases)
    engine = engine_of(target)
    kinds = [type(layer.product) for layer in engine.runner.model.language_model.modules() if hasattr(layer, "product")]
    assert kinds.count(compressed.CompressedLinear) == 9, "qkv, o, gate and up of three layers; down_proj is float"
    found, same_tokens = logits_of(engine, cases)
    assert torch.equal(found, wanted) and same_tokens == tokens
    assert tokens == [case["integer"]["greedy_16"][:6] for case in cases]


def weight_of(n: int, k: int) -> CompressedInt8:
    one = torch.ones(1)
    return CompressedInt8(
        (torch.zeros(k, dtype=torch.int8),), (torch.zeros(8, dtype=torch.int8),), k, (n,), torch.ones(n),
        torch.zeros(n, dtype=torch.int32), one, one,
    )  # fmt: skip


def test_other_chips_refuse_compressed_weights():
    with pytest.raises(UserError, match="unpacked by atlas_300i_duo only, and this chip is atlas_800i_a2"):
        backend(A2).prepare_linear(weight_of(16, 32), None)
    with pytest.raises(UserError, match="unpacked by atlas_300i_duo only"):
        compressed.prepare(weight_of(16, 32), SOCS["atlas_800i_a3"], torch.float16)


def test_no_rows_give_no_rows():
    product = backend(DUO).prepare_linear(weight_of(16, 32), None)
    assert product(torch.empty(0, 32, dtype=torch.float16)).shape == (0, 16)
