"""For scripts that drive a client by its command: no client itself."""

import os
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 600
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(name: str, *words: object, folder: Path, environment: dict[str, str] | None = None) -> str:
    """stdout of a command of this interpreter's environment, run in `folder`, without the web. Asserts that it ends
    with 0."""
    command = [str(Path(sys.executable).parent / name), *map(str, words)]
    settings = {**os.environ, **OFFLINE, **(environment or {})}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def assert_plausible(ttft_s: float, latency_s: float, tpot_s: float, num_tokens: int) -> None:
    """The first token came before the last, and the time after the first is that of the other tokens.

    A quarter, and 20 ms, are left for what a client counts of the end of a stream.
    """
    assert 0 < ttft_s < latency_s, (ttft_s, latency_s)
    rest_s = latency_s - ttft_s
    assert abs(rest_s - tpot_s * (num_tokens - 1)) <= 0.25 * rest_s + 0.02, (ttft_s, latency_s, tpot_s, num_tokens)
