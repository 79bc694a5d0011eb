"""Two nodes as two network namespaces with a cable between them, `infer.sh` typed on each.

Needs root; skipped with the reason where namespaces cannot be made.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from executor.host.env import REPO_ROOT as REPO
from tests.cases import mostly_long
from tests.launch.jobs import CONFIG, Job

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SET_ENV = "executor/scripts/set_env.sh"
LARGE = ("*.safetensors", "media")  # which the probe does without


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


@pytest.fixture(scope="module")
def nodes():
    """The names of two namespaces that reach each other."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the ip command")
    names = [f"recipe{os.getpid()}n{node}" for node in range(2)]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    except RuntimeError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A copy of the repository for each node, with the same set_env.sh."""
    folder = tmp_path_factory.mktemp("nodes")
    return [copy_of_repository(folder / f"tree{node}", *LARGE) for node in range(2)]


@pytest.fixture
def own_trees(tmp_path):
    """Copies that a test may change."""
    return [copy_of_repository(tmp_path / f"tree{node}", *LARGE) for node in range(2)]


def copy_of_repository(folder: Path, *left_out: str) -> Path:
    # Bytecode is valid in the copy too, unless Python is just writing it.
    skip = shutil.ignore_patterns("*.pyc.*", *left_out)
    for name in ("executor", "models", "dataset", "emulator", "config", "tests/launch"):
        shutil.copytree(REPO / name, folder / name, ignore=skip)
    for name in ("infer.sh", "requirements.txt", "tests/__init__.py"):
        shutil.copy(REPO / name, folder / name)
    return write_ips(folder, ADDRESSES)


def write_ips(tree: Path, addresses) -> Path:
    script = tree / SET_ENV
    listed = " ".join(f"'{address}'" for address in addresses)
    script.write_text(re.sub(r"(?m)^IPs=.*$", f"IPs=({listed})", script.read_text()))
    return tree


def start_both(job, nodes, trees, *settings, prompt="", on_second=(), world_size=2, run="probe"):
    """`bash infer.sh` on each node, one rank a node unless told otherwise."""
    for node, (name, tree) in enumerate(zip(nodes, trees, strict=True)):
        job.start(
            f"parallel_config.world_size={world_size}",
            f"model_config.output_path={job.folder / 'output'}",  # a folder that the nodes share
            *settings,
            *(on_second if node else ()),
            prompt=prompt,
            run=run,
            prefix=["ip", "netns", "exec", name],
            command=["bash", str(tree / "infer.sh")],
            cwd=tree,
            PYTHONPATH=None,
            RECIPE_NODES=None,
        )
    return job


def test_one_document_from_two_nodes(job, nodes, trees):
    start_both(job, nodes, trees, world_size=4)
    assert job.wait() == [0, 0], job.err(0) + job.err(1)
    assert job.document(0)["sum"] == 10
    assert job.document(1) == {"command": "probe", "node": 1, "ranks": [2, 3], "ok": True}
    assert "stdout of rank 0" in job.out(0) and "stdout" not in job.out(1)
    assert [f"rank {rank} sees 10" in job.log(rank).read_text() for rank in range(4)] == [True] * 4
    assert len({job.log(rank).parent for rank in range(4)}) == 1
    for node, ranks in enumerate(((0, 1), (2, 3))):  # each node has the interface to the other
        assert all(f"rank {rank} has GLOO_SOCKET_IFNAME=cable" in job.log(rank).read_text() for rank in ranks), node


DEGREES = [[], ["parallel_config.attn_tp_size=1", "parallel_config.moe_ep_size=2"]]


@pytest.mark.parametrize("degrees", mostly_long(DEGREES, DEGREES[1:]))  # sums over nodes: the test above
def test_the_answers_of_two_nodes_are_those_of_one(job, nodes, tmp_path, degrees):
    """A model split over the nodes, and one whose replicas share experts: they answer as one process does."""
    whole = [copy_of_repository(tmp_path / f"tree{node}") for node in range(2)]
    for tree in whole:
        shutil.copy(tree / "config" / "quickstart_qwen3_vl_moe.yaml", tree / CONFIG)
    start_both(job, nodes, whole, *degrees, run="generate")
    assert job.wait(120) == [0, 0], job.err(0) + job.err(1)
    alone = Job(tmp_path)
    alone.start(config="config/quickstart_qwen3_vl_moe.yaml", run="generate")
    assert alone.wait(120) == [0], alone.err()
    texts = [[row["text"] for row in document["outputs"]] for document in (job.document(0), alone.document())]
    assert texts[0] == texts[1] and len(texts[0]) == 6
    assert job.document(1) == {"command": "generate", "node": 1, "ranks": [1], "ok": True}


def test_torchrun_on_two_nodes(job, nodes, trees):
    """As a user starts it there, with gloo's interface named: torchrun looks for none."""
    for node, (name, tree) in enumerate(zip(nodes, trees, strict=True)):
        place = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2"]
        place += ["--master-addr", ADDRESSES[0], "--master-port", "29555"]
        job.start(
            "parallel_config.world_size=4",
            f"model_config.output_path={job.folder / 'output'}",
            prefix=["ip", "netns", "exec", name],
            command=[sys.executable, "-m", "torch.distributed.run", *place, "-m", "executor"],
            cwd=tree,
            GLOO_SOCKET_IFNAME="cable",
        )
    assert job.wait() == [0, 0], job.err(0) + job.err(1)
    assert job.document(0)["sum"] == 10
    assert "{" not in job.out(1), "only rank 0 writes a document"


def test_a_killed_rank_ends_both_nodes(job, nodes, trees):
    start_both(job, nodes, trees, prompt="1:sleep")
    victim = job.sleeper(1)
    at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert job.ends(at) == [1, 1]
    for node in range(2):
        assert "rank 1 on node 10.77.0.2 was killed by SIGKILL" in job.document(node)["error"]
        assert "rank_01.log on node 10.77.0.2" in job.err(node)
        assert f"| rank 1 is process {victim}" in job.err(node)
    assert job.document(1)["ok"] is False


def test_a_killed_launcher_ends_both_nodes(job, nodes, trees):
    start_both(job, nodes, trees, prompt="0:sleep")
    job.sleeper(0)
    at = time.monotonic()
    job.launchers[1].kill()
    assert job.ends(at)[0] == 1
    assert "node 10.77.0.2" in job.document(0)["error"] or "Connection closed" in job.document(0)["error"]


def test_a_killed_master_ends_both_nodes(job, nodes, trees):
    start_both(job, nodes, trees, prompt="1:sleep")
    job.sleeper(1)
    at = time.monotonic()
    job.launchers[0].kill()
    assert job.ends(at)[1] == 1
    assert "error" in job.document(1)


def test_a_cable_that_is_pulled_ends_both_nodes(job, nodes, trees):
    start_both(job, nodes, trees, prompt="0:sleep 1:sleep")
    job.sleeper(0), job.sleeper(1)
    at = time.monotonic()
    ip("-n", nodes[0], "link", "set", "cable", "down")
    try:
        assert job.ends(at) == [1, 1]
    finally:
        ip("-n", nodes[0], "link", "set", "cable", "up")
    assert "node 10.77.0.2: no sign of life" in job.document(0)["error"]
    assert "node 10.77.0.2 has lost the master 10.77.0.1" in job.document(1)["error"]


def test_ctrl_c_on_one_node_ends_both(job, nodes, trees):
    start_both(job, nodes, trees, prompt="0:sleep")
    job.sleeper(0)
    at = time.monotonic()
    job.launchers[1].send_signal(signal.SIGINT)
    assert job.ends(at) == [1, 130]
    assert job.document(0)["error"] == "interrupted by SIGINT on node 10.77.0.2"


def refused(job, words: str) -> None:
    """Every node ends with status 2 and says the same, in one line, before any rank has started."""
    assert job.wait() == [2, 2], job.err(0) + job.err(1)
    for node in range(len(job.launchers)):
        assert words in job.document(node)["error"]
        assert job.err(node).count("error: ") == 1
    assert not list(job.folder.glob("output/logs/*/*"))


def test_another_recipe_on_one_node(job, nodes, trees):
    start_both(job, nodes, trees, on_second=["generation_config.seed=3"])
    refused(job, "node 10.77.0.2 has another recipe than node 10.77.0.1: generation_config.seed is 3 there, None on")


def test_other_code_on_one_node(job, nodes, own_trees):
    with (own_trees[1] / "executor" / "errors.py").open("a") as file:
        file.write("# changed\n")
    start_both(job, nodes, own_trees)
    refused(job, "node 10.77.0.2 runs other code than node 10.77.0.1")


def test_a_machine_that_is_not_in_ips(job, nodes, own_trees):
    for tree in own_trees:
        write_ips(tree, (ADDRESSES[0], "10.77.0.9"))
    start_both(job, nodes, own_trees)
    refused(job, "(10.77.0.2) is not among the 2 nodes of the job (10.77.0.1, 10.77.0.9)")


def test_addresses_in_another_order_on_one_node(job, nodes, own_trees):
    """Both take themselves for the master."""
    write_ips(own_trees[1], ADDRESSES[::-1])
    start_both(job, nodes, own_trees)
    refused(job, "the nodes do not agree on the job: ")
