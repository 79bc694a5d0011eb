"""Ranks that another launcher has made: torchrun's variables as they are, Slurm's translated to them.

Pure functions of the environment. In a rank's environment are RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT; everything after this module looks at those alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from executor.errors import UserError
from executor.host.nodes import PORTS

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of NAMES for this process, {} where no launcher started it. UserError for half of a launcher."""
    if "RANK" in environment:
        missing = [name for name in NAMES if not environment.get(name)]
        if missing:
            raise UserError(
                f"RANK is set, but not {', '.join(missing)}: a launcher (torchrun, srun) sets them all; to let "
                "infer.sh start the ranks, unset RANK"
            )
        wrong = [name for name in NAMES if name != "MASTER_ADDR" and not environment[name].isdigit()]
        if wrong:
            shown = ", ".join(f"{name}={environment[name]}" for name in wrong)
            raise UserError(f"{shown}: whole numbers are needed; a launcher (torchrun, srun) sets them")
        return {name: environment[name] for name in NAMES}
    # SLURM_PROCID and SLURM_NTASKS are there in the batch script too, which runs once and is no rank; srun alone sets
    # the step's number of tasks.
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in environment:
        return _from_slurm(environment)
    return {}


def check_world(variables: Mapping[str, str], world_size: int) -> None:
    """UserError where the launcher's world is not the recipe's."""
    started = int(variables["WORLD_SIZE"])
    if started != world_size:
        raise UserError(
            f"parallel_config.world_size: the recipe has {world_size} rank(s), the launcher started {started}; start "
            f"{world_size}, or use --set parallel_config.world_size={started}"
        )
    if int(variables["RANK"]) >= started:
        raise UserError(f"RANK={variables['RANK']} is not below WORLD_SIZE={started}")


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    world_size = int(environment["SLURM_STEP_NUM_TASKS"])
    master = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    port = PORTS[int(environment.get("SLURM_JOB_ID", "0") or 0) % len(PORTS)]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_tasks_here(environment, world_size)),
        "MASTER_ADDR": master,
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list: `node[03-05,9],other` is node03. UserError for what is more intricate."""
    found = re.fullmatch(r"([^,\[\]]+)(?:\[(\d+)[-,\d]*\])?(?:,.*)?", nodelist.strip())
    if not found:
        raise UserError(
            f"SLURM_STEP_NODELIST={nodelist}: which node rank 0 runs on cannot be read from it; set MASTER_ADDR, e.g. "
            'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
        )
    return found[1] + (found[2] or "")


def tasks_per_node(text: str) -> list[int]:
    """`4(x2),3` as [4, 4, 3]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _tasks_here(environment: Mapping[str, str], world_size: int) -> int:
    listed = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    counts, node = tasks_per_node(listed), int(environment.get("SLURM_NODEID", "0") or 0)
    if node < len(counts):
        return counts[node]
    return max(1, world_size // int(environment.get("SLURM_NNODES", "1") or 1))
