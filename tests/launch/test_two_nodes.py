"""Two nodes as two network namespaces with a cable between them, `infer.sh` typed on each.

Needs root; skipped with the reason where namespaces cannot be made.
"""

import os
import shutil
import signal
import subprocess
import time

import pytest

from executor.env import REPO_ROOT as REPO

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SET_ENV = "executor/scripts/set_env.sh"
TWO = ("parallel_config.world_size=4",)


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


@pytest.fixture
def trees(tmp_path):
    """A copy of the repository for each node, with the same set_env.sh."""
    return [copy_of_repository(tmp_path / f"tree{node}", ADDRESSES) for node in range(2)]


def copy_of_repository(folder, addresses):
    kept = ("executor", "models", "dataset", "config", "tests/launch", "infer.sh")
    skip = shutil.ignore_patterns("*.safetensors", "media", "__pycache__", "*.mp4", "*.png")
    for name in kept:
        source, target = REPO / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=skip)
        else:
            shutil.copy(source, target)
    for name in ("tests/__init__.py",):
        shutil.copy(REPO / name, folder / name)
    script = folder / SET_ENV
    listed = " ".join(f"'{address}'" for address in addresses)
    script.write_text(script.read_text().replace("IPs=()", f"IPs=({listed})"))
    return folder


def start_both(job, nodes, trees, *settings, prompt="", on_second=()):
    for node, (name, tree) in enumerate(zip(nodes, trees, strict=True)):
        job.start(
            *TWO,
            *settings,
            *(on_second if node else ()),
            "model_config.output_path=output",
            prompt=prompt,
            prefix=["ip", "netns", "exec", name],
            command=["bash", str(tree / "infer.sh")],
            cwd=tree,
            PYTHONPATH=None,
            RECIPE_NODES=None,
        )
    return job


@pytest.fixture
def job(job, trees):
    """Its logs lie in each node's own tree."""
    for node, tree in enumerate(trees):
        (job.folder / f"node{node}").symlink_to(tree / "output")
    return job


def test_one_document_from_two_nodes(job, nodes, trees):
    start_both(job, nodes, trees)
    assert job.wait() == [0, 0], job.err(0) + job.err(1)
    assert job.document(0)["sum"] == 10
    assert job.document(1) == {"command": "probe", "node": 1, "ranks": [2, 3], "ok": True}
    assert "stdout of rank 0" in job.out(0) and "stdout" not in job.out(1)
    assert [job.log(rank).parents[2].parent.name for rank in range(4)] == ["node0", "node0", "node1", "node1"]


def test_a_killed_rank_ends_both_nodes(job, nodes, trees):
    start_both(job, nodes, trees, prompt="2:sleep")
    victim = job.sleeper(2)
    at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert job.ends(at) == [1, 1]
    for node in range(2):
        assert "rank 2 on node 10.77.0.2 was killed by SIGKILL" in job.document(node)["error"]
        assert "rank_02.log on node 10.77.0.2" in job.err(node)
        assert f"| rank 2 is process {victim}" in job.err(node)
    assert job.document(1)["ok"] is False


def test_a_killed_launcher_ends_both_nodes(job, nodes, trees):
    start_both(job, nodes, trees, prompt="0:sleep")
    job.sleeper(0)
    at = time.monotonic()
    job.launchers[1].kill()
    assert job.ends(at)[0] == 1
    assert "node 10.77.0.2" in job.document(0)["error"] or "Connection closed" in job.document(0)["error"]


def test_a_killed_master_ends_both_nodes(job, nodes, trees):
    start_both(job, nodes, trees, prompt="3:sleep")
    job.sleeper(3)
    at = time.monotonic()
    job.launchers[0].kill()
    assert job.ends(at)[1] == 1
    assert "error" in job.document(1)


def test_a_cable_that_is_pulled_ends_both_nodes(job, nodes, trees):
    start_both(job, nodes, trees, prompt="0:sleep 3:sleep")
    job.sleeper(0), job.sleeper(3)
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


def test_another_recipe_on_one_node(job, nodes, trees):
    start_both(job, nodes, trees, on_second=["generation_config.seed=3"])
    assert job.wait() == [2, 2]
    for node in range(2):
        assert (
            "node 10.77.0.2 has another recipe than node 10.77.0.1: generation_config.seed is 3 there, None on"
            in (job.document(node)["error"])
        )
        assert job.err(node).count("error: ") == 1
    assert not list(trees[0].glob("output/logs/*/*"))


def test_other_code_on_one_node(job, nodes, trees):
    with (trees[1] / "executor" / "errors.py").open("a") as file:
        file.write("# changed\n")
    start_both(job, nodes, trees)
    assert job.wait() == [2, 2]
    assert "node 10.77.0.2 runs other code than node 10.77.0.1" in job.document(0)["error"]
    assert job.document(1)["error"] == job.document(0)["error"]


def test_weights_on_one_node_only(job, nodes, trees):
    (trees[0] / "weights" / "mine").mkdir(parents=True)
    start_both(job, nodes, trees, "model_config.model_path=weights/mine")
    assert job.wait() == [2, 2]
    for node in range(2):
        assert job.document(node)["error"].startswith("on node 10.77.0.2: model_config.model_path: there is no folder")


def test_a_machine_that_is_not_in_ips(job, nodes, trees):
    for tree in trees:
        script = tree / SET_ENV
        script.write_text(script.read_text().replace(ADDRESSES[1], "10.77.0.9"))
    start_both(job, nodes, trees)
    assert job.wait() == [2, 2]
    for node in range(2):
        assert "(10.77.0.2) is not among the 2 nodes of the job (10.77.0.1, 10.77.0.9)" in job.document(node)["error"]
