#!/usr/bin/env bash
# torch_npu contradicts itself: what two of its docstrings show is refused by the shape checks in the same wheel, those
# that run when a graph is traced.
#
# The example of npu_matmul_compress_dequant has weights of two dimensions and a float32 scale; the check wants one
# dimension and uint64. npu_grouped_matmul_swiglu_quant_v2 is said to have quant_dtype 0 by default and to allow nothing
# else; the default is 1, and 0 is refused. Neither CANN nor an NPU is used and torch_npu is not imported: its schemas
# and checks are read from the wheel's text files and registered with plain PyTorch.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment torch==2.13.0 numpy==2.4.2
# A folder that is not on the module path: torch would load an installed torch_npu by itself.
pip_install --no-deps --target "$folder/wheel" torch_npu==2.13.0
echo "torch_npu==2.13.0 (its text files)"

cat >"$folder/probe.py" <<'PYTHON'
import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

wheel = Path(sys.argv[1]) / "torch_npu"
schemas = (wheel / "csrc/aten/npu_native_functions_by_codegen.yaml").read_text()
checks = ast.parse((wheel / "op_plugin/meta/_meta_registrations.py").read_text())
docstrings = {
    call.args[0].value: call.args[1].value
    for call in ast.walk(ast.parse((wheel / "_op_plugin_docs.py").read_text()))
    if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "_add_torch_npu_docstr"
}
declared, kernels = torch.library.Library("npu", "DEF"), torch.library.Library("npu", "IMPL", "Meta")


class Names:
    """torch_npu's constants by name alone: types that plain PyTorch has not, which nothing here uses."""

    def __getattr__(self, name):
        return name


# The tables and helpers of the checks' file, with plain PyTorch below them.
scope = dict(torch=torch, torch_npu=Names(), ErrCode=Names(), ops_error=lambda code: "")
tables = [node for node in checks.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
helpers = [node for node in checks.body if isinstance(node, ast.FunctionDef) and not node.decorator_list]
exec(compile(ast.Module(tables + helpers, []), "tables", "exec"), scope)


def operator(name):
    """The operator with the wheel's schema and the wheel's check."""
    declared.define(re.search(rf"- func: ({name}\(.*)", schemas)[1])
    function = next(n for n in checks.body if isinstance(n, ast.FunctionDef) and n.name == f"{name}_meta")
    function.decorator_list = []
    exec(compile(ast.Module([function], []), name, "exec"), scope)
    kernels.impl(name, scope[function.name])
    return getattr(torch.ops.npu, name)


def outcome(function, *arguments, **options):
    try:
        result = function(*arguments, **options)
    except RuntimeError as error:
        return "refused: " + str(error).splitlines()[0][:90]
    return f"accepted: {[tuple(r.shape) for r in (result if isinstance(result, tuple) else (result,))]}"


seen = {}
name = "npu_matmul_compress_dequant"
compressed = operator(name)
# Without the imports and the last line, which shows a shape.
lines = [line[4:] for line in docstrings[name].splitlines() if line.startswith(">>> ") and "import" not in line][:-1]
example = dict(torch=torch, torch_npu=SimpleNamespace(**{name: compressed}))
with torch.device("meta"):
    exec("\n".join(lines[:-1]).replace(".npu()", ""), example)
x1, x2, index, bias, scale = (example[key] for key in ("x1", "x2", "compress_index", "bias", "scale"))
seen[f"the example of {name}"] = outcome(exec, lines[-1], example)
seen["  its weights in one dimension"] = outcome(compressed, x1, x2.flatten(), index, bias, scale)
seen["  and its scale as uint64"] = outcome(compressed, x1, x2.flatten(), index, bias, scale.to(torch.uint64))

name = "npu_grouped_matmul_swiglu_quant_v2"
swiglu = operator(name)
documented = re.search(r"int\? quant_dtype=(\d+)", docstrings[name])[1]
default = re.search(r"int\? quant_dtype=(\d+)", re.search(rf"- func: {name}\(.*", schemas)[0])[1]
print(f"{name}: quant_dtype is {documented} by default in the docstring, {default} in the schema")
with torch.device("meta"):
    x, weight = torch.empty(8, 64, dtype=torch.int8), torch.empty(2, 64, 32, dtype=torch.int8)
    weight_scale, x_scale, group_list = torch.empty(2, 32), torch.empty(8), torch.empty(2, dtype=torch.int64)
arguments = (x, [weight], [weight_scale], x_scale, group_list)
seen["int8 operands without quant_dtype"] = outcome(swiglu, *arguments)
seen["int8 operands with quant_dtype=0"] = outcome(swiglu, *arguments, quant_dtype=int(documented))
for what, result in seen.items():
    print(f"{what}: {result}")
found = ["refused", "refused", "accepted", "accepted", "refused"]
sys.exit((documented, default) != ("0", "1") or [result.split(":")[0] for result in seen.values()] != found)
PYTHON

status=0
"$python" "$folder/probe.py" "$folder/wheel" || status=1
[ "$status" = 0 ] && echo "as found: the docstrings' calls are refused"
exit "$status"
