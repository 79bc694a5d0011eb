"""Machines that are not here: the methods of executor.host.machine.Machine over dictionaries."""

import fnmatch
import json
import posixpath

from executor.host import npu_smi
from executor.host.machine import Output
from executor.host.nodes import is_address
from tests.doctor import outputs

ROOT = "/repo"
FOLDER = "/models/qwen"
DEVICE_FILES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})


class FakeMachine:
    """`files` maps paths to texts (or to sizes in bytes), `commands` a command line to what it prints."""

    def __init__(self, arch="aarch64", **changes):
        self.environment = {"HOME": "/home/user"}
        self.python_version, self.python_path = (3, 11, 9), "/usr/bin/python3"
        self.system, self.arch, self.cwd = "Linux 5.10.0", arch, "/home/user"
        self.files = {f"{ROOT}/requirements.txt": "torch>=2.7.1,<2.15\npyyaml>=6.0\n"}
        self.commands = {}
        self.packages = {"torch": "2.8.0+cpu", "pyyaml": "6.0.2"}
        self.taken_ports = set()
        self.interfaces = {"lo": ["127.0.0.1"], "enp1s0": ["192.168.0.11"]}
        self.names = {}
        self.memory, self.disk = 512 * 2**30, 10**12
        self.closed = set()
        self.routed = True
        for name, value in changes.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def read(self, path):
        found = self.files.get(path)
        return found if isinstance(found, str) else None

    def exists(self, path):
        return path in self.files or self.is_dir(path)

    def is_dir(self, path):
        return any(known.startswith(path.rstrip("/") + "/") for known in self.files)

    def accessible(self, path):
        return self.exists(path) and path not in self.closed

    def glob(self, pattern):
        depth = pattern.count("/")
        known = {"/".join(path.split("/")[: depth + 1]) for path in self.files}
        return sorted(path for path in known if fnmatch.fnmatch(path, pattern))

    def size_bytes(self, path):
        found = self.files.get(path, 0)
        return found if isinstance(found, int) else len(found)

    def run(self, command, timeout_s=30):
        found = self.commands.get(" ".join(command[:2]) if command[1:2] == ["-c"] else " ".join(command))
        return Output(0, found) if isinstance(found, str) else found

    def package(self, name):
        return self.packages.get(name)

    def port_is_free(self, port):
        return port not in self.taken_ports

    def addresses(self):
        return self.interfaces

    def resolve(self, host):
        return host if is_address(host) else self.names.get(host)

    def is_local(self, address):
        return any(address in addresses for addresses in self.interfaces.values())

    def address_towards(self, host):
        return self.interfaces["enp1s0"][0] if self.routed else None

    def memory_bytes(self):
        return self.memory

    def free_disk_bytes(self, path):
        return self.disk


def with_model(machine, size_bytes=2**33):
    """Two weight files of `size_bytes` together."""
    machine.files.update(
        {
            f"{FOLDER}/config.json": "{}",
            f"{FOLDER}/model.safetensors.index.json": INDEX,
            f"{FOLDER}/model-1.safetensors": size_bytes // 2,
            f"{FOLDER}/model-2.safetensors": size_bytes // 2,
        }
    )
    return machine


def repeat(table, cards, chips_per_card=1):
    """`table` with its first card's rows for `cards` cards: documents print only a few of many equal rows."""
    lines = table.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| ") and " OK " in line)
    rows = [line for line in lines[first:] if line.startswith("|")][: 2 * chips_per_card]
    return "\n".join(
        lines[:first]
        + [r.replace(r[2], str(c), 1) if i % 2 == 0 else r for c in range(cards) for i, r in enumerate(rows)]
    )


def ascend(table, chip_board, cann="8.3.RC1", torch_npu="2.8.0", chips=8, **changes):
    """A healthy Ascend server whose driver prints `table`."""
    torch = ".".join(torch_npu.split(".")[:3])
    name = npu_smi.soc_name(npu_smi.parse_fields(chip_board))
    machine = with_model(FakeMachine(**changes))
    toolkit = "/usr/local/Ascend/ascend-toolkit/latest"
    machine.files.update(
        {
            "/usr/local/Ascend/driver/version.info": outputs.DRIVER_INFO.replace("24.1.rc3", _version(table)),
            "/usr/local/Ascend/firmware/version.info": outputs.FIRMWARE_INFO,
            "/etc/ascend_install.info": outputs.ASCEND_INSTALL_INFO,
            f"{toolkit}/aarch64-linux/ascend_toolkit_install.info": outputs.INSTALL_INFO.replace("8.3.RC2", cann),
            "/usr/local/Ascend/nnal/atb/latest/version.info": outputs.ATB_INFO.replace("8.0.0", cann),
            "/usr/lib/aarch64-linux-gnu/libjemalloc.so.2": "",
            **dict.fromkeys(DEVICE_FILES, ""),
            **{f"/dev/davinci{number}": "" for number in range(chips)},
            **{
                f"{toolkit}/opp/built-in/op_impl/ai_core/tbe/kernel/{kernels}/x": ""
                for kernels in ("ascend910b", "ascend910_93", "ascend310p")
            },
        }
    )
    first = next(line.split()[1] for line in table.splitlines() if " OK " in line or " 0K " in line)
    machine.commands.update(
        {
            "npu-smi info": table,
            f"npu-smi info -t board -i {first}": outputs.BOARD_CARD,
            f"npu-smi info -t board -i {first} -c 0": chip_board,
            f"{machine.python_path} -c": "doctor:"
            + json.dumps({"torch": torch, "cxx11_abi": 0, "npus": chips, "name": name}),
        }
    )
    machine.packages.update({"torch": f"{torch}+cpu", "torch_npu": torch_npu})
    machine.environment.update(
        {
            "ASCEND_TOOLKIT_HOME": toolkit,
            "ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_0",
        }
    )
    return machine


def _version(table):
    return next((line.split("Version:")[1].split()[0] for line in table.splitlines() if "Version:" in line), "24.1.rc3")


def a2(**changes):
    """Atlas 800I A2, eight 910B4 of 64 GB."""
    return ascend(repeat(outputs.SMI_910B4_64GB, 8), outputs.BOARD_CHIP_A2, **changes)


def a3(**changes):
    """Atlas 800I A3, sixteen dies of eight modules."""
    return ascend(repeat(outputs.SMI_A3, 8, 2), outputs.BOARD_CHIP_A3, chips=16, **changes)


def duo(**changes):
    """One Atlas 300I Duo card: two 310P3 of 48 GB."""
    board = outputs.BOARD_CHIP_A2.replace("910B4", "310P3")
    return ascend(outputs.SMI_300I_DUO, board, chips=2, **changes)


def laptop(**changes):
    """No NPU, no CANN, torch for CPU."""
    return with_model(FakeMachine(arch="x86_64", memory=16 * 2**30, **changes))


def set_env(machine, **fields):
    """Write the user's fields of set_env.sh."""
    ips = " ".join(f"'{ip}'" for ip in fields.pop("ips", ()))
    lines = [f"IPs=({ips})", *(f'{name}="{value}"' for name, value in fields.items())]
    machine.files[posixpath.join(ROOT, "executor/scripts/set_env.sh")] = "\n".join(["# comment", *lines, ""])
    return machine
