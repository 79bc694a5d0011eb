"""A command for tests of the launcher: `probe=tests.launch.probe` in RECIPE_COMMANDS.

All ranks meet over gloo and add up their numbers; what else happens is told by data_config.prompt:
`RANK:ACTION` words (every rank: *), where the action is user, raise, print, child or sleep.
"""

import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from executor.checkpoint.folder import find_checkpoint
from executor.errors import UserError
from executor.host.env import rank_place


def check(recipe):
    """The recipe is settled as it is; the node must have the weights."""
    find_checkpoint(recipe.model.model_path, recipe.model.hub)
    return recipe


def run(recipe):
    place = rank_place()
    dist.init_process_group("gloo", init_method="env://")
    value = torch.ones(1) * (place.rank + 1)
    dist.all_reduce(value)
    print(f"rank {place.rank} sees {value.item():.0f}", file=sys.stderr)
    told = ", ".join(f"{name}={os.environ.get(name)}" for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"))
    print(f"rank {place.rank} has {told}", file=sys.stderr, flush=True)
    print(f"stdout of rank {place.rank}", flush=True)

    for word in (recipe.data.prompt or "").split():
        who, action = word.split(":")
        if who not in ("*", str(place.rank)):
            continue
        if action == "user":
            raise UserError("mend this")
        if action == "raise":
            raise RuntimeError("the disk is full")
        if action == "print":  # until nobody reads it
            while True:
                print("more", flush=True)
                time.sleep(0.01)
        if action == "child":
            subprocess.Popen(["sleep", "1000"])
        if action == "sleep":
            print(f"rank {place.rank} is process {os.getpid()}", file=sys.stderr, flush=True)
            while True:
                time.sleep(0.1)
    if "sleep" in (recipe.data.prompt or ""):
        dist.barrier()  # the others wait in a collective, as in real life
    dist.barrier()
    dist.destroy_process_group()
    document = {"command": "probe", "sum": value.item(), "world_size": place.world_size}
    return document, 0
