"""How many kernels a step has on an NPU: the count table for machines without torch_npu.

Where torch_npu is installed the emulator converts and traces the steps themselves (executor/commands/check.py); these
numbers equal its counts for every family, scheme and form of parallelism, which tests in tests/capacity/inside hold. A
kernel is a node of the decode graph that does work, or an eager call that is no view. On a CPU nothing is counted: 0.
"""

from dataclasses import dataclass

from executor.recipe.graph_sizes import decode_tokens
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes

GRAPH_MODES = ("ge_graph", "npugraph_ex")
_DUO = "atlas_300i_duo"
NPUS = ("npu", "npu_emulated")
_STATIC = ("w8a8", "w8a8s", "w8a8sc", "w8a8_mix", "w4a8_dynamic")
"""Recipes' words whose attention and first MLP linears have one measured scale for all rows."""
_INTEGER = (*_STATIC, "w8a8_dynamic")
_GRAPH_LAYER = {"qwen2_5_vl": 12, "qwen3_vl": 9, "qwen3_vl_moe": 15}
_EAGER_LAYER = {"qwen2_5_vl": 10, "qwen3_vl": 9, "qwen3_vl_moe": 15}
_DUO_LAYER = {"qwen2_5_vl": 10, "qwen3_vl": 12, "qwen3_vl_moe": 18}  # keys normed and rotated apart; routing of int32
_BLOCK, _DUO_ATTENTION = 11, 3  # of a vision block; the 300I DUO's packed attention takes so many more
_PARTS = 5  # linears of a dense layer that were compressed one by one
_OTHERS = 9  # leaving out other ranks' experts where routing knows no range of them
_FUSED_CHIP, _FUSED_RANKS = "atlas_800i_a2", (2, 4, 8)  # where a product and its sum are one kernel in prefill
_GATE_ROWS, _SWIGLU_COLUMNS, _TILE = 1024, 32, 16  # limits of the 300I DUO's kernels


@dataclass(frozen=True)
class KernelCounts:
    """Kernels of a decoder layer and outside of layers."""

    per_layer: int
    fixed: int

    def total(self, num_layers: int) -> int:
        return num_layers * self.per_layer + self.fixed


def counts_in_graph(recipe: Recipe, shapes: ModelShapes) -> KernelCounts:
    """Of a decode step as a graph, on Atlas A2 and A3."""
    is_int8 = recipe.model.quantization in _INTEGER
    layer = _GRAPH_LAYER[shapes.family] + (is_int8 and not shapes.num_experts) + _sums(recipe, shapes)
    if shapes.num_experts:
        layer += 2 * (_replicas(recipe) > 1)  # the gather of all tokens, the choice of this replica's
        layer += 4 * (recipe.model.quantization == "w4a8_dynamic")  # words of eight outputs, read as what they hold
    return KernelCounts(layer, (18 if recipe.attn_tp_size > 1 else 11) + is_int8)


def counts_eager(recipe: Recipe, shapes: ModelShapes) -> KernelCounts:
    """Of an eager step, decode or prefill, of text."""
    word, is_duo = recipe.model.quantization, recipe.model.soc == _DUO
    layer = (_DUO_LAYER if is_duo else _EAGER_LAYER)[shapes.family] + _sums(recipe, shapes)
    if shapes.num_experts and _replicas(recipe) > 1:
        layer += 1
    fixed = 15 if recipe.attn_tp_size > 1 else 9
    if not is_duo:
        is_int8 = word in _INTEGER
        return KernelCounts(layer + (is_int8 and not shapes.num_experts), fixed + is_int8)
    if shapes.num_experts and recipe.parallel.moe_ep_size > 1:
        layer += _OTHERS
    layer += word in _STATIC
    if word == "w8a8_dynamic" and shapes.family == "qwen2_5_vl":
        layer += 1  # the bias behind q, k and v
    if word == "w8a8sc":
        layer += _PARTS - 2 * bool(shapes.num_experts)
    return KernelCounts(layer, fixed + (word in _STATIC))


def decode_kernels(recipe: Recipe, shapes: ModelShapes) -> int:
    """Of a decode step in the recipe's exe_mode."""
    if recipe.model.device not in NPUS:
        return 0
    if recipe.model.exe_mode in GRAPH_MODES:
        return counts_in_graph(recipe, shapes).total(shapes.num_layers)
    return counts_eager(recipe, shapes).total(shapes.num_layers)


def prefill_kernels(recipe: Recipe, shapes: ModelShapes, tokens: int, has_visual: bool) -> int:
    """Of an eager step of so many new tokens."""
    if recipe.model.device not in NPUS:
        return 0
    kernels = counts_eager(recipe, shapes).total(shapes.num_layers)
    if tokens > decode_tokens(recipe):
        kernels -= (shapes.num_layers - 1) * _fused_sums(recipe, shapes)
        if recipe.model.quantization == "w8a8_mix" and recipe.model.soc == _DUO and shapes.family != "qwen2_5_vl":
            kernels -= shapes.num_layers  # by a scale for every row, which its products find themselves
    if shapes.num_experts and recipe.model.soc == _DUO:
        gated = tokens * _replicas(recipe)
        if gated > _GATE_ROWS:  # in pieces, put together again; the last layer has the sampled tokens alone
            kernels += (shapes.num_layers - 1) * (-(-gated // _GATE_ROWS) + 1)
    return kernels + (1 + min(shapes.vision.num_taps, shapes.num_layers) if has_visual else 0)


def vision_kernels(recipe: Recipe, shapes: ModelShapes) -> int:
    """Of one pass of the encoder."""
    if recipe.model.device not in NPUS:
        return 0
    fixed = 19 if shapes.family == "qwen2_5_vl" else 35
    if _splits_vision(recipe) and not _fuses(recipe):
        fixed += 1 + shapes.vision.num_taps
    return shapes.vision.depth * block_kernels(recipe, shapes) + fixed


def block_kernels(recipe: Recipe, shapes: ModelShapes) -> int:
    """Of one vision block, called eagerly."""
    word, is_duo, v = recipe.model.quantization, recipe.model.soc == _DUO, shapes.vision
    degree = recipe.attn_tp_size if _splits_vision(recipe) else 1
    inner, is_gated = v.intermediate_size // degree, shapes.family == "qwen2_5_vl"
    block = _BLOCK + (_DUO_ATTENTION if is_duo else 0) + (2 if degree > 1 else 0)
    if degree > 1 and _fuses(recipe):
        block -= {"none": 2, "wint8": 2, "w8a8_dynamic": 0, "w8a16": 0}.get(word, 1)
    if is_gated:
        block += recipe.model.dtype == "float16"  # values are kept in range
        block += is_duo and 2 * inner % _SWIGLU_COLUMNS != 0  # the activation in two
    if word in _STATIC:
        return block + 3
    if word == "w8a8_dynamic":
        if is_duo:  # its product quantizes by itself, and adds no bias
            return block + 4 + (inner % _TILE != 0)
        return block + (3 if is_gated else 4)
    return block


def _sums(recipe: Recipe, shapes: ModelShapes) -> int:
    """Of a layer, over ranks: attention's, and the MLP's or the experts'."""
    is_summed = (recipe.parallel.world_size if shapes.num_experts else recipe.attn_tp_size) > 1
    return (recipe.attn_tp_size > 1) + is_summed


def _fuses(recipe: Recipe) -> bool:
    return recipe.model.soc == _FUSED_CHIP and recipe.attn_tp_size in _FUSED_RANKS


def _fused_sums(recipe: Recipe, shapes: ModelShapes) -> int:
    """Sums of a layer that are one kernel with their product, of more rows than a decode step has: float ones."""
    if not _fuses(recipe):
        return 0
    if recipe.model.quantization == "none":
        return 1 if shapes.num_experts else 2
    return int(recipe.model.quantization in _STATIC and not shapes.num_experts)  # down_proj stays float


def _replicas(recipe: Recipe) -> int:
    return recipe.parallel.world_size // recipe.attn_tp_size


def _splits_vision(recipe: Recipe) -> bool:
    return recipe.parallel.vision_parallel == "tp" and recipe.attn_tp_size > 1
