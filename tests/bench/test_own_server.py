"""The recipe's own server: started by bench, measured, and gone whatever ends bench."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from executor.bench.own_server import OwnServer, own_server
from executor.errors import UserError
from executor.recipe.schema import load_recipe
from tests.reference import REPO

QUICK = "config/quickstart.yaml"
LIMIT_S = 120
ASKED = ("data_config.dataset=random", "data_config.random_tokens=60", "generation_config.max_new_tokens=8")


def command(folder: Path, *overrides: str) -> list[str]:
    words = [*ASKED, f"model_config.output_path={folder}", *overrides]
    return [sys.executable, "-m", "executor", QUICK, "bench", "serve", "--set", *words]


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_there(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition) -> None:
    limit_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit_s
        time.sleep(0.05)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_it_is_started_measured_and_ended(tmp_path, ranks):
    words = ("data_config.limit=4", "bench_config.repetitions=1", f"parallel_config.world_size={ranks}")
    done = subprocess.run(command(tmp_path, *words), cwd=REPO, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert (document["requests"], document["failed"], document["input_tokens"]) == (4, 0, 240)
    assert 0 < document["startup"]["weights_s"] < document["startup"]["first_token_s"] < LIMIT_S
    assert document["peak_memory_bytes"] > ranks * 50 * 2**20
    url = re.search(r"starting the recipe's server at (http://\S+)", done.stderr)[1]
    assert subprocess.run(["curl", "-s", f"{url}/health"], capture_output=True).returncode != 0


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGINT, 130), (signal.SIGKILL, -9), pytest.param(signal.SIGTERM, -15, marks=pytest.mark.long)],
)
def test_it_ends_with_bench(tmp_path, number, status):
    """In the middle of a load that would take minutes."""
    words = ("data_config.limit=100000", "bench_config.concurrencies=2")
    with subprocess.Popen(
        command(tmp_path, *words), cwd=REPO, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as bench:
        try:
            seen = next(line for line in bench.stderr if "the server answers after" in line)
            assert seen
            (server,) = children(bench.pid)
            bench.send_signal(number)
            stdout, stderr = bench.communicate(timeout=LIMIT_S)
        finally:
            bench.kill()
    wait_for(lambda: not is_there(server))
    assert bench.returncode == status, stderr[-3000:]
    if number == signal.SIGINT:
        assert json.loads(stdout.strip().splitlines()[-1]) == {
            "command": "bench",
            "error": "interrupted: before anything was measured",
        }


def test_a_mistake_in_the_recipe_is_told_as_serve_tells_it():
    recipe = load_recipe(REPO / QUICK, ["scheduler_config.max_model_len=999999"])
    words = "the recipe's server: scheduler_config.max_model_len: got 999999"
    with own_server(recipe) as server, pytest.raises(UserError, match=words):
        asyncio.run(asyncio.wait_for(server.ready(), LIMIT_S))


def test_a_server_that_dies_is_an_error_with_its_last_words():
    recipe = load_recipe(REPO / QUICK)
    with own_server(recipe) as server:
        assert isinstance(server, OwnServer)
        server.check()
        os.kill(server._job.pid, signal.SIGKILL)
        wait_for(lambda: server._job.end() is not None)
        with pytest.raises(RuntimeError, match=r"the recipe's server has ended \(was killed by signal 9\)"):
            server.check()


def test_a_port_of_its_own_and_the_recipe_as_it_is():
    recipe = load_recipe(REPO / QUICK, ["server_config.host=0.0.0.0", "server_config.api_key=secret"])
    with own_server(recipe) as server:
        assert re.fullmatch(r"http://127.0.0.1:\d+", server.url) and not server.url.endswith(":8000")
        assert server.endpoint.api_key == "secret"
        folder = server.log.parent
        told = json.loads((folder / "server.yaml").read_text())
        assert folder.stat().st_mode & 0o077 == 0  # the key stands in it
        assert told["server_config"]["host"] == "0.0.0.0"
        assert told["model_config"]["model_path"] == recipe.model.model_path
    assert not folder.exists()
    with pytest.raises(UserError, match="cannot be listened on"):
        OwnServer(recipe.replace(server={"host": "192.0.2.1"}), folder)
