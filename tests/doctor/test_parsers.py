"""The parsers on what real machines printed (outputs.py names each source)."""

import pytest

from executor.doctor import versions
from executor.host import npu_smi
from executor.host.nodes import (
    is_placeholder,
    parse_hccn_conf,
    parse_ip_addr,
    parse_set_env,
    parse_visible_devices,
)
from tests.doctor import outputs


@pytest.mark.parametrize(
    "text, version, chips",
    [
        (outputs.SMI_910B4_64GB, "25.2.0", [(0, 0, "910B4-1", 3197, 65536), (1, 0, "910B4-1", 3197, 65536)]),
        (outputs.SMI_910B4_32GB, "23.0.6", [(4, 0, "910B4", 29096, 32768), (5, 0, "910B4", 29095, 32768)]),
        (outputs.SMI_910B3, None, [(0, 0, "910B3", 3369, 65536), (1, 0, "910B3", 3368, 65536)]),
        (
            outputs.SMI_A3,
            "24.1.rc3.7",
            [(0, 0, "Ascend910", 3416, 65536), (0, 1, "Ascend910", 3195, 65536), (1, 0, "Ascend910", 3415, 65536)],
        ),
        (outputs.SMI_300I_DUO, "25.2.0", [(2, 0, "310P3", 1529, 44280), (2, 1, "310P3", 1412, 43693)]),
        (outputs.SMI_300I_DUO_BY_HAND, "25.0.rc1.1", [(0, 0, "310P3", 1460, 44280), (1, 0, "310P3", 1479, 43693)]),
        (outputs.SMI_310P_24GB, "22.0.4", [(7, 0, "310P3", 1805, 21527)]),
        (outputs.SMI_OCCUPIED, None, []),
        ("", None, []),
    ],
)
def test_npu_smi_info(text, version, chips):
    table = npu_smi.parse_info(text)
    assert table.version == version
    assert [(c.npu_id, c.chip_id, c.name, c.used_mb, c.total_mb) for c in table.chips] == chips


def test_npu_smi_info_health_and_bus():
    first, second = npu_smi.parse_info(outputs.SMI_300I_DUO).chips
    assert (first.health, first.bus_id, first.nominal_gb) == ("OK", "0000:01:00.0", 48)
    assert second.nominal_gb == 48
    assert npu_smi.parse_info(outputs.SMI_ALARM).chips[0].health == "Alarm"
    assert npu_smi.parse_info(outputs.SMI_310P_24GB).chips[0].nominal_gb == 24


def test_npu_smi_mapping_leaves_controllers_out():
    assert [(c.npu_id, c.chip_id, c.logic_id, c.name) for c in npu_smi.parse_mapping(outputs.MAPPING_910B4)] == [
        (0, 0, 0, "Ascend910B4"),
        (1, 0, 1, "Ascend910B4"),
    ]
    assert [c.logic_id for c in npu_smi.parse_mapping(outputs.MAPPING_A3)] == [0, 1]
    assert {c.name for c in npu_smi.parse_mapping(outputs.MAPPING_A3)} == {"Ascend910"}


def test_npu_smi_board():
    assert npu_smi.soc_name(npu_smi.parse_fields(outputs.BOARD_CHIP_A2)) == "Ascend910B4"
    assert npu_smi.soc_name(npu_smi.parse_fields(outputs.BOARD_CHIP_A3)) == "Ascend910_9392"
    card = npu_smi.parse_fields(outputs.BOARD_CARD)
    assert card["Firmware Version"] == "7.1.0.7.220"
    assert card["PCIe Bus Info"] == "0000:61:00.0", "only the first colon parts key and value"
    assert npu_smi.soc_name(card) is None
    assert npu_smi.soc_name({"Chip Name": "MCU"}) is None


def test_npu_smi_usages():
    assert npu_smi.memory_mb(npu_smi.parse_chip_sections(outputs.USAGES_HBM)[0]) == 32768
    assert npu_smi.memory_mb(npu_smi.parse_chip_sections(outputs.USAGES_310P)[0]) == 21534
    assert npu_smi.memory_mb({}) == 0
    assert npu_smi.parse_chip_sections("nothing") == {}


@pytest.mark.parametrize(
    "name, family",
    [
        ("910B4", npu_smi.A2),
        ("910B4-1", npu_smi.A2),
        ("Ascend 910B3", npu_smi.A2),
        ("Ascend910B2C", npu_smi.A2),
        ("Ascend910", npu_smi.A3),
        ("Ascend910_9392", npu_smi.A3),
        ("310P3", npu_smi.DUO),
        ("Ascend310P3", npu_smi.DUO),
        ("910B", None),
        ("910A", None),
        ("910ProB", None),
        ("310B1", None),
        ("Ascend950PR", None),
    ],
)
def test_family(name, family):
    assert npu_smi.family(name) == family


@pytest.mark.parametrize(
    "visible_mb, sold_gb", [(32768, 32), (65536, 64), (21527, 24), (44280, 48), (43693, 48), (0, None), (61440, 64)]
)
def test_nominal_gb(visible_mb, sold_gb):
    assert npu_smi.nominal_gb(visible_mb) == sold_gb


def test_driver_and_firmware():
    driver = versions.parse_package_info(outputs.DRIVER_INFO)
    firmware = versions.parse_package_info(outputs.FIRMWARE_INFO)
    assert (driver.version, driver.package, driver.accepts) == ("24.1.rc3", "24.1.rc3", (("7.0.0", "7.5.99"),))
    assert (firmware.version, firmware.package) == ("7.1.0.11.220", "23.0.7")
    assert versions.firmware_fits(driver, firmware.version) is True
    assert versions.firmware_fits(driver, "7.7.0.1.231") is False
    assert versions.firmware_fits(driver, "6.4.0") is False
    assert versions.firmware_fits(driver, "NA") is None
    assert versions.firmware_fits(versions.parse_package_info("Version=1"), "7.5.0") is None


def test_cann_files():
    assert versions.parse_install_info(outputs.INSTALL_INFO) == "8.3.RC2"
    assert versions.parse_version_cfg(outputs.VERSION_CFG) == "8.0.0"
    assert versions.parse_version_cfg(outputs.VERSION_CFG_SEVERAL) == "8.0.RC2"
    assert versions.parse_toolkit_info(outputs.TOOLKIT_INFO) == "8.2.RC1"
    assert versions.parse_atb_info(outputs.ATB_INFO) == "8.0.0"
    assert versions.parse_pairs(outputs.ASCEND_INSTALL_INFO)["driver_install_path_param"] == "/usr/local/Ascend"
    for parse in (versions.parse_install_info, versions.parse_version_cfg, versions.parse_atb_info):
        assert parse("") is None


def test_versions_that_go_together():
    assert versions.torch_matches("2.8.0+cpu", "2.8.0.post2")
    assert not versions.torch_matches("2.8.0", "2.7.1.post11")
    assert versions.documented_cann("2.8.0.post2") == ("8.5.0",)
    assert versions.documented_cann("2.8.0.post5") == ()
    assert versions.documented_near("2.8.0.post5").startswith("2.8.0 with 8.3.RC1, 2.8.0.post2 with 8.5.0")
    assert versions.documented_near("2.14.0") == ""
    assert versions.same_cann("8.3.rc1", "8.3.RC1") and not versions.same_cann("8.3.RC1", "8.3.RC2")
    supported = ["2.7.1", "2.7.1.post11", "2.8.0+cpu", "2.14.0", "2.14.1"]
    assert all(versions.is_supported_torch(version) for version in supported)
    assert not any(versions.is_supported_torch(version) for version in ["2.6.0", "2.7.0", "2.15.0", "3.0.0"])


@pytest.mark.parametrize(
    "text, devices, problem",
    [
        ("0,1,2", (0, 1, 2), ""),
        ("5", (5,), ""),
        ("1, 2,3", (1,), "stops"),  # the three are the examples of CANN's page on this variable
        ("1,3,8", (1, 3), "devices 0 to 7"),
        ("1,2,-1,3", (1, 2), "stops"),
        ("3,1", (1, 3), "ascend"),
        ("0-3", (), "stops"),
    ],
)
def test_visible_devices(text, devices, problem):
    visible = parse_visible_devices(text, 8)
    assert visible.devices == devices
    assert problem in visible.problem and bool(visible.problem) == bool(problem)


def test_set_env():
    setup = parse_set_env(
        "# IPs=('9.9.9.9')\nIPs=('10.0.0.1'\n  \"10.0.0.2\"  # the second\n)\ncann_path=\"/opt/cann\"\ndriver_path=''\n"
        'if [ -z "$cann_path" ]; then\n  cann_path=other\nfi\n'
    )
    assert setup.ips == ("10.0.0.1", "10.0.0.2")
    assert (setup.cann_path, setup.driver_path) == ("/opt/cann", "")
    assert parse_set_env("").ips == ()


def test_placeholders():
    for entry in ("xxx.xxx.xxx.xxx", "192.168.0.x", "<master>", "<master", "ip>", "10.X.X.X"):
        assert is_placeholder(entry), entry
    for entry in ("192.168.0.1", "fd00::2", "node-1", "npu01.cluster"):
        assert not is_placeholder(entry), entry


def test_addresses():
    shown = (
        "1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever preferred_lft forever\n"
        "2: eth0@if7    inet 10.0.0.5/24 brd 10.0.0.255 scope global eth0\\       valid_lft forever\n"
        "2: eth0@if7    inet6 fe80::1/64 scope link \\       valid_lft forever\n"
    )
    assert parse_ip_addr(shown) == {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5", "fe80::1"]}
    assert parse_hccn_conf(outputs.HCCN_CONF) == {0: "192.168.10.21", 1: "192.168.20.21"}
