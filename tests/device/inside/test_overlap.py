"""Steps of emulated chips that are queued before the last one's tokens are read: the same answers, one read a step."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from emulator.reads import reading
from executor.device.npu.ops import NpuOps
from executor.schedule.request import SamplingParams
from tests.cases import mostly_long
from tests.device.inside.npu import A2, A3, DUO, backend, engine_on, exact
from tests.models.test_generation import CASES
from tests.reference import FAMILIES, random_checkpoint

GREEDY = SamplingParams(max_new_tokens=36, ignore_eos=True)  # past two ends of a block
PARAMS = {
    "greedy": GREEDY,
    "logprobs": replace(GREEDY, logprobs=3),
    "top_k": replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9, seed=1),
    "top_p": replace(GREEDY, temperature=0.05, top_p=0.9, seed=1, logprobs=0),
    "temperature": replace(GREEDY, temperature=0.9, seed=5),
    "biased": replace(GREEDY, logit_bias=((5, 1.0),), min_new_tokens=4),
    "penalties": replace(GREEDY, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.3),
}
CHIPS = {
    "a2": (A2, "eager", torch.float32),
    "a3": (A3, "eager", torch.float32),
    "duo": (DUO, "eager", torch.float16),
    "a2_acl_graph": (A2, "npugraph_ex", torch.float32),
    "a3_ge_graph": (A3, "ge_graph", torch.float32),
}


@pytest.fixture(
    scope="module",
    params=mostly_long(FAMILIES, ["qwen3_vl"]),
)
def folder(request, tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module", params=mostly_long(CHIPS, [each for each in CHIPS if each != "a3"]))
def chip_engine(request, folder, tmp_path_factory):
    """Made once a chip: its graphs take longer than what is asked of it."""
    soc, mode, dtype = CHIPS[request.param]
    model = {"exe_mode": mode, "strict_graph": True, "output_path": str(tmp_path_factory.mktemp(request.param))}
    settings = {"model": model, "graph_batch_sizes": (2, 4), "num_blocks": 128} if mode != "eager" else {}
    with exact(), pytest.MonkeyPatch.context() as patch:
        if mode == "npugraph_ex":  # what is captured cannot be replayed here: it is computed, from its arguments
            patch.setattr(NpuOps, "capture", lambda device, decode, mode, folder: partial(replayed, decode))
        yield engine_on(backend(soc), folder, dtype, max_num_seqs=4, **settings)


@pytest.fixture
def engine(chip_engine):
    yield chip_engine
    for request_id in list(chip_engine._answers_of):
        chip_engine.abort(request_id)
    chip_engine.step()
    chip_engine.scheduler.check()
    chip_engine.scheduler.forget()  # the next test begins with no cache


def replayed(decode, token_ids, positions, slots, _, block_table, q_outs, lengths) -> torch.Tensor:
    return decode(token_ids, positions, slots, lengths, block_table, q_outs)


def answers(engine, params) -> list:
    engine.scheduler.forget()  # half precision computes what a prefix cache has in steps of other lengths
    prompts = [engine.processor.build(messages) for messages in list(CASES.values())[:3]]
    each = [replace(params, max_new_tokens=count) for count in (36, 21, 9)]
    return [(done.token_ids, done.texts, done.logprobs) for done in engine.generate(prompts, each)]


@pytest.mark.parametrize("name", PARAMS)
def test_answers_are_those_of_steps_one_after_the_other(engine, name, monkeypatch) -> None:
    params, ahead = PARAMS[name], []
    launch = engine.runner.launch
    monkeypatch.setattr(engine.runner, "launch", lambda plan: ahead.append(plan.continues is not None) or launch(plan))
    assert engine.overlaps
    found = answers(engine, params)
    assert sum(ahead) > 25
    monkeypatch.setattr(engine, "overlaps", False)
    assert found == answers(engine, params)


@pytest.mark.parametrize("name", PARAMS)
def test_a_decode_step_reads_the_device_once(engine, name, monkeypatch) -> None:
    """And, where the rows are the same and none enters a block, sends to it once."""
    sent: list[tuple[int, ...]] = []
    send = engine.runner.device.send
    counted = lambda array, into=None: sent.append(np.shape(array)) or send(array, into)  # noqa: E731
    monkeypatch.setattr(engine.runner.device, "send", counted)
    monkeypatch.setattr(engine.runner.sampler, "send", counted)
    monkeypatch.setattr(engine.runner.sampler.penalties, "send", counted)
    for messages in list(CASES.values())[:2]:
        engine.add(engine.processor.build(messages), PARAMS[name])
    for _ in range(4):
        engine.step()
    steps = []
    for _ in range(20):
        sent.clear()
        with reading() as read:
            engine.step()
        steps.append((list(read), list(sent)))
    assert [len(read) for read, _ in steps] == [1] * 20, steps[0]
    draws = PARAMS[name].temperature > 0
    if not PARAMS[name].adjusts_scores:
        assert min(len(sent) for _, sent in steps) == 1 + draws, steps
        assert sum(len(sent) for _, sent in steps) <= 20 * (1 + draws) + 2 * 3, "blocks are entered every 16 steps"


def test_a_read_is_counted_and_a_kernels_own_are_not() -> None:
    import torch_npu

    backend(A2)
    x = torch.ones(4, 32, dtype=torch.bfloat16)
    with reading() as read:
        torch_npu.npu_swiglu(x)
        assert not read
        x[0, 0].item(), bool(x.any()), x.nonzero(), x[x > 0], x[:2].tolist(), x.float().numpy()
    assert [name for name, _ in read] == ["item", "__bool__", "nonzero", "__getitem__", "tolist", "numpy"]
    with reading() as again:
        pass
    assert not again and x[0, 0].item() == 1.0 and len(read) == 6
