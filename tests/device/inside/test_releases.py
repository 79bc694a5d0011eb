"""Supported releases of torch_npu: every call the backend makes binds to their forms of the op, and what a release
lacks is composed from other ops, with the same answers."""

import contextlib
import logging
from itertools import product

import pytest
import torch

from emulator import releases
from emulator.record import hide
from executor.device.npu.soc import COMPOSED, SOCS, TABLE
from executor.schedule.request import SamplingParams
from tests.cases import mostly_long
from tests.device.inside.npu import A2, A3, CPU, DUO, backend, engine_on, exact, true_size
from tests.models.test_generation import CASES
from tests.reference import FAMILIES, config_of, random_model, save_checkpoint, tokenizer_of

MODELS = ("Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-30B-A3B-Instruct")
REPLACEABLE = sorted({call for row in TABLE for call in row[-1][:-1] if call != COMPOSED})


def calls_of(traces) -> list:
    recorded = [
        traces.prefill_calls(4096, 4096, 100),
        traces.vision_calls((1, 16, 16)),
        traces.decode_calls(tensors=False),
    ]
    if traces.device.soc.name != DUO:
        recorded.append(traces.decode_calls(tensors=True))
    assert [violation for one in recorded for violation in one.violations] == []
    return [call for one in recorded for call in one.calls]


@pytest.mark.parametrize(  # what is composed of other ops calls fewer forms: each family on one chip
    "hidden, name, soc",
    mostly_long(
        product(((), tuple(REPLACEABLE)), MODELS, (A2, A3, DUO)),
        [((), name, soc) for name in MODELS for soc in (A2, A3, DUO)]
        + [(tuple(REPLACEABLE), *form) for form in zip(MODELS, (A2, DUO, A3), strict=True)],
    ),
)
def test_calls_bind_to_every_supported_release(soc, name, hidden) -> None:
    with hide(*hidden) if hidden else contextlib.nullcontext(), true_size(name, soc, tp=2) as traces:
        calls = calls_of(traces)
    assert len({call.bare for call in calls}) >= (2 if hidden else 5)
    assert not {call.bare for call in calls} & set(hidden)
    misfits = {releases.misfit(call, release) for call in calls for release in releases.SUPPORTED}
    if not hidden:  # newer ops have an older form, which the other run binds
        misfits -= {f"{op} is not in torch_npu {release}" for op in REPLACEABLE for release in releases.SUPPORTED}
    assert misfits <= {""}, misfits


@pytest.mark.parametrize("soc", [A2, DUO])
@pytest.mark.parametrize("quantization", ["w8a8", "w8a8_dynamic", "w8a16"])
@pytest.mark.parametrize("hidden", [(), tuple(REPLACEABLE)], ids=["all", "composed"])
def test_calls_of_int8_weights_bind_to_every_supported_release(soc, quantization, hidden) -> None:
    model = MODELS[soc != A2]
    with hide(*hidden) if hidden else contextlib.nullcontext(), true_size(model, soc, quantization=quantization) as it:
        calls = calls_of(it)
    products = {"w8a16": "npu_weight_quant_batchmatmul"}.get(quantization, "npu_quant_matmul")
    if (soc, quantization) == (DUO, "w8a8_dynamic"):
        products = "npu_quant_matmul_dequant"
    assert products in {call.bare for call in calls} and not {call.bare for call in calls} & set(hidden)
    misfits = {releases.misfit(call, release) for call in calls for release in releases.SUPPORTED}
    if not hidden:
        misfits -= {f"{op} is not in torch_npu {release}" for op in REPLACEABLE for release in releases.SUPPORTED}
    assert misfits <= {""}, misfits


@pytest.mark.parametrize("hidden", [(), tuple(REPLACEABLE)], ids=["all", "composed"])
@pytest.mark.parametrize("soc, quantization, product, count", [
    (A3, "w8a8", "npu_grouped_matmul_swiglu_quant_v2", 1),
    (A3, "w4a8_dynamic", "npu_grouped_matmul_swiglu_quant_v2", 1),
    (A3, "w8a16", "npu_grouped_matmul", 2),
    (DUO, "w8a8", "npu_quant_grouped_matmul_dequant", 2),
])  # fmt: skip
def test_calls_of_quantized_experts_bind_to_every_supported_release(soc, quantization, product, count, hidden) -> None:
    with (
        hide(*hidden) if hidden else contextlib.nullcontext(),
        true_size(MODELS[2], soc, tp=2, ep=2, layers=1, quantization=quantization) as traces,
    ):
        recorded = traces.decode_calls(tensors=False)
    wanted, count = ("npu_grouped_matmul", 2) if product in hidden else (product, count)
    assert recorded.violations == [] and recorded.counts[wanted] == count
    misfits = {releases.misfit(call, release) for call in recorded.calls for release in releases.SUPPORTED}
    if not hidden:
        misfits -= {f"{op} is not in torch_npu {release}" for op in REPLACEABLE for release in releases.SUPPORTED}
    assert misfits <= {""}, misfits


def test_a_call_that_an_old_release_does_not_know_is_found() -> None:
    """The check above can fail."""
    with true_size(MODELS[1], A2) as traces:
        (call, *_) = [call for call in calls_of(traces) if call.bare == "npu_qkv_rms_norm_rope_cache"]
    assert releases.misfit(call, "2.6.0.post5") and not releases.misfit(call, "2.7.1.post11")


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_with_a_mask_of_rows(family, tmp_path) -> None:
    """300I DUO on releases 2.8 and 2.9: the same answers with the older op, in chunks and mixed batches."""
    folder = save_checkpoint(tmp_path, family, random_model(family, config_of(family, tokenizer_of(family))))
    greedy = SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=0.0)
    answers = []
    for hidden in ((), ("_npu_paged_attention_splitfuse_v2",)):
        with hide(*hidden):
            engine = engine_on(backend(DUO), folder, torch.float16, max_num_batched_tokens=33)
            prompts = [engine.processor.build(messages) for messages in CASES.values()]
            answers.append([done.token_ids for done in engine.generate(prompts, greedy)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_composed_forms_answer_the_same(family, tmp_path, caplog) -> None:
    folder = save_checkpoint(tmp_path, family, random_model(family, config_of(family, tokenizer_of(family))))
    greedy = SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=0.0)
    engine = engine_on(CPU, folder, torch.float32)
    prompts = [engine.processor.build(messages) for messages in CASES.values()]
    wanted = [done.token_ids for done in engine.generate(prompts, greedy)]
    with exact(), hide(*REPLACEABLE), caplog.at_level(logging.WARNING):
        device = backend(A2)
        told = [record.getMessage() for record in caplog.records if "installed torch_npu lacks" in record.getMessage()]
        assert set(device.calls.values()) & set(REPLACEABLE) == set()
        assert [done.token_ids for done in engine_on(device, folder, torch.float32).generate(prompts, greedy)] == wanted
    missing = [row for row in TABLE if SOCS[A2].name in row[1] and row[-1][0] in REPLACEABLE]
    assert len(told) == len(missing), "one warning for each op"
