"""Ranks that torchrun or Slurm has made."""

import pytest

from executor.errors import UserError
from executor.launch.foreign import check_world, first_host, rank_variables, tasks_per_node

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "103",
}


def test_no_launcher():
    assert rank_variables({"HOME": "/"}) == {}


def test_torchrun():
    assert rank_variables(TORCHRUN | {"HOME": "/"}) == TORCHRUN


def test_half_of_a_launcher():
    with pytest.raises(UserError, match="RANK is set, but not LOCAL_RANK, MASTER_PORT"):
        rank_variables({key: value for key, value in TORCHRUN.items() if key not in ("LOCAL_RANK", "MASTER_PORT")})
    with pytest.raises(UserError, match="WORLD_SIZE=four: whole numbers"):
        rank_variables(TORCHRUN | {"WORLD_SIZE": "four"})


def test_srun():
    assert rank_variables(SRUN) == TORCHRUN | {"MASTER_ADDR": "node07", "MASTER_PORT": "20001"}
    chosen = rank_variables(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert chosen == TORCHRUN


def test_a_batch_script_is_no_rank():
    """sbatch sets the job's variables for the script, which runs once: only srun starts tasks."""
    assert rank_variables({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}) == {}
    assert rank_variables({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == {}


@pytest.mark.parametrize(
    "nodelist, first",
    [
        ("node7", "node7"),
        ("node[03-05,9],other", "node03"),
        ("a-1,b", "a-1"),
        ("n[1,4]", "n1"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_first_host(nodelist, first):
    assert first_host(nodelist) == first


@pytest.mark.parametrize("nodelist", ["rack[1-2]n[01-04]", "node[1-4]-ib", ""])
def test_a_node_list_that_is_not_guessed(nodelist):
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        first_host(nodelist)


def test_tasks_per_node():
    assert tasks_per_node("4(x2),3") == [4, 4, 3]


def test_the_launchers_world_is_the_recipes():
    check_world(TORCHRUN, 4)
    with pytest.raises(UserError, match=r"the recipe has 8 rank\(s\), the launcher started 4"):
        check_world(TORCHRUN, 8)
    with pytest.raises(UserError, match="RANK=4 is not below WORLD_SIZE=4"):
        check_world(TORCHRUN | {"RANK": "4"}, 4)
