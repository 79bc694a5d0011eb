"""Run by test_two_ranks.py: two emulating processes, and the product fused with an all-reduce between them."""

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(rank: int, port: int) -> None:
    from emulator.activate import activate

    activate("atlas_800i_a2")
    import torch_npu

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    x, w = torch.full((2, 4), rank + 1.0, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16)
    y = torch_npu.npu_mm_all_reduce_base(x, w, dist.group.WORLD.group_name)
    assert torch.equal(y, torch.full((2, 3), 12.0, dtype=torch.bfloat16)), y
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, args=(int(sys.argv[1]),), nprocs=2)
