"""Decode steps as graphs, by torchair: GE graphs, compiled whole; or captured ACL graphs, replayed.

Knows no model: a module's method goes in, a callable of the same tensors comes out.
"""

import functools
import logging
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch_npu  # noqa: F401  (its ops are named below)
import torchair
from torch import Tensor

# Told for every graph and collective: that frozen weights must stay where they are (they do), and what torchair itself
# should call otherwise. torchair puts its own filters in front of ours, so they are left out of the log instead.
_KNOWN_WARNINGS = ("When enable frozen_parameter", "`_get_pg_default_device` will", "Multiple backends are registered")


def _is_news(record: logging.LogRecord) -> bool:
    return not any(message in record.getMessage() for message in _KNOWN_WARNINGS)


def version() -> str:
    """torchair's. It comes inside torch_npu, and most releases give it none of its own."""
    return str(getattr(torchair, "__version__", "part of torch_npu"))


def configure(config: Any) -> None:
    """The options of a GE decode graph, on torchair's CompilerConfig; and the converters that torchair lacks."""
    _register_converters()
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addFilter(_is_news)
    config.mode = "max-autotune"
    # Weights are constants of the graph: they are laid out once, and no step passes them in.
    config.experimental_config.frozen_parameter = True
    # Static shapes: tiling is computed when the graph is compiled, not at every step.
    config.experimental_config.tiling_schedule_optimize = True


@functools.cache
def _register_converters() -> None:
    """npu_add_rms_norm_quant: torchair ships no converter, CANN has the operator (AddRmsNormQuant).

    beta is an input of it from CANN 8.3 on: it is named only where there is one.
    """
    ge = torchair.ge

    @torchair.register_fx_node_ge_converter(torch.ops.npu.npu_add_rms_norm_quant.default)
    def convert(
        x1: Any, x2: Any, gamma: Any, scales1: Any, zero_points1: Any = None, beta: Any = None, scales2: Any = None,
        zero_points2: Any = None, axis: int = -1, epsilon: float = 1e-6, div_mode: bool = True,
        dst_type: int | None = None, meta_outputs: Any = None,
    ) -> Any:  # fmt: skip
        tensors = {
            "x1": x1, "x2": x2, "gamma": gamma, "scales1": scales1, "scales2": scales2, "zero_points1": zero_points1,
            "zero_points2": zero_points2,
        }  # fmt: skip
        return ge.custom_op(
            "AddRmsNormQuant",
            inputs=tensors | ({} if beta is None else {"beta": beta}),
            outputs=["y1", "y2", "x"],
            attrs={
                "axis": ge.attr.Int(axis),
                "epsilon": ge.attr.Float(epsilon),
                "div_mode": ge.attr.Bool(div_mode),
            },
        )


def ge_graph(decode: Callable[..., Tensor], folder: Path) -> Callable[..., Tensor]:
    """`decode` with lengths as a tensor, as a GE graph; the compilation is kept in `folder`."""
    config = torchair.CompilerConfig()
    configure(config)
    compiled = torchair.inference.cache_compile(
        _named(decode, folder), config=config, dynamic=False, cache_dir=str(folder), ge_cache=True
    )

    def run(*tensors: Any) -> Tensor:
        *arguments, _ = tensors
        return _explained(compiled, arguments)

    return run


def acl_graph(decode: Callable[..., Tensor], folder: Path) -> Callable[..., Tensor]:
    """The same captured as an ACL graph: lengths are numbers on the host that every replay updates."""
    config = torchair.CompilerConfig()
    config.mode = "npugraph_ex"
    backend = torchair.get_npu_backend(compiler_config=config)
    # Numbers must stay symbols, else every length would be a graph of its own; tensors have one shape.
    compiled = torch.compile(_named(decode, folder), backend=backend, fullgraph=True, dynamic=True)

    def run(token_ids: Tensor, positions: Tensor, slots: Tensor, _: Tensor, *rest: Any) -> Tensor:
        block_table, q_outs, lengths = rest
        for tensor in (token_ids, positions, slots, block_table, *q_outs):
            torch._dynamo.mark_static(tensor)
        return _explained(compiled, [token_ids, positions, slots, lengths, block_table, q_outs])

    return run


def _named(method: Callable[..., Tensor], folder: Path) -> Callable[..., Tensor]:
    """A copy under a name of its own, which no graph of another size, nor of another model in the process, has: by a
    method's name and code torch.compile knows what it has compiled, and torchair what is to be kept."""
    function, name = method.__func__, "_".join((folder.name, *folder.parts[-3:-1]))  # the key's folder, the rank's
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    return types.MethodType(copy, method.__self__)


def _explained(compiled: Callable[..., Tensor], arguments: Sequence[Any]) -> Tensor:
    """RuntimeError for whatever the compiler stack raises: its exceptions have no common parent."""
    try:
        return compiled(*arguments)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(text[:600]) from error
