"""Jobs of two ranks on this machine, started as a user starts them."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from executor import __main__ as launch
from executor.host.env import REPO_ROOT
from executor.host.limits import computing_threads
from executor.host.streams import READER_GONE
from executor.launch import job as jobs
from executor.launch.layout import LOCAL_ADDRESS

TWO = "parallel_config.world_size=2"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "executor"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind((LOCAL_ADDRESS, 0))
        return server.getsockname()[1]


def test_a_job(job):
    """Rank 0 on the screen, every rank in its log, one document; threads share the cores, the user's variables stay."""
    job.start(TWO, OMP_NUM_THREADS=None, GLOO_SOCKET_IFNAME="lo")
    assert job.wait() == [0], job.err()
    assert job.document() == {"command": "probe", "sum": 3.0, "world_size": 2}
    assert job.out().splitlines()[:-1] == ["stdout of rank 0"]
    assert "rank 0 sees 3" in job.err() and "rank 1 sees 3" not in job.err()
    threads = max(1, computing_threads() // 2)
    for rank in range(2):
        log = job.log(rank).read_text()
        assert f"rank {rank} sees 3" in log
        assert f"rank {rank} has GLOO_SOCKET_IFNAME=lo, OMP_NUM_THREADS={threads}" in log
    assert "stdout of rank 1" in job.log(1).read_text()
    assert f"logs in {job.log(0).parent}" in job.err()
    assert not job.processes()


def test_a_killed_rank_ends_the_job(job):
    """Its peer waits in a collective and has a child of its own."""
    job.start(TWO, prompt="0:child 1:sleep")
    victim = job.sleeper(1)
    at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert job.ends(at) == [1]
    assert job.document()["error"] == (
        "rank 1 was killed by SIGKILL; if nobody did that, the machine ran out of memory (see dmesg); "
        f"log: {job.log(1)}"
    )
    assert f"its log: {job.log(1)}" in job.err()
    assert f"  | rank 1 is process {victim}" in job.err()


def test_a_killed_launcher_ends_the_job(job):
    job.start(TWO, prompt="1:sleep")
    job.sleeper(1)
    at = time.monotonic()
    job.launchers[0].kill()
    assert job.ends(at) == [-9]


def test_an_ended_job_leaves_no_process(job):
    """A launcher under nohup outlives its terminal, and heeds SIGTERM."""
    job.start(TWO, prompt="*:sleep 0:child", prefix=["nohup"])
    job.sleeper(1)
    job.launchers[0].send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert job.launchers[0].poll() is None
    at = time.monotonic()
    job.launchers[0].terminate()
    assert job.ends(at) == [128 + signal.SIGTERM]
    assert job.document()["error"] == "interrupted by SIGTERM"


def test_a_rank_that_is_stopped_is_reported(job):
    job.start(TWO, "parallel_config.hang_timeout_s=2", prompt="1:sleep")
    victim = job.sleeper(1)
    at = time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    assert job.ends(at) == [1]
    assert "rank 1 hangs: no sign of life for 2 s (parallel_config.hang_timeout_s): it is stopped" in job.err()
    assert f"  | rank 1 is process {victim}" in job.err()


def test_what_a_rank_raises(job):
    """Its peer's lost connection is not taken for the cause."""
    job.start(TWO, prompt="1:raise")
    assert job.wait() == [1]
    assert job.document()["error"].startswith("rank 1 failed: RuntimeError: the disk is full; log: ")
    assert "  | RuntimeError: the disk is full" in job.err()


def test_a_reader_that_has_gone_ends_a_job_quietly(job):
    """`| head -1`: nothing but the log lines of the start stands on the screen."""
    job.start(TWO, prompt="*:print", prefix=["bash", "-c", '"$@" | head -n 1; exit "${PIPESTATUS[0]}"', "bash"])
    assert job.wait() == [READER_GONE]
    assert job.out() == "stdout of rank 0\n"
    assert "error" not in job.err().lower() and "Traceback" not in job.err()


def test_the_users_mistake_is_one_line(job):
    job.start(TWO, prompt="*:user")
    assert job.wait() == [2]
    assert job.document()["error"] == "mend this"
    assert job.err().count("mend this") == 1


@pytest.mark.parametrize("settings, words", [([], "the master port"), (["model_config.model_path=none"], "model_path")])
def test_what_keeps_a_job_from_starting(job, settings, words):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = free_port() if settings else server.getsockname()[1]
        job.start(TWO, *settings, MASTER_PORT=str(port))
        assert job.wait() == [2]
    assert words in job.document()["error"] and job.err().count("error: ") == 1
    assert not list(job.folder.glob("node0/logs/*"))


@pytest.mark.parametrize("command", ["check", "plan"])
def test_commands_of_one_process(monkeypatch, capsys, command):
    """They compute nothing on ranks, however many the recipe has."""
    called = []
    monkeypatch.setitem(launch.MODULES, command, "tests.launch.test_one_node")
    monkeypatch.setattr(jobs, "start_job", lambda *arguments: called.append("job"))
    monkeypatch.setattr(sys.modules[__name__], "run", lambda recipe: (called.append("run"), ({}, 0))[1], raising=False)
    assert launch.main(["config/quickstart.yaml", command, "--set", "parallel_config.world_size=16"]) == 0
    assert called == ["run"]


def test_a_thread_that_waits_for_the_store_does_not_change_the_status():
    line = (
        "import threading; from executor import __main__ as launch; from executor.launch import store; "
        "store.in_thread(threading.Event().wait); print('said'); launch.end(2)"
    )
    done = subprocess.run([sys.executable, "-c", line], cwd=REPO_ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "said\n")


# Under another launcher


def test_torchrun(job):
    job.start(TWO, command=[*TORCHRUN[:3], "--master-port", str(free_port()), *TORCHRUN[3:]])
    assert job.wait() == [0], job.err()
    assert job.document() == {"command": "probe", "sum": 3.0, "world_size": 2}
    assert "rank 1 sees 3" in job.err() and "stdout of rank 1" in job.err()


def test_torchrun_with_a_killed_rank(job):
    job.start(TWO, prompt="1:sleep", command=[*TORCHRUN[:3], "--master-port", str(free_port()), *TORCHRUN[3:]])
    job.until(lambda: "rank 1 is process" in job.err())
    victim = int(job.err().split("rank 1 is process")[1].split()[0])
    at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert job.ends(at) == [1]


def test_torchrun_with_another_world(job):
    """Every rank finds it, one of each node says it."""
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": LOCAL_ADDRESS, "MASTER_PORT": "1"}
    for rank in "01":
        job.start("parallel_config.world_size=4", RANK=rank, LOCAL_RANK=rank, **told)
    assert job.wait() == [2, 2]
    words = "parallel_config.world_size: the recipe has 4 rank(s), the launcher started 2"
    assert words in job.document(0)["error"] and words in job.err(0)
    assert job.out(1) == job.err(1) == ""


def slurm(port: int, rank: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": LOCAL_ADDRESS,
        "MASTER_PORT": str(port),
    }


def test_srun(job):
    port = free_port()
    for rank in range(2):
        job.start(TWO, **slurm(port, rank))
    assert job.wait() == [0, 0], job.err(0) + job.err(1)
    assert job.document(0) == {"command": "probe", "sum": 3.0, "world_size": 2}
    assert job.out(1) == "" and "stdout of rank 1" in job.err(1)


def test_srun_with_a_mistake_of_one_rank(job):
    """Rank 0, which waits for it in a collective and so fails too, gives the cause."""
    port = free_port()
    for rank in range(2):
        job.start(TWO, prompt="1:user", **slurm(port, rank))
    assert job.wait() == [2, 2]
    assert job.document(0)["error"] == "mend this"
    assert "error: mend this" in job.err(0) and "error: mend this" in job.err(1)


def test_srun_with_a_rank_that_is_stopped(job):
    port = free_port()
    for rank in range(2):
        job.start(TWO, "parallel_config.hang_timeout_s=2", prompt="1:sleep", **slurm(port, rank))
    job.until(lambda: "rank 1 is process" in job.err(1))
    job.launchers[1].send_signal(signal.SIGSTOP)
    assert job.launchers[0].wait(20) == 1
    assert job.document(0)["error"].startswith("rank 1 hangs: no sign of life for 2 s")
    job.launchers[1].send_signal(signal.SIGCONT)
    assert job.launchers[1].wait(20) == 1


def test_half_of_a_launcher(job):
    job.start(TWO, RANK="0", WORLD_SIZE="2")
    assert job.wait() == [2]
    assert "RANK is set, but not LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in job.document()["error"]


# set_env.sh


def source_set_env(tmp_path, **fields):
    """Source a filled-in set_env.sh the way infer.sh does; what it prints of its variables."""
    script = tmp_path / "executor" / "scripts" / "set_env.sh"
    script.parent.mkdir(parents=True)
    text = (REPO_ROOT / "executor/scripts/set_env.sh").read_text()
    for name, value in fields.items():
        assert f'\n{name}=""\n' in text
        text = text.replace(f'\n{name}=""\n', f'\n{name}="{value}"\n')
    script.write_text(text)
    find = REPO_ROOT / "executor/scripts/find_python.sh"
    line = f'set -euo pipefail; source {find}; source {script}; echo "$recipes_path|${{CANN:-}}|${{LD_LIBRARY_PATH:-}}"'
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})


def test_set_env_finds_the_repository(tmp_path):
    assert source_set_env(tmp_path).stdout == f"{tmp_path}||\n"


def test_set_env_takes_what_is_filled_in(tmp_path):
    (tmp_path / "cann").mkdir()
    (tmp_path / "cann" / "set_env.sh").write_text('export CANN="$UNSET_BEFORE there"\n')
    (tmp_path / "driver" / "lib64").mkdir(parents=True)
    done = source_set_env(tmp_path, cann_path=tmp_path / "cann", driver_path=tmp_path / "driver")
    lib = f"{tmp_path}/driver/lib64"
    assert done.stdout == f"{tmp_path}| there|{lib}/driver:{lib}/common:{lib}\n", done.stderr


@pytest.mark.parametrize("field", ["recipes_path", "cann_path", "driver_path"])
def test_set_env_refuses_a_folder_that_is_not_it(tmp_path, field):
    done = source_set_env(tmp_path, **{field: tmp_path / "nowhere"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: executor/scripts/set_env.sh: {field}={tmp_path}/nowhere ")
    assert done.stdout.startswith('{"command": "launch", "error": "')
