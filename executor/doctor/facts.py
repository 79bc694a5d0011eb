"""Asks a machine everything once; the checks then judge what was answered.

Gathering never fails: what cannot be found out is None, and the reason is kept beside it.
"""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass, field

from executor.doctor import versions
from executor.doctor.recipe import Wish
from executor.host import npu_smi
from executor.host.machine import Machine
from executor.host.nodes import NodeSetup, VisibleDevices, is_placeholder, parse_set_env, parse_visible_devices
from executor.host.npu_smi import Chip

ASCEND_ROOTS = ("/usr/local/Ascend", "~/Ascend")
RANKS_PER_NODE = {npu_smi.A2: 8, npu_smi.A3: 16}

# Run in a process of its own: an import of torch_npu that fails may take the interpreter with it.
PROBE = """
import json, torch
answer = {"torch": torch.__version__, "cxx11_abi": int(torch.compiled_with_cxx11_abi())}
import torch_npu
answer["npus"] = torch.npu.device_count()
answer["name"] = torch.npu.get_device_name(0) if answer["npus"] else ""
print("doctor:" + json.dumps(answer))
"""


@dataclass(frozen=True)
class Cann:
    """An installed CANN toolkit."""

    root: str
    version: str | None
    sourced: bool
    """Whether the environment (or set_env.sh's cann_path) points to it."""


@dataclass(frozen=True)
class Facts:
    """Everything the checks look at."""

    machine: Machine
    repo_root: str
    wish: Wish | None
    setup: NodeSetup
    smi_version: str | None
    smi_problem: str
    chips: tuple[Chip, ...]
    chip_name: str | None
    board: dict[str, str]
    driver: versions.PackageInfo | None
    firmware: versions.PackageInfo | None
    cann: Cann | None
    cann_roots: tuple[str, ...]
    nnal: str | None
    packages: dict[str, str | None] = field(default_factory=dict)
    probe: dict | None = None
    probe_problem: str = ""

    @property
    def family(self) -> str | None:
        """The `soc` of this machine's chips."""
        return npu_smi.family(self.chip_name) if self.chip_name else None

    @property
    def chip_count(self) -> int:
        """Chips of this machine: as the driver lists them, else as torch counts them, else the device nodes."""
        if self.chips:
            return len(self.chips)
        if self.probe and self.probe["npus"]:
            return self.probe["npus"]
        return len(self.machine.glob("/dev/davinci[0-9]*"))

    @property
    def visible(self) -> VisibleDevices | None:
        """What ASCEND_RT_VISIBLE_DEVICES leaves, None when it is not set."""
        text = self.machine.environment.get("ASCEND_RT_VISIBLE_DEVICES", "")
        # A list counts the machine's own devices, of which a probe that honours it shows only some.
        return parse_visible_devices(text, len(self.chips)) if text else None

    @property
    def usable_chips(self) -> int:
        """Chips a job may use here."""
        return len(self.visible.devices) if self.visible else self.chip_count

    @property
    def on_npu(self) -> bool:
        """Whether an NPU is what matters: the recipe asks for one, or chips are here and nothing else is asked for."""
        if self.wish and self.wish.device != "auto":
            return self.wish.device == "npu"
        return bool(self.chip_count or (self.wish and self.wish.soc))

    @property
    def num_nodes(self) -> int:
        """Nodes of a job: as torchrun or Slurm says, else as many as IPs lists (one for placeholders)."""
        environment = self.machine.environment
        world, local = environment.get("WORLD_SIZE", ""), environment.get("LOCAL_WORLD_SIZE", "")
        if world.isdigit() and local.isdigit() and int(local):
            return max(1, int(world) // int(local))
        if environment.get("SLURM_NNODES", "").isdigit():
            return max(1, int(environment["SLURM_NNODES"]))
        return 1 if all(is_placeholder(entry) for entry in self.setup.ips) else len(self.setup.ips)

    def path(self, path: str) -> str:
        """`path` of a recipe: from the working directory if it is there, else from the repository's root."""
        home = self.machine.environment.get("HOME", "")
        if path.startswith("~/"):
            return posixpath.join(home, path[2:])
        if path.startswith("/") or self.machine.exists(posixpath.join(self.machine.cwd, path)):
            return posixpath.join(self.machine.cwd, path)
        return posixpath.join(self.repo_root, path)


def gather(machine: Machine, repo_root: str, wish: Wish | None = None) -> Facts:
    """Ask everything. Slow only where torch_npu is installed (it is imported once, in another process)."""
    setup = parse_set_env(machine.read(posixpath.join(repo_root, "executor/scripts/set_env.sh")) or "")
    table, problem = _ask_smi(machine)
    table = npu_smi.SmiTable(table.version, _in_device_order(machine, table.chips))
    board = _smi_fields(machine, table, [])
    packages = {name: machine.package(name) for name in ("torch", "torch_npu", "triton", "triton-ascend")}
    probe, probe_problem = _probe(machine) if packages["torch_npu"] else (None, "")
    name = npu_smi.soc_name(_smi_fields(machine, table, ["-c", str(table.chips[0].chip_id)])) if table.chips else None
    name = name or (table.chips[0].name if table.chips else None) or (probe or {}).get("name") or None
    driver_root = _driver_root(machine, setup)
    cann_roots = _cann_roots(machine, setup)
    return Facts(
        machine=machine,
        repo_root=repo_root,
        wish=wish,
        setup=setup,
        smi_version=table.version,
        smi_problem=problem,
        chips=_with_memory(machine, table.chips),
        chip_name=name,
        board=board,
        driver=_package_info(machine, posixpath.join(driver_root, "driver/version.info")),
        firmware=_package_info(machine, posixpath.join(driver_root, "firmware/version.info")),
        cann=_cann(machine, setup, cann_roots),
        cann_roots=tuple(cann_roots),
        nnal=_nnal(machine),
        packages=packages,
        probe=probe,
        probe_problem=probe_problem,
    )


def _ask_smi(machine: Machine) -> tuple[npu_smi.SmiTable, str]:
    shown = machine.run(["npu-smi", "info"], 60)
    if shown is None:
        return npu_smi.SmiTable(None, ()), "npu-smi is not installed"
    table = npu_smi.parse_info(shown.stdout)
    if table.chips:
        return table, ""
    said = (shown.stdout + "\n" + shown.stderr).strip().splitlines() or ["nothing"]
    return table, f"npu-smi info shows no chip (status {shown.status}): {said[0].strip()[:200]}"


def _in_device_order(machine: Machine, chips: tuple[Chip, ...]) -> tuple[Chip, ...]:
    """Chips by their device number (logic id), which ASCEND_RT_VISIBLE_DEVICES and ranks count by."""
    shown = machine.run(["npu-smi", "info", "-m"], 60) if chips else None
    mapped = npu_smi.parse_mapping(shown.stdout) if shown and shown.status == 0 else ()
    numbers = {(row.npu_id, row.chip_id): row.logic_id for row in mapped}
    return tuple(sorted(chips, key=lambda chip: numbers.get((chip.npu_id, chip.chip_id), len(chips))))


def _smi_fields(machine: Machine, table: npu_smi.SmiTable, more: list[str]) -> dict[str, str]:
    if not table.chips:
        return {}
    shown = machine.run(["npu-smi", "info", "-t", "board", "-i", str(table.chips[0].npu_id), *more], 60)
    return npu_smi.parse_fields(shown.stdout) if shown and shown.status == 0 else {}


def _with_memory(machine: Machine, chips: tuple[Chip, ...]) -> tuple[Chip, ...]:
    """Chips whose table row shows no memory get it from their usages."""
    usages: dict[int, dict[int, dict[str, str]]] = {}
    whole = []
    for chip in chips:
        if not chip.total_mb and chip.npu_id not in usages:
            shown = machine.run(["npu-smi", "info", "-t", "usages", "-i", str(chip.npu_id)], 60)
            usages[chip.npu_id] = npu_smi.parse_chip_sections(shown.stdout) if shown else {}
        total = chip.total_mb or npu_smi.memory_mb(usages[chip.npu_id].get(chip.chip_id, {}))
        whole.append(Chip(chip.npu_id, chip.chip_id, chip.name, chip.health, chip.bus_id, chip.used_mb, total))
    return tuple(whole)


def _probe(machine: Machine) -> tuple[dict | None, str]:
    shown = machine.run([machine.python_path, "-c", PROBE], 180)
    if shown is None:
        return None, f"{machine.python_path} cannot be started"
    for line in shown.stdout.splitlines():
        if line.startswith("doctor:"):
            return json.loads(line[len("doctor:") :]), ""
    said = [line.strip() for line in shown.stderr.splitlines() if line.strip()] or [f"status {shown.status}"]
    return None, said[-1][:300]


def _package_info(machine: Machine, path: str) -> versions.PackageInfo | None:
    text = machine.read(path)
    return versions.parse_package_info(text) if text else None


def _driver_root(machine: Machine, setup: NodeSetup) -> str:
    """The folder that has driver/ and firmware/."""
    if setup.driver_path:
        return posixpath.dirname(setup.driver_path.rstrip("/"))
    installed = versions.parse_pairs(machine.read("/etc/ascend_install.info") or "")
    return installed.get("driver_install_path_param") or "/usr/local/Ascend"


def _cann_roots(machine: Machine, setup: NodeSetup) -> list[str]:
    """Folders of CANN toolkits, the one that would be used first."""
    environment = machine.environment
    roots = [setup.cann_path, environment.get("ASCEND_TOOLKIT_HOME", ""), environment.get("ASCEND_HOME_PATH", "")]
    for ascend in ASCEND_ROOTS:
        base = ascend.replace("~", environment.get("HOME", "~"), 1)
        roots += [f"{base}/ascend-toolkit/latest", f"{base}/cann", *reversed(machine.glob(f"{base}/cann-*"))]
    found: list[str] = []
    for root in roots:
        root = root.rstrip("/")
        if root and root not in found and machine.is_dir(root):
            found.append(root)
    return found


def _cann(machine: Machine, setup: NodeSetup, roots: list[str]) -> Cann | None:
    for root in roots:
        version = _cann_version(machine, root)
        sourced = bool(setup.cann_path or machine.environment.get("ASCEND_HOME_PATH"))
        sourced = sourced or bool(machine.environment.get("ASCEND_TOOLKIT_HOME"))
        if version or sourced:
            return Cann(root, version, sourced)
    return None


def _cann_version(machine: Machine, root: str) -> str | None:
    readers = [
        (path, versions.parse_install_info) for path in machine.glob(f"{root}/*-linux/ascend_toolkit_install.info")
    ]
    readers += [
        (f"{root}/version.cfg", versions.parse_version_cfg),
        (f"{root}/toolkit/version.info", versions.parse_toolkit_info),
        (f"{root}/share/info/runtime/version.info", versions.parse_toolkit_info),
        (f"{root}/runtime/version.info", versions.parse_toolkit_info),
    ]
    for path, parse in readers:
        version = parse(machine.read(path) or "")
        if version:
            return version
    return None


def _nnal(machine: Machine) -> str | None:
    home = machine.environment.get("ATB_HOME_PATH", "").rstrip("/")
    paths = [f"{home}/../../version.info", f"{home}/version.info"] if home else []
    for base in ASCEND_ROOTS:
        paths.append(f"{base.replace('~', machine.environment.get('HOME', '~'), 1)}/nnal/atb/latest/version.info")
    for path in paths:
        version = versions.parse_atb_info(machine.read(posixpath.normpath(path)) or "")
        if version:
            return version
    return None
