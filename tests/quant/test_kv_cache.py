"""The int8 KV cache (C8): its arithmetic, the tensors it reads, and what a model answers with it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.commands.check_folder import check_folder
from executor.device import ops
from executor.device.cpu.ops import CpuOps
from executor.device.ops import KVScales
from executor.errors import UserError
from executor.layers.attention import Attention
from executor.parallel.groups import Group
from executor.quant.kv_cache import Extremes, cache_tensors, checked, faults, scales_of, tensor_names
from executor.recipe.schema import build_recipe
from executor.recipe.settle import prepare
from executor.schedule.request import SamplingParams
from models.tiny.training import world
from tests.device.test_cpu import naive_causal
from tests.engines import engine_over
from tests.models.test_generation import RecordedLogits
from tests.models.test_tiny import messages
from tests.quant.c8 import add_scales, observed, write_description
from tests.reference import REPO

OPS = CpuOps()
NUM_TOKENS = 24
GREEDY = SamplingParams(max_new_tokens=NUM_TOKENS)
FAMILIES = ("qwen3_vl", "qwen2_5_vl")


def random_scales(heads: int, dim: int, offsets: bool) -> KVScales:
    """Of channels whose sizes differ a hundredfold, as those of real keys do."""
    scale = [torch.rand(heads, dim).mul_(3).exp_() / 127 for _ in "kv"]
    offset = [torch.randint(-128, 128, (heads, dim)).float() * offsets for _ in "kv"]
    return KVScales(scale[0], offset[0], scale[1], offset[1])


# ---- arithmetic


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("tables", [[[0, 1, 2], [3], [4, 5]], [[5, 0, 3], [2], [4, 1]]], ids=["consecutive", "spread"])
@pytest.mark.parametrize(("q_lens", "kv_lens"), [([1, 9, 11], [40, 9, 30]), ([1] * 6, [40, 9, 30, 40, 9, 30])])
def test_the_cpu_computes_the_formula(tables, q_lens, kv_lens, offsets):
    """Written numbers and attention over them against float64; a decode row, a prompt and a chunk in one step, and
    decode rows that are attended together."""
    torch.manual_seed(0)
    block_size, heads, kv_heads, dim = 16, 6, 2, 24
    tables = tables + [[block + 6 for block in table] for table in tables]
    tables = tables[: len(q_lens)]
    scales = random_scales(kv_heads, dim, offsets)
    (cache,) = OPS.kv_cache(1, 12, block_size, kv_heads, dim, torch.float32, scales=[scales])
    assert cache.k.dtype == cache.v.dtype == torch.int8
    wide = [x.double() for x in (scales.k_scale, scales.k_offset, scales.v_scale, scales.v_offset)]
    keys, values = [], []
    for table, length in zip(tables, kv_lens, strict=True):
        places = torch.arange(length)
        slots = torch.tensor(table)[places // block_size] * block_size + places % block_size
        k, v = (torch.randn(length, kv_heads, dim) * 60 * scale for scale in (scales.k_scale, scales.v_scale))
        OPS.kv_write(k, v, cache, slots)
        for x, held, scale, offset, into in (
            (k, cache.k, *wide[:2], keys), (v, cache.v, *wide[2:], values),
        ):  # fmt: skip
            exact = x.double() / scale + offset
            found = held.flatten(0, 1)[slots].double()
            is_tie = ((exact - exact.floor()) - 0.5).abs() < 1e-4  # float32 may round it either way
            assert (found - exact.round().clamp(-128, 127))[~is_tie].eq(0).all() and is_tie.sum() < 20
            assert ((found - exact.clamp(-128, 127)).abs() <= 0.5001).all()
            into.append((found - offset) * scale)
    q = torch.randn(sum(q_lens), heads, dim)
    got = OPS.paged_attention(q, cache, OPS.prepare_attention(q_lens, kv_lens, tables, block_size), 0.02)
    wanted = torch.cat([naive_causal(*x, 0.02) for x in zip(q.split(q_lens), keys, values, strict=True)])
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_read_what_was_written(dtype):
    """One key: attention is its value. No half-precision sum of large offsets stands between."""
    torch.manual_seed(1)
    scales = random_scales(2, 32, offsets=True)
    (cache,) = OPS.kv_cache(1, 1, 16, 2, 32, dtype, scales=[scales])
    v = (torch.randn(1, 2, 32) * 40 * scales.v_scale).to(dtype)
    OPS.kv_write(v, v, cache, torch.tensor([3]))
    step = OPS.prepare_attention([1], [4], [[0]], 16)
    for slot in range(3):
        OPS.kv_write(v, v, cache, torch.tensor([slot]))
    got = OPS.paged_attention(torch.zeros(1, 4, 32, dtype=dtype), cache, step, 1.0).view(4, 32)
    wanted = ((cache.v[0, 3].float() - scales.v_offset) * scales.v_scale).repeat_interleave(2, 0)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_scales_of_what_was_seen():
    seen = Extremes()
    seen.observe(torch.tensor([[1.0, -2.0, 0.0, 3.0]]))
    seen.observe(torch.tensor([[[-4.0, -1.0, 0.0, 5.0]], [[0.5, -3.0, 0.0, 4.0]]]))
    assert seen.low.tolist() == [-4, -3, 0, 3] and seen.high.tolist() == [1, -1, 0, 5]
    scale, offset = scales_of(seen.low, seen.high)
    torch.testing.assert_close(scale, torch.tensor([4, 3, 2.0**-23 * 127, 5]) / 127)
    assert not offset.any()
    scale, offset = scales_of(seen.low, seen.high, symmetric=False)
    torch.testing.assert_close(scale, torch.tensor([5, 3, 2.0**-23 * 255, 5]) / 255)
    assert offset.tolist() == [76, 127, -128, -128], "zero is a whole step of every channel"


# ---- what a checkpoint has


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_reads_the_scales_of_its_heads(ranks):
    """Two KV heads: one each on two ranks, the same one twice on four."""
    ops.bind(OPS)
    heads, dim = 2, 8
    file = {name: torch.rand(heads * dim) + 1 for name in tensor_names("a.self_attn")}
    file |= {name: torch.randint(-128, 128, (heads * dim,), dtype=torch.int32) for name in file if "offset" in name}
    for rank in range(ranks):
        layer = Attention(32, 4, heads, dim, Group(rank, ranks))
        assert layer.cache_scales is None
        layer.quantize_cache()
        for pull in layer.cache.pulls({}, "a.self_attn.cache"):
            pull.into.copy_(pull.convert(file[pull.name][pull.file_index]))
        first = rank * heads // ranks
        mine = slice(first, first + max(1, heads // ranks))
        found = layer.cache_scales
        wanted = [file[name].view(heads, dim)[mine].float() for name in tensor_names("a.self_attn")]
        assert all(map(torch.equal, (found.k_scale, found.k_offset, found.v_scale, found.v_offset), wanted))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("kv_cache_scale", 0.0, "positive numbers, got 0"),
        ("kv_cache_scale", -1.0, "positive numbers, got -1"),
        ("kv_cache_scale", float("nan"), "positive numbers, got nan"),
        ("kv_cache_scale", float("inf"), "positive numbers, got inf"),
        ("kv_cache_offset", 0.5, "whole numbers from -128 to 127, got 0.5"),
        ("kv_cache_offset", 128.0, "whole numbers from -128 to 127, got 128"),
        ("kv_cache_offset", float("nan"), "whole numbers from -128 to 127, got nan"),
    ],
)
def test_numbers_that_are_no_scales_are_refused(name, value, message):
    with pytest.raises(UserError, match=rf"'l.k_proj.{name}' must hold {message}; .*kv_cache_dtype: float"):
        checked(f"l.k_proj.{name}", True, torch.tensor([1.0, value]))
    assert checked(f"l.{name}", True, torch.tensor([1, 127], dtype=torch.int32)).dtype == torch.float32


def test_a_device_without_offsets_refuses_them():
    name = "l.v_proj.kv_cache_offset"
    assert not checked(name, False, torch.zeros(2, dtype=torch.int32)).any()
    with pytest.raises(UserError, match=rf"'{name}' has offsets other than zero, and NPUs .* symmetric cache"):
        checked(name, False, torch.tensor([0, 3]))


def test_tensors_that_are_none_are_told():
    """What msmodelslim 26.1.0 writes for the two families: wrong names, empty tensors, or nothing."""
    attentions = [f"model.language_model.layers.{index}.self_attn" for index in (0, 1)]
    good = {name: SimpleNamespace(shape=(16,)) for attention in attentions for name in tensor_names(attention)}
    assert not list(faults(good, attentions, 16))
    empty = SimpleNamespace(shape=(0,))
    v0 = {
        f"{attentions[0]}.v_proj.k_proj.kv_cache_scale": empty,
        "model.visual.blocks.0.attn.qkv.k_proj.kv_cache_offset": empty,
    }
    missing, strange = faults(v0, attentions, 16)
    assert missing == f"missing: '{attentions[0]}.k_proj.kv_cache_scale' and 7 more"
    assert strange == f"of no attention layer: '{attentions[0]}.v_proj.k_proj.kv_cache_scale' and 1 more"
    (found,) = faults(good | {tensor_names(attentions[1])[2]: empty}, attentions, 16)
    assert found.startswith("of shape [0] instead of [16], a number for every channel of all heads: '")
    (found,) = faults(good | v0, attentions, 16)
    assert found == strange


# ---- whole models


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(float folder, the same with scales of other pictures than those asked about, prompts, float tokens, logits)."""
    source = REPO / "models" / "tiny" / request.param
    engine = engine_over(source)
    files = tmp_path_factory.mktemp("media")
    seeds = ((7, 24), (4000, 10))  # calibration, and questions
    calibration, prompts = (
        [engine.processor.build(messages(sample, files)) for sample in world.held_out(seed, count)]
        for seed, count in seeds
    )
    seen = observed(engine, calibration, GREEDY)
    folder = add_scales(tmp_path_factory.mktemp(request.param) / "c8", source, seen)
    return SimpleNamespace(
        source=source, folder=folder, seen=seen, prompts=prompts, tokens=tokens_of(engine, prompts),
        logits=first_logits(engine, prompts),
    )  # fmt: skip


def tokens_of(engine, prompts, params=GREEDY) -> list[list[int]]:
    return [list(done.token_ids[0]) for done in engine.generate(prompts, params)]


def first_logits(engine, prompts) -> torch.Tensor:
    """Of the second token of each prompt: a decode step, over keys that were all read from the cache."""
    found = []
    for prompt in prompts:
        with RecordedLogits(engine.runner) as recorded:
            engine.generate([prompt], replace(GREEDY, max_new_tokens=2, ignore_eos=True))
        found.append(recorded.logits[-1][0])
    return torch.stack(found)


@pytest.fixture(scope="module")
def answered(family):
    """An engine over the scales, and its tokens."""
    engine = engine_over(family.folder)
    return engine, tokens_of(engine, family.prompts)


def test_little_is_lost(family, answered):
    engine, tokens = answered
    assert {layer.k.dtype for layer in engine.runner.kv} == {torch.int8}
    logits = first_logits(engine, family.prompts)
    error = (logits - family.logits).norm() / family.logits.norm()
    same = sum(ours == floats for ours, floats in zip(tokens, family.tokens, strict=True))
    assert 0 < error <= 0.005, error  # 0.0013 and 0.0022 here; a scale or an offset left out: 0.16 and more
    assert same >= len(tokens) - 1, same


def test_offsets_are_read(family, tmp_path):
    """Asymmetric scales: the same answers, and another reading of them would not give those."""
    engine = engine_over(add_scales(tmp_path / "c8", family.source, family.seen, symmetric=False))
    assert any(layer.scales.v_offset is not None for layer in engine.runner.kv)
    logits = first_logits(engine, family.prompts)
    assert (logits - family.logits).norm() <= 0.005 * family.logits.norm()


@pytest.mark.parametrize("scheduler", [{"max_num_batched_tokens": 33}, {"enable_prefix_caching": False}])
def test_chunks_and_caching_change_nothing(family, answered, scheduler):
    """Keys are quantized when they are written, whoever reads them: chunks and cache hits read the same."""
    engine = engine_over(family.folder, **scheduler)
    for _ in range(2):  # the second time out of the prefix cache
        assert tokens_of(engine, family.prompts) == answered[1]
    engine.scheduler.check()


def test_preemption_changes_nothing(family, answered):
    largest = max(len(prompt.token_ids) for prompt in family.prompts)
    engine = engine_over(family.folder, num_blocks=-(-largest // 16) + 3)
    assert tokens_of(engine, family.prompts[:4] * 2) == answered[1][:4] * 2
    engine.scheduler.check()


def test_blocks_come_back_from_disk(family, answered, tmp_path):
    for life in range(2):
        with engine_over(family.folder, prefix_cache_path=str(tmp_path)) as engine:
            assert {layer.k.dtype for layer in engine.runner.kv} == {torch.int8}
            assert tokens_of(engine, family.prompts) == answered[1]
            assert (engine.scheduler.num_store_hits > 0) == (life == 1)
    with engine_over(family.folder, model={"kv_cache_dtype": "float"}, prefix_cache_path=str(tmp_path)) as engine:
        tokens_of(engine, family.prompts[:1])
        assert engine.scheduler.num_store_hits == 0


def test_float_leaves_the_scales(family):
    engine = engine_over(family.folder, model={"kv_cache_dtype": "float"})
    assert {layer.k.dtype for layer in engine.runner.kv} == {torch.float32}
    assert tokens_of(engine, family.prompts[:3]) == family.tokens[:3]


# ---- the recipe


def recipe_of(folder: Path, model: dict | None = None, **scheduler):
    model = {"model_path": str(folder), "device": "cpu"} | (model or {})
    return build_recipe({"model_config": model, "scheduler_config": {"max_model_len": 512} | scheduler})


@pytest.mark.parametrize(
    "model, factor", [({"dtype": "float32"}, 4), ({"device": "npu_emulated", "soc": "atlas_800i_a2"}, 2)]
)
def test_memory_of_the_cache(family, model, factor):
    """A byte a number, whatever the device computes in; what `auto` found, and what the recipe says instead."""
    int8, plain = (prepare(recipe_of(family.folder, model | {"kv_cache_dtype": kind})) for kind in ("auto", "float"))
    assert (int8.recipe.model.kv_cache_dtype, plain.recipe.model.kv_cache_dtype) == ("int8", "float")
    assert plain.memory.block_bytes == factor * int8.memory.block_bytes
    assert prepare(recipe_of(family.source, model)).memory.block_bytes == plain.memory.block_bytes


def test_the_estimate_is_what_an_engine_holds(family, answered):
    held = sum(x.numel() * x.element_size() for layer in answered[0].runner.kv for x in (layer.k, layer.v))
    prepared = prepare(recipe_of(family.folder, block_size=16, num_blocks=256))
    assert held == prepared.memory.kv_bytes


def test_what_a_recipe_cannot_have(family, tmp_path):
    with pytest.raises(UserError, match=r"kv_cache_dtype: int8 needs scales, and the checkpoint .* has none"):
        prepare(recipe_of(family.source, {"kv_cache_dtype": "int8"}))
    emulated = {"device": "npu_emulated"}
    with pytest.raises(
        UserError, match=r"atlas_300i_duo has no documented attention over an int8 KV cache; set .*float"
    ):
        prepare(recipe_of(family.folder, emulated | {"soc": "atlas_300i_duo"}))
    assert prepare(recipe_of(family.folder, emulated | {"soc": "atlas_300i_duo", "kv_cache_dtype": "float"}))
    with pytest.raises(
        UserError, match=r"block_size: got 16; a block of an int8 KV cache on NPUs has a multiple of 32"
    ):
        prepare(recipe_of(family.folder, emulated | {"soc": "atlas_800i_a2"}, block_size=16))


def test_unusable_scales_are_refused_before_loading(family, tmp_path):
    """As the real tool leaves them today: the description says C8, and there is nothing of use."""
    folder = tmp_path / "announced"
    shutil.copytree(family.source, folder)
    write_description(folder, {"lm_head.weight": "FLOAT", "kv_cache_type": "C8"})
    with pytest.raises(
        UserError, match=r"says C8 .* not usable: missing: '.*0.self_attn.k_proj.kv_cache_scale' and \d+ more"
    ):
        engine_over(folder)
    write_description(folder, {"lm_head.weight": "FLOAT", "kv_quant_type": "C4"})
    with pytest.raises(UserError, match=r"kv_cache_type is C4; this release reads C8"):
        engine_over(folder)
    description = family.folder / "quant_model_description.json"
    silent = tmp_path / "silent"
    shutil.copytree(family.folder, silent)
    types = {name: kind for name, kind in json.loads(description.read_text()).items() if "kv_" not in name}
    write_description(silent, types)
    with pytest.raises(UserError, match=r"kv_cache_(scale|offset)'.* stand beside the weights"):
        engine_over(silent)


def test_a_folder_is_judged_without_loading_it(family, tmp_path):
    """What `quantize --check` says: nothing, a warning of what NPUs do not take, and faults."""
    report = check_folder(family.folder)
    assert not report.faults and not any("kv_cache" in warning for warning in report.warnings)
    shifted = add_scales(tmp_path / "shifted", family.source, family.seen, symmetric=False)
    report = check_folder(shifted)
    (warning,) = [each for each in report.warnings if "kv_cache" in each]
    assert not report.faults and "6 tensors" in warning and "symmetric scales only" in warning
    file = shifted / "model.safetensors"
    tensors = load_file(file)
    name = next(each for each in tensors if each.endswith("layers.1.self_attn.v_proj.kv_cache_scale"))
    save_file(tensors | {name: -tensors[name]}, file, metadata={"format": "pt"})
    (fault,) = check_folder(shifted).faults
    assert "layers.1.self_attn.v_proj.kv_cache_scale' must hold positive numbers" in fault
    save_file({each: x for each, x in tensors.items() if each != name}, file, metadata={"format": "pt"})
    (fault,) = check_folder(shifted).faults
    assert "not usable: missing: 'model.language_model.layers.1.self_attn.v_proj.kv_cache_scale'." in fault


def test_one_layer_without_scales(family, tmp_path):
    with pytest.raises(UserError, match=r"missing: '.*layers.2.self_attn.k_proj.kv_cache_scale' and 3 more"):
        engine_over(add_scales(tmp_path / "c8", family.source, family.seen[:2]))


def test_the_tensors_of_a_layer():
    keys, values = Extremes(), Extremes()
    keys.observe(torch.tensor([[127.0, -254.0]]))
    values.observe(torch.tensor([[12.7, 0.0]]))
    made = cache_tensors("l.self_attn", keys, values)
    assert list(made) == tensor_names("l.self_attn")
    assert made["l.self_attn.k_proj.kv_cache_scale"].tolist() == [1, 2]
    torch.testing.assert_close(made["l.self_attn.v_proj.kv_cache_scale"], torch.tensor([0.1, 2.0**-23]))
