"""Random checkpoints end to end on emulated chips: logits and greedy tokens equal the CPU backend's.

A2 and A3 in fp32, which their kernels are allowed here only (see npu.exact): there equality is exact. On 300I DUO,
whose ops and masks are fp16 by shape of their arguments, logits lose no more than fp16 does on the CPU.
"""

import logging
from dataclasses import replace

import pytest
import torch

from emulator.record import Recorder
from executor.schedule.request import Grammar, SamplingParams
from tests.device.inside.npu import A2, A3, CPU, DUO, backend, engine_on, exact
from tests.models.test_generation import CASES, RecordedLogits
from tests.reference import FAMILIES, random_checkpoint

NUM_TOKENS = 8
GREEDY = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.0)


def answers(engine, prompts) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens and first logits of every prompt, asked one by one."""
    tokens, logits = [], []
    for prompt in prompts.values():
        with RecordedLogits(engine.runner) as recorded:
            (completion,) = engine.generate([prompt], GREEDY)
        tokens.append(list(completion.token_ids[0]))
        logits.append(recorded.logits[0][0])
    return tokens, logits


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(folder, prompts by case, the CPU's fp32 tokens and logits, its fp16 logits)."""
    name = request.param
    folder = random_checkpoint(tmp_path_factory.mktemp(name), name)
    engine = engine_on(CPU, folder, torch.float32)
    prompts = {case: engine.processor.build(messages) for case, messages in CASES.items()}
    tokens, logits = answers(engine, prompts)
    _, halves = answers(engine_on(CPU, folder, torch.float16), prompts)
    return folder, prompts, tokens, logits, halves


@pytest.mark.parametrize("soc, cache", [(A2, "ND"), (A2, "NZ"), (A3, "ND")])
def test_fp32_is_the_cpu(family, soc, cache) -> None:
    folder, prompts, wanted, wanted_logits, _ = family
    with exact():
        engine = engine_on(backend(soc, cache=cache), folder, torch.float32)
        tokens, logits = answers(engine, prompts)
    assert tokens == wanted
    for ours, true in zip(logits, wanted_logits, strict=True):
        assert (ours - true).abs().max() <= 1e-4 * true.abs().max()


@pytest.mark.parametrize("chunk", [7, 33])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_chunks_and_batches_change_nothing(family, chunk, prefix_caching) -> None:
    folder, prompts, wanted, _, _ = family
    with exact():
        engine = engine_on(
            backend(A2), folder, torch.float32, max_num_batched_tokens=chunk, enable_prefix_caching=prefix_caching
        )
        for _ in range(2):  # the second time out of the prefix cache
            done = engine.generate(list(prompts.values()), GREEDY)
            assert [list(completion.token_ids[0]) for completion in done] == wanted


def test_rules_of_tokens_and_prompts_logprobs_are_the_cpu_s(family) -> None:
    """Biases, barred and allowed tokens are laid over the chip's logits by ops that it has."""
    folder, prompts, wanted, *_ = family
    (case, prompt), first = next(iter(prompts.items())), wanted[0][0]
    asked = [
        replace(GREEDY, logit_bias={first: -100, first + 1: 5.5}, repetition_penalty=1.1),
        replace(GREEDY, allowed_token_ids=tuple(range(30, 40)), prompt_logprobs=2),
        replace(GREEDY, min_new_tokens=3, stop_token_ids=(first,), bad_words="a", ignore_eos=False),
        replace(GREEDY, prompt_logprobs=0),
    ]
    expected = engine_on(CPU, folder, torch.float32).generate([prompt] * 4, asked)
    assert len({each.token_ids for each in expected}) > 2, case
    with exact():
        found = engine_on(backend(A2), folder, torch.float32, max_num_batched_tokens=40).generate([prompt] * 4, asked)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        for one, true in zip((ours.prompt_logprobs or ())[1:], (theirs.prompt_logprobs or ())[1:], strict=True):
            assert one.token_id == true.token_id and one.logprob == pytest.approx(true.logprob, abs=1e-3)


def test_a_grammar_binds_as_on_the_cpu(family) -> None:
    folder, prompts, free, _, _ = family
    bound = [
        replace(GREEDY, ignore_eos=False, max_new_tokens=12, grammar=grammar)
        for grammar in (Grammar("regex", "[0-9]{6}"), Grammar("choice", '["red", "a blue one"]'), None)
    ]
    asked = list(prompts.values())[:1] * len(bound)
    wanted = engine_on(CPU, folder, torch.float32).generate(asked, bound)
    with exact():
        found = engine_on(backend(A2), folder, torch.float32).generate(asked, bound)
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert found[0].text.isdigit() and len(found[0].text) == 6 and found[1].text in ("red", "a blue one")


@pytest.mark.parametrize("soc, dtype", [(A2, torch.float16), (A3, torch.float16), (DUO, torch.float16)])
def test_fp16_loses_what_fp16_loses(family, soc, dtype) -> None:
    folder, prompts, _, exact_logits, halves = family
    engine = engine_on(backend(soc), folder, dtype)
    _, logits = answers(engine, prompts)

    def loss(found: list[torch.Tensor]) -> float:
        pairs = zip(found, exact_logits, strict=True)
        return float(torch.stack([(one - true).square().mean().sqrt() for one, true in pairs]).mean())

    assert loss(logits) <= 1.5 * loss(halves), (loss(logits), loss(halves))


@pytest.mark.parametrize("soc", [A2, A3, DUO])
def test_chunks_on_the_chips_own_dtype(family, soc) -> None:
    """Mixed steps of prefill and decode run on every chip; answers are whole."""
    folder, prompts, *_ = family
    engine = engine_on(backend(soc), folder, torch.float16, max_num_batched_tokens=33)
    done = engine.generate(list(prompts.values()), GREEDY)
    assert all(len(completion.token_ids[0]) == NUM_TOKENS for completion in done)
    engine.scheduler.check()


def test_a_cache_has_no_more_blocks_than_attention_can_count(family, caplog) -> None:
    """A2's and A3's attention counts a cache's elements in int32: more memory makes no more blocks, and it is told."""
    folder, prompts, wanted, *_ = family
    with exact(), caplog.at_level(logging.WARNING):
        device = backend(A2)
        assert device.most_blocks(128, 8, 128) == (2**31 - 1) // (128 * 8 * 128) and not caplog.records
        per_block = 16 * 2 * 128
        device.soc = replace(device.soc, cache_elements=100 * per_block + 1)
        engine = engine_on(device, folder, torch.float32)
        (told,) = [r.getMessage() for r in caplog.records if "KV cache" in r.getMessage()]
        tokens, _ = answers(engine, {"text": prompts["text"]})
    heads = engine.runner.model.language_model.layers[0].self_attn.num_kv_heads
    most = (100 * per_block + 1) // (16 * heads * 128)
    assert told == f"KV cache: {most} blocks instead of 256, the most that one cache may have"
    assert engine.scheduler.pool.num_blocks == most == engine.runner.kv[0].k.shape[0]
    assert tokens[0] == wanted[list(prompts).index("text")]
    assert backend(DUO).most_blocks(128, 8, 128) is None


OPS = {
    A2: {"npu_rms_norm", "npu_add_rms_norm", "npu_apply_rotary_pos_emb", "npu_scatter_pa_kv_cache", "npu_swiglu"}
    | {"npu_fused_infer_attention_score_v2"},
    DUO: {"npu_rms_norm", "npu_add_rms_norm", "npu_apply_rotary_pos_emb", "_npu_reshape_and_cache", "npu_swiglu"}
    | {"_npu_paged_attention", "_npu_paged_attention_splitfuse_v2", "_npu_flash_attention_unpad"},
}
EXPERTS = {"npu_moe_gating_top_k_softmax", "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_moe_finalize_routing"}


@pytest.mark.parametrize("soc", [A2, DUO])
def test_a_layer_is_made_of_fused_ops(family, soc) -> None:
    """What is called, and that no step but the sampler's result reads the device back."""
    folder, prompts, *_ = family
    engine = engine_on(backend(soc), folder, torch.float16)
    with Recorder() as recorded:
        engine.generate([prompts["picture"]], GREEDY)
    called = {call.bare for call in recorded.calls}
    expected = OPS[soc]
    if soc == A2 and engine.runner.model.num_taps:  # Qwen3-VL: norms of heads, rotation and write are one op
        expected = expected - {"npu_scatter_pa_kv_cache"} | {"npu_qkv_rms_norm_rope_cache"}
    expected = expected | (EXPERTS if engine.runner.model.config.text.__dict__.get("moe") else set())
    missing = expected - called
    assert missing <= {"npu_swiglu"} if soc == DUO else not missing, missing
