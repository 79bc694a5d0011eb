"""wint8: which layers are int8, what they hold on any number of ranks and of any form of file, and in what memory."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from executor.capacity.products import head as head_product
from executor.checkpoint.load import EMBEDDING, default_dtype
from executor.checkpoint.pull import finalize
from executor.checkpoint.weights import check_complete
from executor.commands.build import build_engine
from executor.device import ops
from executor.device.cpu import ops as cpu_ops
from executor.device.cpu.capability import capability
from executor.device.cpu.int8_products import DIGITS, EXPANDED, ONE_CALL
from executor.device.cpu.ops import CpuOps
from executor.device.table import BACKENDS, DeviceSettings
from executor.errors import UserError
from executor.layers.embedding import Embedding, Head
from executor.layers.moe import Experts
from executor.parallel.groups import SINGLE, Group, Parallel
from executor.quant import wint8
from executor.quant.choose import MADE, schemes_of
from executor.quant.sizes import MADE_AT_LOAD
from executor.recipe.device import takes_int8_head
from executor.recipe.memory import weights_bytes
from executor.recipe.schema import build_recipe
from executor.recipe.settle import prepare
from tests.engines import engine_over
from tests.msmodelslim.folders import expected, family_of
from tests.quant.test_msmodelslim import answered
from tests.reference import REPO

E, N, INNER, V = 4, 24, 16, 300


def recipe_of(folder, **model: str):
    scheduler = {"max_model_len": 2048, "block_size": 16, "max_num_seqs": 8, "num_blocks": 64}
    tree = {"model_path": str(folder), "device": "cpu", "dtype": "float32", "quantization": "wint8"} | model
    return build_recipe({"model_config": tree, "scheduler_config": scheduler})


@pytest.mark.parametrize("name", ["qwen2_5_vl_w8a8", "qwen3_vl_w8a16", "qwen3_vl_moe_w8a8"])
def test_text_layers_are_int8_and_answers_stay(msmodelslim, name):
    """Of the float checkpoints that the quantized folders were made of; their questions."""
    folder = REPO / "models" / "tiny" / family_of(name)
    engine = build_engine(recipe_of(folder))
    held = schemes_of(engine.runner.model)
    layers = {linear.removeprefix("language_model.layers.") for linear in held["wint8"]}
    mlp = {"mlp.experts"} if "moe" in name else {"mlp.gate_up_proj", "mlp.down_proj"}
    assert layers == {"self_attn.qkv_proj", "self_attn.o_proj", *mlp, "lm_head"}
    assert all(linear.startswith("visual.") or linear.endswith("mlp.gate") for linear in held["none"])
    plain, cases = engine_over(folder, num_blocks=64), expected(msmodelslim(name))["cases"]
    for case in cases:
        wanted, said = answered(plain, case, 16)
        logits, tokens = answered(engine, case, 16)
        assert tokens == said
        assert 1e-4 < float((logits - wanted).norm() / wanted.norm()) < 0.03


def test_float_checkpoints_only(msmodelslim):
    assert tuple(MADE) == MADE_AT_LOAD
    with pytest.raises(UserError, match="wint8 is made of float weights, and the checkpoint .* is w8a16; set quantiz"):
        prepare(recipe_of(msmodelslim("qwen3_vl_w8a16")))


@pytest.mark.parametrize("family, tied", [("qwen2_5_vl", True), ("qwen3_vl", False)])
def test_the_estimate_counts_a_tied_heads_copy(family, tied):
    """Its table stays; a head of its own has fewer bytes."""
    folder = REPO / "models" / "tiny" / family
    narrow, wide = (prepare(recipe_of(folder, quantization=word)).memory.weights_bytes for word in ("wint8", "none"))
    shapes = prepare(recipe_of(folder)).shapes
    linears = shapes.num_layers * shapes.attention_parameters + shapes.mlp_parameters
    head = shapes.vocab_size * shapes.hidden_size
    assert shapes.tied_embeddings is tied
    assert wide - narrow == 3 * linears + (-head if tied else 3 * head) - 4 * shapes.vocab_size


class Whole(Group):
    """One of several ranks, whose logits the test joins itself."""

    def all_gather(self, x: Tensor) -> Tensor:
        return x


def head_of(tensors: dict[str, Tensor], tied: bool, group: Group, dtype: torch.dtype) -> tuple[Embedding, Head]:
    """A rank's table and head as they are loaded from `tensors`, the head int8."""
    with default_dtype(dtype):
        table = Embedding(V, N, group)
        head = Head(V, N, group, table if tied else None)
        for _ in head.pulls({}, "lm_head"):
            pass
        head.take(MADE["wint8"])
    pulls = [*table.pulls({}, EMBEDDING), *head.pulls({}, "lm_head")]
    check_complete(nn.ModuleList([table, head]), pulls)
    for pull in pulls:
        x = tensors[pull.name][pull.file_index]
        pull.into.copy_(x if pull.convert is None else pull.convert(x))
    finalize(head)
    return table, head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_logits_are_those_of_rounded_rows_on_any_ranks(tied, isa, dtype):
    """Tied or not; the table that tokens are looked up in keeps its values."""
    if capability().isa not in ("avx512", isa):
        pytest.skip(f"this CPU has no {isa} path")
    torch.manual_seed(0)
    ops.bind(CpuOps(capability(isa)))
    tensors = {f"{EMBEDDING}.weight": torch.randn(V, N).to(dtype), "lm_head.weight": torch.randn(V, N).to(dtype)}
    weight = tensors[f"{EMBEDDING}.weight" if tied else "lm_head.weight"]
    values, scale = scaled(weight.float())
    x = torch.randn(70, N).to(ops.bound().compute_dtype(dtype))
    wanted = x.double() @ (values.double() * scale.double().unsqueeze(-1)).t()
    table, head = head_of(tensors, tied, Group(), dtype)
    assert (head.own.scheme.name, head.own.prefix) == ("wint8", "lm_head")
    assert torch.equal(table.weight, tensors[f"{EMBEDDING}.weight"])
    parts = [head_of(tensors, tied, Whole(rank, 2), dtype)[1] for rank in (0, 1)]
    for rows in (1, 8, 70):
        logits = head(x[:rows])
        assert logits.dtype is torch.float32 and logits.shape == (rows, V)
        atol = 2e-3 if x.dtype is torch.float32 else 0.06
        torch.testing.assert_close(logits.double(), wanted[:rows], atol=atol, rtol=0.01)
        torch.testing.assert_close(torch.cat([part(x[:rows]) for part in parts], -1), logits, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tied_table_stays_in_a_file_of_its_type(dtype, caplog):
    """The int8 copy is all that is in memory then; the table has the file's values either way."""
    folder = REPO / "models" / "tiny" / "qwen2_5_vl"
    with caplog.at_level("INFO"):
        model = build_engine(recipe_of(folder, dtype=dtype)).runner.model
    assert ("token embeddings are looked up in" in caplog.text) is (dtype == "bfloat16")
    assert model.lm_head.tied and not list(model.lm_head.parameters())
    stored = load_file(folder / "model.safetensors")
    (table,) = (x for name, x in stored.items() if name.endswith("embed_tokens.weight"))
    assert torch.equal(model.language_model.embed_tokens.weight, table.to(getattr(torch, dtype)))


@pytest.mark.parametrize("form, rounds", [(ONE_CALL, True), (DIGITS, True), (EXPANDED, False)])
def test_a_cpu_without_int8_products_keeps_the_head(form, rounds, monkeypatch):
    """Values made float32 at every call would take several times as long as 16 bits."""
    folder = REPO / "models" / "tiny" / "qwen3_vl"
    found = replace(capability(), int8=form)
    monkeypatch.setattr(cpu_ops, "capability", lambda isa="auto": found)
    prepared = prepare(recipe_of(folder))
    shapes = prepared.shapes
    assert takes_int8_head(prepared.recipe, shapes.vocab_size) is rounds
    assert head_product(prepared.recipe, shapes).kind == ("WINT8" if rounds else "FLOAT")
    more = prepared.memory.weights_bytes - weights_bytes(prepared.recipe, replace(shapes, vocab_size=0))
    table = shapes.vocab_size * shapes.hidden_size
    assert more == 4 * table + (table + 4 * shapes.vocab_size if rounds else 4 * table)
    if form != DIGITS:
        assert ("lm_head" in schemes_of(build_engine(recipe_of(folder)).runner.model)["wint8"]) is rounds


def test_a_chip_keeps_a_head_that_is_no_one_product():
    """By the whole vocabulary: 65535 outputs are the most, and two ranks' halves must be the same model."""
    settings = DeviceSettings("bfloat16", soc="atlas_800i_a2")
    for name in ("npu", "npu_emulated"):
        assert BACKENDS[name].takes_int8_head(settings, 65535)
        assert not BACKENDS[name].takes_int8_head(settings, 151936)
    none = recipe_of(REPO / "models" / "tiny" / "qwen3_vl", quantization="none")
    assert not takes_int8_head(none, 512)


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and scales of the rows of `[..., m, n]`."""
    scale = x.abs().amax(-1) / 127
    return (x / scale.unsqueeze(-1)).round().to(torch.int8), scale


def forms(gate_up: Tensor, down: Tensor) -> dict[str, dict[str, Tensor]]:
    """Experts `[E, 2I, n]` and `[E, n, I]` as checkpoints have them."""
    stacked = {"m.experts.gate_up_proj": gate_up, "m.experts.down_proj": down}
    apart = {}
    for expert in range(E):
        gate, up = gate_up[expert].chunk(2)
        for name, x in (("gate_proj", gate), ("up_proj", up), ("down_proj", down[expert])):
            apart[f"m.experts.{expert}.{name}.weight"] = x
    swapped = {name: x.transpose(1, 2).contiguous() for name, x in stacked.items()}
    return {"stacked": stacked, "swapped": swapped, "unstacked": apart}


@pytest.mark.parametrize("form", ["stacked", "swapped", "unstacked"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (1, 2), (2, 2)])  # groups of experts, slices of their inner dim
def test_experts_of_every_form_hold_the_same_on_any_ranks(form, ranks):
    """A row of the second linear is spread over the slices, and has one scale all the same."""
    torch.manual_seed(0)
    ops.bind(CpuOps())
    gate_up, down = torch.randn(E, 2 * INNER, N), torch.randn(E, N, INNER)
    checkpoint = forms(gate_up, down)[form]
    catalog = {name: SimpleNamespace(shape=tuple(x.shape)) for name, x in checkpoint.items()}
    (up_values, up_scale), (down_values, down_scale) = scaled(gate_up), scaled(down)
    for group in range(ranks[0]):
        for column in range(ranks[1]):
            parallel = Parallel(expert_groups=Group(group, ranks[0]), expert_columns=Group(column, ranks[1]))
            layer = Experts(N, INNER, E, parallel if ranks != (1, 1) else SINGLE)
            layer.take(MADE["wint8"])
            pulls = list(layer.pulls(catalog, "m.experts"))
            check_complete(layer, pulls)
            for pull in pulls:
                assert tuple(checkpoint[pull.name].shape) == pull.file_shape
                if pull.into.numel():
                    x = checkpoint[pull.name][pull.file_index]
                    pull.into.copy_(x if pull.convert is None else pull.convert(x))
            local, inner = layer.share.experts, layer.share.columns
            rows = torch.cat([torch.arange(INNER)[inner], torch.arange(INNER)[inner] + INNER])
            assert torch.equal(layer.gate_up_weight, up_values[local][:, rows])
            assert torch.equal(layer.down_weight, down_values[local][..., inner])
            torch.testing.assert_close(layer.gate_up_weight_scale.data, up_scale[local][:, rows])
            torch.testing.assert_close(layer.down_weight_scale.data, down_scale[local])


def test_no_more_than_a_piece_is_float_at_a_time(monkeypatch):
    seen = []
    row_scale = wint8._row_scale
    monkeypatch.setattr(wint8, "PIECE_NUMBERS", 4 * N)
    monkeypatch.setattr(wint8, "_row_scale", lambda x: seen.append(x.numel()) or row_scale(x))
    test_experts_of_every_form_hold_the_same_on_any_ranks("stacked", (1, 1))
    assert max(seen) <= 4 * N and len(seen) >= 2 * (E * 2 * INNER // 4)


def test_a_row_of_zeros_stays_zeros():
    x = torch.zeros(2, 8)
    x[1] = 1
    scale = wint8._row_scale(x)
    assert float(scale[0]) == 2.0**-23 and wint8._rounded(x, scale).tolist() == [[0] * 8, [127] * 8]
