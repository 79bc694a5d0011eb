"""The decode graph at true sizes: nodes per layer, nodes outside, collectives; and the check command's document."""

import functools
import json
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from itertools import product

import pytest
import torch

from emulator.graph import Graph, per_layer
from executor.commands import check
from executor.device.npu.soc import SOCS
from executor.errors import UserError
from executor.recipe.schema import load_recipe
from tests.cases import mostly_long
from tests.device.inside.npu import A2, A3, DUO, WHOLLY_STATIC, true_size
from tests.reference import REPO

QWEN2_5, QWEN3, MOE = "Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-30B-A3B-Instruct"
BIG = "Qwen2.5-VL-72B-Instruct"  # 7B's 28 heads do not divide by 8
FIGURES = [  # model, ranks, most nodes per layer
    (QWEN2_5, 1, 12), (QWEN3, 1, 9), (MOE, 1, 16),
    (QWEN2_5, 2, 14), (QWEN3, 2, 11), (MOE, 2, 17),
    (BIG, 8, 14), (QWEN3, 8, 11), (MOE, 8, 17),
]  # fmt: skip
# Two ranks or eight add the same two sums, and every family is asked of both chips: each count of ranks is held once a
# family, but 8, where the odd head count is alone to be seen.
ONCE = [
    (A3, QWEN2_5, 1, 12), (A2, QWEN3, 1, 9), (A3, MOE, 1, 16),
    (A2, QWEN2_5, 2, 14), (A3, QWEN3, 2, 11), (A2, MOE, 2, 17),
    (A3, BIG, 8, 14),
]  # fmt: skip
INT8 = [(QWEN3, "w8a8", 1, 10), (QWEN3, WHOLLY_STATIC, 1, 10), (QWEN3, "w8a8_dynamic", 2, 12)]  # two are collectives
FUSED = {"summed_linear_in_decode": "npu_mm_all_reduce_base"}  # beyond what its page allows
ON_HOST = {"LocalScalarDense", "Where", "NonZero", "Unique2", "MaskedSelect"}  # their shape or value is the host's


@functools.cache
def decode_graph(name: str, soc: str, layers: int, *, tp: int, ep: int = 1, replicas: int = 1, q_len: int = 1) -> Graph:
    """The decode graph of the first layers in the chip's own type; several tests look at the same one."""
    with true_size(name, soc, tp=tp, ep=ep, replicas=replicas) as traces:
        return traces.decode_graph(layers, q_len=q_len)


@pytest.mark.parametrize(
    "soc, name, tp, most", mostly_long([(soc, *figures) for figures in FIGURES for soc in (A2, A3)], ONCE)
)
def test_nodes_of_a_decode_layer(soc, name, tp, most) -> None:
    one, two = (decode_graph(name, soc, layers, tp=tp) for layers in (1, 2))
    layer = per_layer(one, two)
    fixed = Counter(one.kernels)
    fixed.subtract(layer)
    assert layer.total() <= most, layer
    assert fixed.total() <= 20, fixed
    assert not ON_HOST & set(two.kernels)
    collectives = Counter({kind: layer[kind] for kind in layer if kind in two.collectives})
    assert collectives.total() == (2 if tp > 1 else 0), collectives
    assert (two.collectives - collectives - collectives).total() == (2 if tp > 1 else 0), "embedding and logits"


@pytest.mark.parametrize(  # attention alone sees how many tokens a row has: its form is the family's and the chip's
    "soc, name, tp",
    mostly_long(
        [(soc, name, tp) for tp in (1, 2) for name in (QWEN2_5, QWEN3, MOE) for soc in (A2, A3)],
        [(A2, QWEN2_5, 2), (A3, QWEN3, 2), (A2, MOE, 2)],
    ),
)
def test_verifying_drafts_adds_no_node(soc, name, tp) -> None:
    """A row's tokens are rows to all but attention, whose lengths are inputs or constants: the nodes are the same."""
    ones, twos = ([decode_graph(name, soc, layers, tp=tp, q_len=q_len) for q_len in (1, 8)] for layers in (1, 2))
    decode, verify = (per_layer(one, two) for one, two in zip(ones, twos, strict=True))
    assert verify == decode
    assert twos[1].kernels == twos[0].kernels, "outside of layers as well"


@pytest.mark.parametrize(  # each length once of a family, on the chip whose decode graph another test converts too
    "q_len, name, soc, replicas",
    mostly_long(
        [
            (q_len, *form)
            for q_len in (2, 16)
            for form in ((QWEN2_5, A2, 1), (QWEN3, A3, 1), (MOE, A3, 2), (MOE, A2, 2))
        ],
        [(16, QWEN2_5, A2, 1), (2, QWEN3, A3, 1), (16, MOE, A3, 2)],
    ),
)
def test_nodes_do_not_depend_on_how_many_drafts_there_are(name, soc, replicas, q_len) -> None:
    kernels = [decode_graph(name, soc, 2, tp=2, replicas=replicas, q_len=each).kernels for each in (1, q_len)]
    assert kernels[1] == kernels[0]


@pytest.mark.parametrize(  # one scale for all rows with a dense layer, one for each with experts
    "soc, name, quantization",
    mostly_long(
        product((A2, A3), (QWEN2_5, QWEN3, MOE), ("w8a8", "w8a8_dynamic", "w8a8_mix", "w8a16")),
        [(A3, QWEN3, "w8a8"), (A3, MOE, "w8a8_dynamic")],
    ),
)
def test_verifying_drafts_adds_no_node_to_quantized_layers(soc, name, quantization) -> None:
    """One scale for all rows, or one for each: what a decode step has, a step with drafts has as well."""
    with true_size(name, soc, tp=2, quantization=quantization) as traces:
        assert traces.decode_calls(tensors=True, q_len=8).violations == []
        decode, verify = (traces.decode_graph(2, q_len=q_len).kernels for q_len in (1, 8))
    assert verify == decode


@pytest.mark.parametrize("name, quantization, tp, most", INT8)
def test_nodes_of_a_quantized_decode_layer(name, quantization, tp, most) -> None:
    """Norms, SwiGLU and what stands before o_proj quantize; every product takes int8, and nothing is cast or copied."""
    with true_size(name, A3, tp=tp, quantization=quantization) as traces:
        assert traces.decode_calls(tensors=True).violations == []
        layer = per_layer(traces.decode_graph(1), traces.decode_graph(2))
    assert layer.total() <= most, layer
    assert not {"Cast", "TensorMove", "Transpose", "Fill", "Add"} & set(layer), layer
    plain = {"w8a8": 1}.get(quantization, 0)
    assert layer["MatMul"] == plain, "down_proj alone stays float where the vendor leaves it"
    assert layer["QuantBatchMatmulV3"] + layer["WeightQuantBatchMatmulV2"] == 4 - plain


TIED = "Qwen2.5-VL-3B-Instruct"


@pytest.mark.parametrize("name", [TIED, QWEN3])
@pytest.mark.parametrize("vocab_size, product", [(65535, "WeightQuantBatchMatmulV2"), (None, "MatMul")])
def test_a_head_made_int8_adds_no_node(name, vocab_size, product) -> None:
    """Tied or not. One product has 65535 outputs at the most: a larger head would be several, put side by side, and
    stays float.
    """
    fixed = {}
    for quantization in ("none", "wint8"):
        with true_size(name, A3, quantization=quantization, vocab_size=vocab_size) as traces:
            assert traces.decode_calls(tensors=True).violations == []
            one, two = traces.decode_graph(1), traces.decode_graph(2)
        fixed[quantization] = Counter(one.kernels)
        fixed[quantization].subtract(per_layer(one, two))
    products = ("MatMul", "WeightQuantBatchMatmulV2")
    assert {kind: fixed["wint8"][kind] for kind in products if fixed["wint8"][kind]} == {product: 1}
    assert fixed["wint8"].total() == fixed["none"].total()


EXPERTS = [("w8a8", 2, 17), ("w4a8_dynamic", 2, 21)]


@pytest.mark.parametrize("quantization, ranks, most", EXPERTS)
def test_nodes_of_a_layer_of_quantized_experts(quantization, ranks, most) -> None:
    """Experts dealt to the ranks; two nodes more are collectives. Of four-bit weights three nodes are GE's change of a
    weight's type, which torchair writes down where CANN is older than 8.5 or absent, as here.
    """
    with true_size(MOE, A3, tp=ranks, ep=ranks, quantization=quantization) as traces:
        assert traces.decode_calls(tensors=True).violations == []
        layer = per_layer(traces.decode_graph(1), traces.decode_graph(2))
    assert layer.total() <= most, layer
    assert layer["HcomAllReduce"] == 2 and layer.total() - 2 <= 19
    assert layer["MatMul"] == 1, "the router alone is float"
    fused, products = layer["GroupedMatmulSwigluQuantV2"], layer["GroupedMatmul"]
    assert (fused, products, layer["SwiGlu"], layer["DynamicQuant"]) == (1, 1, 0, 0), layer


@pytest.mark.parametrize("name, tp, nodes, fused", [(QWEN2_5, 2, 12, 2), (MOE, 2, 16, 1)])
def test_what_the_table_can_give_a_decode_layer_of_a2(name, tp, nodes, fused) -> None:
    """Sums in one kernel with their products, which is documented for prefill only: that many nodes less."""
    with true_size(name, A2, tp=tp, calls=FUSED) as traces:
        one, two = traces.decode_graph(1), traces.decode_graph(2)
        assert traces.decode_calls(tensors=True).violations == []
    layer = per_layer(one, two)
    assert (layer.total(), layer["MatmulAllReduce"]) == (nodes, fused), layer


def test_prefill_sums_with_its_products_on_a2_and_decode_does_not() -> None:
    """As many rows as a decode step has, and one more. Of the last layer one row is computed behind attention."""
    with true_size(QWEN3, A2, tp=2) as traces:
        sums = 2 * (traces.num_layers - 1)
        rows = traces.device.decode_rows
        fused = {n: traces.prefill_calls(n, n, 0).counts["npu_mm_all_reduce_base"] for n in (1, rows, rows + 1, 4096)}
        decode = traces.decode_calls(tensors=False)
        vision = traces.vision_calls((1, 16, 16))
        blocks = len(traces.model.visual.blocks)
    assert sums and fused == {1: 0, rows: 0, rows + 1: sums, 4096: sums}
    assert decode.counts["npu_mm_all_reduce_base"] == 0 and decode.collectives.total() > 4
    assert vision.counts["npu_mm_all_reduce_base"] >= 2 * blocks and not vision.violations


@pytest.mark.parametrize(  # how many ranks a group has is in no node: experts of one replica, of two, and of both
    "soc, tp, replicas, ep",
    mostly_long(
        [
            (soc, *degrees)
            for degrees in ((2, 1, 2), (4, 1, 4), (8, 1, 8), (4, 2, 2), (4, 2, 8), (8, 2, 16))
            for soc in (A2, A3)
        ],
        [(A2, 2, 1, 2), (A3, 4, 2, 2), (A2, 4, 2, 8)],
    ),
)
def test_collectives_of_dealt_experts(soc, tp, replicas, ep) -> None:
    one, two = (decode_graph(MOE, soc, layers, tp=tp, replicas=replicas, ep=ep) for layers in (1, 2))
    layer = per_layer(one, two)
    collectives = Counter({kind: layer[kind] for kind in layer if kind in two.collectives})
    assert collectives.total() == (2 if replicas == 1 else 3), collectives
    assert (two.collectives - collectives - collectives).total() == 2, "embedding and logits"
    assert not ON_HOST & set(two.kernels)
    assert layer.total() <= 17 + 2 * (replicas > 1), "dealing adds the gather and own rows only"


@pytest.mark.parametrize(  # where the test above has the graph in bfloat16 already
    "soc, name",
    mostly_long(product((A2, A3), (QWEN2_5, QWEN3, MOE)), [(A2, QWEN2_5), (A3, QWEN3), (A2, MOE)]),
)
def test_half_precision_has_the_same_graph(soc, name) -> None:
    assert SOCS[soc].dtypes[0] is torch.bfloat16
    with true_size(name, soc, tp=2) as traces:
        assert traces.decode_calls(tensors=True).violations == []
    with true_size(name, soc, tp=2, dtype=torch.float16) as traces:
        assert traces.decode_calls(tensors=True).violations == []
        half = traces.decode_graph(2)
    assert half.kernels == decode_graph(name, soc, 2, tp=2).kernels


@pytest.mark.parametrize("name", [QWEN2_5, QWEN3, MOE])
def test_nodes_of_a_vision_block(name) -> None:
    with true_size(name, A3) as traces:
        assert traces.vision_block_graph(1024).kernels.total() <= 14


def checked(recipe: str, *overrides: str) -> dict:
    document, status = check.run(load_recipe(REPO / "config" / recipe, overrides))
    assert document["ok"] == (status == 0)
    return json.loads(json.dumps(document))


KEYS = {
    "command", "model", "soc", "dtype", "world_size", "attn_tp_size", "moe_ep_size", "layers", "kernel_nodes_per_layer",
    "kernel_nodes_fixed", "collectives_per_layer", "ops_per_layer", "unsupported", "ok",
}  # fmt: skip


VERIFY = "speculative_config.method=ngram", "speculative_config.num_speculative_tokens=7"


@pytest.fixture(scope="module")
def of_a_graph_chip() -> tuple[dict, str]:
    """The document of a recipe with drafts, and what was printed: 28 layers are not converted twice."""
    with redirect_stdout(StringIO()) as printed:
        one_rank = "parallel_config.world_size=1", "model_config.soc=atlas_800i_a3"
        document = checked("qwen3_vl_2b.yaml", *one_rank, *VERIFY)
    return document, printed.getvalue()


def test_the_document_of_a_graph_chip(of_a_graph_chip) -> None:
    document, printed = of_a_graph_chip
    assert document.keys() >= KEYS and document["ok"] and document["layers"] == 28
    assert document["kernel_nodes_per_layer"] == sum(document["ops_per_layer"].values()) == 9
    assert document["decode_from"] == "ge_graph" and document["weights_bytes"] > 4e9
    assert "9 kernels per layer" in printed


def test_the_document_of_a_quantized_recipe(capsys) -> None:
    """The folder is not here: its scheme is the recipe's word, its layers are the vendor's choice."""
    settings = "model_config.model_path=any/Qwen3-VL-2B-Instruct-w8a8", "model_config.quantization=w8a8_dynamic"
    document = checked("qwen3_vl_2b_300i_duo.yaml", *settings)
    assert document["ok"] and document["quantization"] == "w8a8_dynamic"
    assert document["ops_per_layer"]["npu::npu_quant_matmul_dequant"] == 4
    quantized = document["schemes"]["w8a8_dynamic"]
    assert "language_model.layers.self_attn.qkv_proj" in quantized and "visual.blocks.mlp.linear_fc2" in quantized
    assert {"visual.merger.linear_fc1", "visual.patch_embed.proj"} <= set(document["schemes"]["none"])
    assert 2.0e9 < document["weights_bytes"] < 2.6e9, "a byte a weight, embeddings and mergers two"
    assert "w8a8_dynamic language_model.layers.mlp.down_proj," in capsys.readouterr().out


def test_a_quantized_folder_that_is_here_says_what_is_quantized(msmodelslim) -> None:
    path = f"model_config.model_path={msmodelslim('qwen2_5_vl_w8a8')}"
    tiny = "scheduler_config.max_model_len=1024", "parallel_config.world_size=1"
    document = checked("qwen3_vl_8b_300i_duo.yaml", path, *tiny)
    assert document["ok"] and document["quantization"] == "w8a8"
    assert "visual.blocks.mlp.down_proj" in document["schemes"]["w8a8_dynamic"]
    assert "language_model.layers.mlp.gate_up_proj" in document["schemes"]["w8a8"]
    assert document["ops_per_layer"]["npu::npu_add_rms_norm_quant"] == 2


def test_the_document_of_the_eager_chip() -> None:
    document = checked("qwen3_vl_2b_300i_duo.yaml")
    assert document.keys() >= KEYS and document["ok"] and document["dtype"] == "float16"
    assert document["ops_per_layer"]["atb::_npu_paged_attention"] == 1
    assert document["decode_from"] == "traced step"


def test_check_converts_the_steps_that_verify_drafts(of_a_graph_chip) -> None:
    document, printed = of_a_graph_chip
    assert document["ok"] and document["verify"].keys() == {"2", "4", "8"}
    for q_len, verify in document["verify"].items():
        assert verify["from"] == "ge_graph" and verify["ops_per_layer"] == document["ops_per_layer"]
        assert verify["kernel_nodes_per_layer"] == 9 and verify["kernel_nodes_fixed"] == document["kernel_nodes_fixed"]
        assert f"{q_len} tokens of a request: 9 kernels per layer" in printed
        assert f"verify_{q_len}" in document["calls"]


def test_check_traces_the_steps_that_verify_drafts_eagerly() -> None:
    """300I DUO has no graphs; and no graph reads an int8 cache with several tokens of a request."""
    document = checked("qwen3_vl_2b_300i_duo.yaml", *VERIFY)
    verify = document["verify"]["8"]
    assert document["ok"] and verify["from"] == "traced step"
    assert verify["kernel_nodes_per_layer"] == document["kernel_nodes_per_layer"]
    assert verify["ops_per_layer"]["atb::_npu_paged_attention_splitfuse_v2"] == 1


def test_a_layer_that_gains_a_node_is_not_ok() -> None:
    decode, same, more = ({"kernel_nodes_per_layer": n, "from": "ge_graph"} for n in (9, 9, 10))
    assert check._grown_layers(decode, {4: same, 8: more}) == [
        "graph of 8 tokens of a request: 10 kernels per layer, a decode step has 9"
    ]


def test_what_a_chip_cannot_do_is_listed() -> None:
    """A kernel's limit that a recipe breaks is found without the chip: a block has at most 1024 tokens."""
    tiny = ("model_config.model_path=models/tiny/qwen3_vl", "scheduler_config.max_model_len=2048")
    document = checked("qwen3_vl_2b.yaml", *tiny, "scheduler_config.block_size=2048", "parallel_config.world_size=1")
    assert not document["ok"] and any("block_size must be" in text for text in document["unsupported"])


@pytest.mark.parametrize(
    "recipe, overrides, words",
    [
        ("quickstart.yaml", [], ["check asks what a recipe needs of a chip", "--set model_config.soc="]),
        ("qwen3_vl_8b.yaml", ["model_config.model_path=Qwen/Qwen3-VL-9B-Instruct"], ["Qwen3-VL-9B", "Qwen3-VL-8B"]),
        ("qwen3_vl_8b.yaml", ["parallel_config.world_size=3"], ["Degrees that work"]),
        (
            "qwen3_vl_8b.yaml",
            ["model_config.model_path=any/Qwen3-VL-8B-Instruct-w8a8"],
            ["cannot know how its weights are quantized", "--set model_config.quantization=w8a8"],
        ),
        ("qwen3_vl_8b_300i_duo.yaml", ["model_config.dtype=bfloat16"], ["float16 only"]),
    ],
)
def test_recipes_that_cannot_be_checked(recipe, overrides, words) -> None:
    with pytest.raises(UserError) as error:
        checked(recipe, *overrides)
    assert all(word in str(error.value) for word in words), error.value


def test_a_graph_can_only_be_saved_where_there_is_one(tmp_path) -> None:
    with pytest.raises(UserError, match="decodes eagerly and has no graph"):
        check.run(load_recipe(REPO / "config" / "qwen3_vl_2b_300i_duo.yaml"), save=tmp_path / "graph.pbtxt")


@pytest.mark.long
@pytest.mark.parametrize("soc", [A2, A3, DUO])
@pytest.mark.parametrize("path", sorted((REPO / "config").glob("qwen*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_at_its_true_size(path, soc) -> None:
    """The full table: all shipped recipes of the nine models on the chips they are for."""
    recipe = load_recipe(path)
    if ("300i_duo" in path.stem) != (soc == DUO):
        pytest.skip("not for this chip")
    document = checked(path.name, f"model_config.soc={soc}")
    assert document["ok"], document["unsupported"]
    if soc != DUO:
        most = {"Qwen2.5": 12, "Qwen3-VL": 9}[next(k for k in ("Qwen2.5", "Qwen3-VL") if k in recipe.model.model_path)]
        most = 16 if "A3B" in recipe.model.model_path else most
        most += recipe.model.quantization == "w8a8"  # what o_proj takes is quantized by itself
        sums = 0 if document["world_size"] == 1 else 1 if "A3B" in recipe.model.model_path else 2
        assert document["kernel_nodes_per_layer"] <= most + sums
