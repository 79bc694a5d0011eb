"""Which ranks run where: from the chips, the addresses in IPs and the recipe. Never silently the first node."""

import pytest

from executor.errors import UserError
from executor.host.machine import Machine
from executor.host.nodes import PORTS
from executor.launch.job import node_entries
from executor.launch.layout import Layout, lay_out, npu_ranks
from executor.recipe.schema import load_recipe
from tests.doctor import fake

TWO = ("192.168.0.10", "192.168.0.11")  # fake machines are 192.168.0.11


def recipe(world_size, soc=None):
    settings = [f"parallel_config.world_size={world_size}"]
    settings += [f"model_config.soc={soc}"] if soc else []
    return load_recipe("config/quickstart.yaml", settings)


def laid_out(world_size, entries=(), machine=None, device="cpu", soc=None) -> Layout:
    return lay_out(recipe(world_size, soc), device, tuple(entries), machine or fake.laptop())


def with_environment(machine, **variables):
    machine.environment.update(variables)
    return machine


@pytest.mark.parametrize(
    "machine, ranks",
    [
        (fake.a2(), 8),
        (fake.a3(), 16),
        (fake.duo(), 2),
        (with_environment(fake.a2(), ASCEND_RT_VISIBLE_DEVICES="0,1,2,3"), 4),
        (fake.ascend(fake.repeat(fake.outputs.SMI_910B4_64GB, 4), fake.outputs.BOARD_CHIP_A2, chips=4), 4),
        (fake.FakeMachine(files={f"/dev/davinci{chip}": "" for chip in range(3)}), 3),
    ],
)
def test_ranks_of_a_node_are_its_chips(machine, ranks):
    assert npu_ranks(None, machine) == ranks


@pytest.mark.parametrize("soc, ranks", [("atlas_800i_a2", 8), ("atlas_800i_a3", 16), ("atlas_300i_duo", 2)])
def test_ranks_of_a_node_that_shows_no_chips(soc, ranks):
    assert npu_ranks(soc, fake.laptop()) == ranks


@pytest.mark.parametrize("visible, words", [("", "reading stops"), ("0, 1", "reading stops"), ("9", "devices 0 to 7")])
def test_visible_devices_that_cannot_be_read(visible, words):
    with pytest.raises(UserError, match=words):
        npu_ranks(None, with_environment(fake.a2(), ASCEND_RT_VISIBLE_DEVICES=visible))


def test_no_chips_and_no_name():
    with pytest.raises(UserError, match=r"set\s+model_config.soc"):
        npu_ranks(None, fake.laptop())


def test_one_node_needs_nothing():
    placeholders = ("xxx.xxx.xxx.xxx", "xxx.xxx.xxx.xxx")
    for entries in ((), placeholders, ("<master ip>",)):
        for device, machine, world in (("cpu", fake.laptop(), 4), ("npu", fake.a2(), 8), ("npu", fake.a3(), 16)):
            laid = laid_out(world, entries, machine, device)
            assert (laid.addresses, laid.node, laid.ranks) == (("127.0.0.1",), 0, range(world))
            assert laid.port == 0  # the first free one


def test_two_nodes():
    for device, machine, world in (("cpu", fake.laptop(), 4), ("npu", fake.a2(), 16), ("npu", fake.a3(), 32)):
        laid = laid_out(world, TWO, machine, device)
        assert (laid.master, laid.address, laid.node) == ("192.168.0.10", "192.168.0.11", 1)
        assert laid.ranks == range(world // 2, world)
        assert [laid.address_of(rank) for rank in (0, world // 2)] == list(TWO)
        assert laid.port == PORTS[0]
        assert laid_out(world, TWO[::-1], machine, device).node == 0


def test_a_name_for_a_node():
    laid = laid_out(2, ("head", "192.168.0.11"), fake.laptop(names={"head": "192.168.0.10"}))
    assert laid.addresses == TWO


def test_this_machine_by_its_real_addresses():
    """A loopback address that no interface lists is bound like one of the machine's own; a test network is not."""
    assert Machine().is_local("127.0.0.9")
    assert not Machine().is_local("198.51.100.1")
    with pytest.raises(UserError, match="is not among the 2 nodes of the job"):
        laid_out(2, ("198.51.100.1", "198.51.100.2"), Machine())


@pytest.mark.parametrize(
    "entries, words",
    [
        ((), "needs 2 nodes, but IPs in executor/scripts/set_env.sh is empty"),
        (("xxx.xxx.xxx.xxx", "xxx.xxx.xxx.xxx"), r"still has placeholders \(xxx.xxx.xxx.xxx"),
        (("192.168.0.11", "192.168.0.x"), r"still has placeholders \(192.168.0.x\)"),
        (("192.168.0.10", "192.168.0.12"), r"this machine \(192.168.0.11\) is not among the 2 nodes"),
        (("192.168.0.11",), "needs 2 nodes, but .* names 1"),
        (("192.168.0.11", "192.168.0.11"), "names a node twice"),
        (("127.0.0.1", "192.168.0.11"), "cannot be reached from other nodes"),
        (("192.168.0.11", "nowhere"), "nowhere is no address and no known host"),
        ((*TWO, "192.168.0.12"), "fit on 2 node.*names 3"),
    ],
)
def test_addresses_that_do_not_say_which_node_this_is(entries, words):
    with pytest.raises(UserError, match=words) as raised:
        laid_out(16, entries, fake.a2(), "npu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("world, device", [(12, "npu"), (3, "cpu")])
def test_a_world_that_is_no_multiple(world, device):
    with pytest.raises(UserError, match=rf"parallel_config.world_size: got {world}"):
        laid_out(world, TWO, fake.a2(), device)


def test_a_world_that_fits_on_one_of_two_nodes_is_not_run_on_both():
    for machine, world in ((fake.a3(), 16), (fake.a2(), 8)):
        with pytest.raises(UserError, match="each of which would run the job"):
            laid_out(world, TWO, machine, "npu")


def test_a_port_of_the_user():
    machine = with_environment(fake.laptop(), MASTER_PORT="23456")
    assert laid_out(2, (), machine).port == laid_out(2, TWO, machine).port == 23456
    for wrong in ("abc", "0", "70000"):
        with pytest.raises(UserError, match=f"MASTER_PORT={wrong} is no port"):
            laid_out(2, (), with_environment(fake.laptop(), MASTER_PORT=wrong))


def test_entries_come_from_infer_sh_else_from_the_file():
    machine = fake.set_env(fake.laptop(), ips=TWO)
    machine.read = lambda path: next(iter(text for name, text in machine.files.items() if name.endswith("set_env.sh")))
    assert node_entries(machine) == TWO
    machine.environment["RECIPE_NODES"] = "10.0.0.1 10.0.0.2"
    assert node_entries(machine) == ("10.0.0.1", "10.0.0.2")
    machine.environment["RECIPE_NODES"] = ""
    assert node_entries(machine) == ()
