"""Cases for tests.parallel.ranks, and jobs that run them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from executor.host.env import environment

REPO = Path(__file__).resolve().parents[2]


def case(
    family: str,
    world_size: int = 1,
    *,
    prompt_logprobs: int | None = None,
    num_drafts: int = 0,
    draft: str | None = None,
    overlaps: bool = False,
    **parallel: Any,
) -> dict[str, Any]:
    """A recipe of a tiny model that answers the default questions, and whether their prompts are scored as well.

    `num_drafts`: tokens that are drafted and verified in a step at most, by the tiny model `draft`; None: looked up.
    `overlaps`: steps are queued before the last one's tokens are read, also where the device is the host.
    """
    drafts: dict[str, Any] = {}
    if num_drafts:
        drafts = {"method": "ngram", "num_speculative_tokens": num_drafts, "adaptive": False}
    if draft is not None:
        assert num_drafts, "a draft model makes some"
        drafts |= {"method": "draft", "model_path": f"models/tiny/{draft}"}
    return {
        "speculative_config": drafts,
        "prompt_logprobs": prompt_logprobs,
        "overlaps": overlaps,
        "model_config": {"model_path": f"models/tiny/{family}", "device": "cpu", "dtype": "float32"},
        "parallel_config": {"world_size": world_size, **parallel},
        "scheduler_config": {"block_size": 16, "max_num_seqs": 3, "max_model_len": 512, "max_num_batched_tokens": 96},
        "generation_config": {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 0},
    }


def run_ranks(
    num_ranks: int, cases: list[dict[str, Any]], folder: Path, timeout_s: float = 300
) -> list[dict[str, Any]]:
    """What rank 0 saw of every case, over `num_ranks` processes that torchrun starts."""
    told, out = folder / f"cases_{num_ranks}.json", folder / f"found_{num_ranks}.json"
    told.write_text(json.dumps(cases))
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, "-m", "tests.parallel.ranks", str(told), str(out)]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, cwd=REPO, env=environment() | settings, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(out.read_text())
