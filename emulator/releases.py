"""Which torch_npu releases have which op in which form, and whether a call fits an older or newer form.

Facts: `data/op_versions.csv` (same, other, no, named per release), `data/op_schema_history.txt` (the forms of the
ops whose schema changed) and `data/op_schemas.txt` (2.13.0's). Read from the wheels' own binaries.
"""

import csv
import functools
from typing import Any

import torch

from emulator.chips import DATA
from emulator.record import Call

CURRENT = "2.13.0"
# The releases that the NPU backend supports, oldest and newest, and one from between.
SUPPORTED = ("2.7.1.post11", "2.8.0.post5", "2.14.0")


def forms(op: str, release: str) -> list[str]:
    """The schemas of `op` (bare name, every overload) in `release`; empty where the release lacks it."""
    state = _versions().get(op, {}).get(release, "no")
    if state == "no":
        return []
    changed = _history().get(op, {}).get(release)
    if changed is not None:
        return [] if changed == "-" else [changed]
    return _current().get(op, [])


def misfit(call: Call, release: str) -> str:
    """Empty where `call` binds to `release`'s form of the op, else what does not fit.

    torchair's own forms (air) are not on record and pass.
    """
    if call.op.startswith("air::"):
        return ""
    state = _versions().get(call.bare, {}).get(release)
    known = forms(call.bare, release)
    if not known:
        return f"{call.bare} is not in torch_npu {release}"
    if state == "other" and call.bare not in _history():
        return f"{call.bare} has another form in torch_npu {release}, which is not on record"
    reasons = [_does_not_bind(torch._C.parse_schema(form), call) for form in known]
    return "" if "" in reasons else f"torch_npu {release}: {call.bare} {reasons[0]}"


def _does_not_bind(schema: Any, call: Call) -> str:
    positional = [a for a in schema.arguments if not a.kwarg_only]
    if len(call.args) > len(positional):
        return f"takes {len(positional)} positional arguments, {len(call.args)} were given"
    names = [a.name for a in schema.arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    for name in given:
        if name not in names:
            return f"has no argument {name}"
    for argument in schema.arguments:
        if argument.name not in given and not argument.has_default_value():
            return f"needs the argument {argument.name}"
        if argument.name in given and not _fits(given[argument.name], str(argument.type)):
            return f"wants {argument.type} for {argument.name}, {type(given[argument.name]).__name__} was given"
    return ""


def _fits(value: Any, kind: str) -> bool:
    """Whether a value can be given where a schema says `kind`; only what tells the forms apart is looked at."""
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[len("Optional[") : -1])
    if kind == "Tensor":
        return isinstance(value, torch.Tensor)
    if kind.startswith("List["):
        return isinstance(value, list | tuple) and all(_fits(v, kind[len("List[") : -1]) for v in value)
    wanted = {
        "int": (int, torch.SymInt, torch.dtype),
        "SymInt": (int, torch.SymInt),
        "float": (int, float),
        "str": (str,),
    }
    return kind not in wanted or isinstance(value, wanted[kind])


@functools.cache
def _versions() -> dict[str, dict[str, str]]:
    with (DATA / "op_versions.csv").open(newline="") as file:
        return {row.pop("op"): row for row in csv.DictReader(file)}


@functools.cache
def _history() -> dict[str, dict[str, str]]:
    """op -> release -> schema, for the ops whose schema changed; '-' where the release lacks it."""
    found: dict[str, dict[str, str]] = {}
    op = ""
    for line in (DATA / "op_schema_history.txt").read_text().splitlines():
        if line.startswith("# npu_"):
            op = line[2:].strip()
            found[op] = {}
        elif op and ": " in line and not line.startswith("#"):
            releases, _, schema = line.partition(": ")
            for release in releases.split(","):
                found[op][release.strip()] = schema.strip() if schema.strip() == "-" else f"npu::{schema.strip()}"
    return found


@functools.cache
def _current() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DATA / "op_schemas.txt").read_text().splitlines():
        if "(" in line:
            name = line.partition("(")[0].partition("::")[2].partition(".")[0]
            found.setdefault(name, []).append(line.strip())
    return found
