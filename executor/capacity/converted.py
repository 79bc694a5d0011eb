"""The cost of a decode step from its converted GE graph: what the graph itself says, where torch_npu is installed.

From the nodes with their shapes: kernels, collectives, operations of products by the shapes of their weights, and the
bytes of weights that products read. From the recipe's arithmetic (executor/capacity/costs.py): what no node shows: how
much of the cache is filled, which experts a token needs, what is sent, and activations. Operations of both are equal;
the graph reads at most a percent less: zero offsets that are in a checkpoint's files are in no graph.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from emulator.graph import Graph, source_of
from executor.capacity import products as sizes
from executor.capacity.costs import decode_cost
from executor.capacity.products import TypeOf
from executor.capacity.work import StepCost
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes

_BYTES = {1: 4, 2: 2, 3: 1, 7: 4, 8: 8, 27: 2}  # of GE's types: float32, float16, int8, int32, int64, bfloat16
_INT8, _INT32 = 3, 7
_PRODUCTS = ("MatMul", "MatMulV2", "MatmulAllReduce", "QuantBatchMatmulV3", "WeightQuantBatchMatmulV2")
_GROUPED = ("GroupedMatmul", "GroupedMatmulSwigluQuantV2")
_LINEARS = ("attention_linears", "mlp", "router", "head")
_MOVES_NOTHING = ("Identity", "Reshape", "Bitcast", "Unsqueeze", "Squeeze")
_FOUR_BIT = 8  # weights in an int32


@dataclass(frozen=True)
class GraphCost:
    """What the graph's nodes say of one rank's step. Operations are for one row of each product: `rows` multiply them.

    product_flops, int8_product_flops: two for every element of a linear's weight. grouped_flops: the same of all
    experts here. weight_bytes: of linears, with their scales and biases; grouped_bytes: of all experts here.
    """

    kernels: int
    collectives: int
    product_flops: float
    int8_product_flops: float
    grouped_flops: float
    weight_bytes: float
    grouped_bytes: float


def graph_cost(graph: Graph) -> GraphCost:
    """Read off the nodes. A weight is a graph's input; what only turns its shape or type is followed back to it."""
    nodes = {op.name: op for op in graph.proto.op}
    flops, int8_flops, grouped, held, grouped_held = 0.0, 0.0, 0.0, 0.0, 0.0
    for op in graph.nodes:
        if op.type not in _PRODUCTS + _GROUPED:
            continue
        inputs = list(_constant_inputs(op, nodes))
        weight = max(inputs, key=lambda x: math.prod(x.shape.dim))  # scales and biases are smaller
        elements = math.prod(weight.shape.dim)
        if weight.dtype == _INT32:
            elements *= _FOUR_BIT
        num_bytes = sum(math.prod(x.shape.dim) * _BYTES[x.dtype] for x in inputs)
        if op.type in _GROUPED:
            grouped, grouped_held = grouped + 2.0 * elements, grouped_held + num_bytes
            continue
        held += num_bytes
        if weight.dtype == _INT8 and op.type != "WeightQuantBatchMatmulV2":
            int8_flops += 2.0 * elements
        else:
            flops += 2.0 * elements
    return GraphCost(
        graph.kernels.total(), graph.collectives.total(), flops, int8_flops, grouped, held, grouped_held
    )  # fmt: skip


def _constant_inputs(op: Any, nodes: Mapping[str, Any]) -> Iterator[Any]:
    """The descriptions of what an op takes of the graph's own inputs, through nodes that move nothing."""
    for name in op.input:
        source = nodes.get(source_of(name)) if name else None
        while source is not None and source.type in _MOVES_NOTHING:
            source = nodes.get(source_of(source.input[0]))
        if source is not None and source.type in ("Data", "ConstPlaceHolder"):
            yield source.output_desc[0]


def converted_cost(
    graph: Graph, recipe: Recipe, shapes: ModelShapes, batch: int, context: float, types: TypeOf | None = None
) -> StepCost:
    """The decode step of `batch` rows that was converted, with what its nodes say in place of the count table.

    Raises AssertionError where the graph's products or weights are others than the recipe's arithmetic: one of the two
    would be wrong.
    """
    counted = decode_cost(recipe, shapes, batch, context, types)
    found, wanted = graph_cost(graph), expected_cost(recipe, shapes, types)
    same = (found.product_flops, found.int8_product_flops, found.grouped_flops)
    assert same == (wanted.product_flops, wanted.int8_product_flops, wanted.grouped_flops), f"{found}, {wanted}"
    read = dict.fromkeys(_LINEARS, found.weight_bytes / wanted.weight_bytes)
    if shapes.num_experts:
        read["experts"] = found.grouped_bytes / wanted.grouped_bytes
    parts = {
        name: replace(work, weight_bytes=work.weight_bytes * read.get(name, 1.0))
        for name, work in counted.parts.items()
    }
    return replace(counted, parts=parts, kernels=found.kernels, collectives=found.collectives)


def expected_cost(recipe: Recipe, shapes: ModelShapes, types: TypeOf | None = None) -> GraphCost:
    """What the graph of a decode step must say by the recipe's arithmetic; kernels and collectives for one row."""
    types = types or sizes.type_of(recipe)
    linears = [
        *sizes.attention_products(recipe, shapes, types),
        *sizes.mlp_products(recipe, shapes, types),
        sizes.head(recipe, shapes),
    ]
    grouped, grouped_bytes = 0.0, 0.0
    if shapes.num_experts:
        linears.append(sizes.router(recipe, shapes))
        held = sizes.experts(recipe, shapes, types)
        each = sum(product.num_in * product.num_out for product in held.one)
        grouped = 2.0 * each * held.num_local * held.count
        grouped_bytes = held.weight_bytes * held.count
    ones = [(linear.cost(1), linear.count) for linear in linears]
    step = decode_cost(recipe, shapes, 1, 1, types)
    return GraphCost(
        step.kernels,
        step.collectives,
        sum(work.flops * count for work, count in ones),
        sum(work.int8_flops * count for work, count in ones),
        grouped,
        sum(linear.weight_bytes * linear.count for linear in linears),
        grouped_bytes,
    )
