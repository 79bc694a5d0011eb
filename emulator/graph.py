"""A function as the GE graph that torchair makes of it: the real conversion, without CANN.

`convert` runs torch.compile with torchair's backend in export mode on tensors of any device (meta tensors cost
nothing, so true sizes do neither) and keeps the graph, a protobuf. It proves that a step can be converted and what
nodes it has, not that CANN compiles it. Counting follows one rule: see `Graph.kernels`.
"""

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from emulator import chips
from emulator.garbage import without_collection

# Nodes that are no kernel: inputs, weights, and changes of shape that move nothing.
NOT_KERNELS = frozenset(
    ("Data", "RefData", "Const", "ConstPlaceHolder", "Variable")
    + ("Reshape", "Identity", "Squeeze", "Unsqueeze", "NetOutput")
)
_EXECUTING = re.compile(
    r"call_function\[target=torch\.ops\.(?P<target>[\w.]+)\](?:\(args = \((?P<wrapped>(?:npu|atb|air)\.[\w.]+))?"
)
# CANN's operators that torchair has no function for and asks CANN's registry about: inputs, outputs and attributes by
# name, as CANN's own headers declare them (op_proto/inc, REG_OP).
OPERATORS = {
    "AddRmsNormQuant": (
        ("x1", "x2", "gamma", "scales1", "scales2", "zero_points1", "zero_points2", "beta"),
        ("y1", "y2", "x"),
        ("axis", "epsilon", "div_mode", "dst_type"),
    ),
}
_COLLECTIVES = ("Hcom", "MatmulAllReduce", "AllGatherMatmul", "MatmulReduceScatter", "MoeDistribute")


@dataclass(frozen=True)
class Graph:
    """A converted graph; `proto` is torchair's GraphDef."""

    proto: Any

    @functools.cached_property
    def literal_only(self) -> frozenset[str]:
        """Names of nodes whose inputs are literals, directly or through such nodes: GE folds them when it compiles."""
        found = {op.name for op in self.proto.op if op.type == "Const"}
        grown = True
        while grown:  # one round where nodes stand after their inputs, as they mostly do
            before = len(found)
            for op in self.proto.op:
                sources = [source_of(name) for name in op.input if name and not name.endswith(":-1")]
                if sources and found.issuperset(sources):
                    found.add(op.name)
            grown = len(found) > before
        return frozenset(found)

    @property
    def nodes(self) -> list[Any]:
        """The kernels: every node but inputs, weights, shape changes, the output, and what literals alone decide."""
        return [op for op in self.proto.op if op.type not in NOT_KERNELS and op.name not in self.literal_only]

    @property
    def kernels(self) -> Counter[str]:
        """Kernels by type."""
        return Counter(op.type for op in self.nodes)

    @property
    def collectives(self) -> Counter[str]:
        """Those of the kernels that talk to other ranks, by type."""
        return Counter({t: n for t, n in self.kernels.items() if t.startswith(_COLLECTIVES)})

    @property
    def text(self) -> str:
        """The protobuf's text form."""
        return str(self.proto)

    def save(self, path: Path) -> None:
        """Write the text form to `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text)


def install() -> None:
    """Let graphs that torchair compiles run on CPU tensors: converted to GE for real, then executed op by op.

    Generating the code that a chip would keep on disk is tried as well; nothing is kept.
    """
    from torchair._ge_concrete_graph import compat_ir, fx2ge_converter
    from torchair.core import _torchair

    concrete = fx2ge_converter.GeConcreteGraph
    export, generate = concrete.__call__, concrete.codegen
    registered = _torchair.get_registered_ir_def
    _torchair.get_registered_ir_def = lambda name: (
        ("SUCCESS", *({key: "" for key in keys} for keys in OPERATORS[name])) if name in OPERATORS else registered(name)
    )
    fx2ge_converter.initialize_graph_engine = lambda *_, **__: None
    compat_ir.is_cann_compat = lambda *_, **__: ""

    def run(self: Any, *args: Any) -> Any:
        return export(self, *args) if self.config.export.export_mode else self.fx_graph(*args)

    def codegen(self: Any, *args: Any, **kwargs: Any) -> None:
        generate(self, *args, **kwargs)

    concrete.__call__, concrete.codegen = run, codegen


def source_of(name: str) -> str:
    """The node that an input `node:output` comes from (output -1 is an order, no data)."""
    return name.rpartition(":")[0] or name


def convert(
    function: Callable[..., Any], *args: Any, configure: Callable[[Any], None] | None = None, **kwargs: Any
) -> Graph:
    """The GE graph of `function(*args, **kwargs)`, static shapes, graph breaks refused.

    `configure` may change torchair's CompilerConfig, for the options that the backend runs with. RuntimeError names
    what torchair could not convert.
    """
    chips.current()  # graphs are converted in an emulating process
    found: list[Any] = []
    with _exporting(found) as done:
        torch._dynamo.reset()
        compiled = torch.compile(function, backend=_backend(configure), fullgraph=True, dynamic=False)
        try:
            with torch.no_grad(), without_collection():
                compiled(*args, **kwargs)
        except done:
            pass
        except Exception as error:
            raise RuntimeError(f"torchair cannot convert this step to a GE graph: {_reason(error)}") from error
        finally:
            torch._dynamo.reset()
    if len(found) != 1:
        raise RuntimeError(f"torchair made {len(found)} graphs of one step, not 1")
    return Graph(found[0])


def per_layer(shorter: Graph, longer: Graph) -> Counter[str]:
    """Kernels by type that one more layer adds: `longer` has one layer more than `shorter`."""
    more = Counter(longer.kernels)
    more.subtract(shorter.kernels)
    return Counter({kind: count for kind, count in more.items() if count})


@contextlib.contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """A process group of `world_size` ranks that exist in name only, so that collectives can be traced."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("torch.distributed is already initialised: trace fake ranks in a process of its own")
    dist.init_process_group("fake", store=FakeStore(), world_size=world_size, rank=rank)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _backend(configure: Callable[[Any], None] | None) -> Callable[..., Any]:
    import torchair

    config = torchair.CompilerConfig()
    if configure is not None:
        configure(config)
    config.export.export_mode = True
    config.export.weight_name = {}
    config.experimental_config.enable_ref_data = True
    return torchair.get_npu_backend(compiler_config=config)


@contextlib.contextmanager
def _exporting(found: list[Any]) -> Iterator[type[Exception]]:
    """Put exported graphs into `found` instead of files; gives the exception that ends an export."""
    from torchair._ge_concrete_graph import fx2ge_converter

    concrete = fx2ge_converter.GeConcreteGraph
    before = concrete.export
    concrete.export = lambda self, inputs: found.append(self.graph)
    try:
        yield fx2ge_converter.ExportSuccess
    finally:
        concrete.export = before


def _reason(error: BaseException) -> str:
    """What matters of an exception out of the compiler stack: the op that has no converter, or its first lines."""
    inner = getattr(error, "inner_exception", None) or error
    text = str(inner) if len(str(inner)) > 60 else f"{type(inner).__name__}: {error}"
    node = _EXECUTING.search(text)
    if "GetRegisteredIrDef" in text and node:
        op = node["wrapped"] or node["target"]
        return f"{op} has no converter in torchair (only where CANN is installed may one be generated for it)"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3])[:600] or type(inner).__name__
