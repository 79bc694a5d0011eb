"""Where a benchmark ran, as far as its figures depend on it: chip, cores, memory, versions. No names of hosts."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from executor.host.cpu import parse_cpuinfo
from executor.host.env import code_digest
from executor.host.limits import host_cores
from executor.recipe.schema import Recipe

PACKAGES = ("torch", "transformers", "numpy", "torch_npu")


def machine(recipe: Recipe, is_remote: bool = False) -> dict[str, Any]:
    """Of a settled recipe. `is_remote`: what is measured runs elsewhere, and this is where the requests come from."""
    try:
        cpu = parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        cpu = None
    here = {"cpu": cpu.name if cpu else platform.machine(), "cores": host_cores()}
    if is_remote:
        return {"is_remote": True, **here}
    model = recipe.model
    instructions = {"cpu_isa": model.cpu_isa, "vectors": cpu.vectors if cpu else ""} if model.device == "cpu" else {}
    return {"device": model.device, "soc": model.soc, **here, **instructions, "ranks": recipe.parallel.world_size}


def versions() -> dict[str, str]:
    """Of Python, of the packages that compute, and a digest of this project's own code."""
    found = {"python": platform.python_version(), "code": code_digest()[:16]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
