"""Judges chips, their driver and firmware."""

from __future__ import annotations

from collections import Counter

from executor.doctor import versions
from executor.doctor.facts import RANKS_PER_NODE, Facts
from executor.doctor.findings import ERROR, NOTE, OK, UNKNOWN, WARNING, Finding
from executor.host.npu_smi import DUO

NODES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
"""Device files every process that uses a chip opens, besides its /dev/davinciN."""

_VARIANTS = {
    ("910B4", 32): "the 32 GB variant, 0.8 TB/s",
    ("910B4", 64): "the 64 GB variant, 1.6 TB/s",
    ("310P3", 24): "the 24 GB variant: half the model of a 48 GB chip",
    ("310P3", 48): "the 48 GB variant",
}
_BUSY_SHARE = 0.2  # an idle chip shows 3 to 9 % of its memory in use


def check(facts: Facts) -> list[Finding]:
    """All findings about the NPUs; one line on a machine that has none and needs none."""
    if not facts.chip_count:
        return [_no_chips(facts)]
    findings = [_chips(facts), _smi(facts)]
    if facts.chips:
        findings += [_health(facts), _in_use(facts)]
    return [*findings, _device_nodes(facts), _driver(facts), _firmware(facts), _visible(facts)]


def _no_chips(facts: Facts) -> Finding:
    on_bus = _on_bus(facts)
    if on_bus:
        advice = (
            "install the driver and firmware of this card, then restart (hiascend.com, Firmware and Drivers); in a "
            "container pass the /dev/davinciN, /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc"
        )
        status = ERROR if facts.on_npu else WARNING
        return Finding("chips", status, f"{on_bus} on the PCI bus, but {_silence(facts)}", "", advice)
    if not facts.on_npu:
        return Finding("chips", NOTE, "no Ascend NPU on this machine")
    return Finding(
        "chips",
        ERROR,
        f"no Ascend NPU: {_silence(facts)}, no /dev/davinci*",
        "an Ascend NPU, because the recipe says so",
        "run the recipe on an Ascend machine; here a small model runs with --set model_config.device=cpu (or "
        "npu_emulated, to try the NPU code without a chip). In a container check that it was started with the NPUs' "
        "devices",
    )


def _silence(facts: Facts) -> str:
    return facts.smi_problem or "the driver shows no chip"


def _on_bus(facts: Facts) -> str:
    """Huawei's processing accelerators (PCI vendor 19e5, class 1200) that sysfs lists."""
    found = 0
    for path in facts.machine.glob("/sys/bus/pci/devices/*/vendor"):
        if (facts.machine.read(path) or "").strip().lower() == "0x19e5":
            kind = facts.machine.read(path[: -len("vendor")] + "class") or ""
            found += kind.strip().lower().startswith("0x1200")
    return f"{found} Huawei accelerator(s)" if found else ""


def _chips(facts: Facts) -> Finding:
    name = facts.chip_name or "a kind that neither npu-smi nor torch_npu tells"
    sizes = Counter(chip.nominal_gb for chip in facts.chips if chip.nominal_gb)
    memory = " and ".join(f"{size} GB" for size in sorted(sizes))
    short = name[len("Ascend") :] if name.startswith("Ascend") and len(name) > 9 else name
    found = f"{facts.chip_count} x {short}"
    if facts.family:
        found += f" ({facts.family})"
    if memory:
        found += f", {memory} each" if len(sizes) == 1 else f", {memory}"
        remark = _VARIANTS.get((short.split("-")[0], next(iter(sizes)))) if len(sizes) == 1 else None
        found += f": {remark}" if remark else ""
    if facts.family == DUO and facts.chips:
        cards = Counter(chip.npu_id for chip in facts.chips)
        found += f"; {len(cards)} card(s) of {max(cards.values())} chip(s)"
    if facts.family is None:
        status = ERROR if facts.on_npu and facts.chip_name else UNKNOWN
        advice = "this project has backends for 910B1 to 910B4 (A2), Ascend910_93xx (A3) and 310P3 (300I DUO)"
        return Finding("chips", status, found, "a chip of those families", advice)
    customary = RANKS_PER_NODE.get(facts.family)
    advice = ""
    if customary and facts.chip_count < customary:
        advice = f"a whole {facts.family} node has {customary}; in a container this may be all it was given"
    return Finding("chips", OK, found, "", advice)


def _smi(facts: Facts) -> Finding:
    if not facts.smi_problem:
        return Finding("npu_smi", OK, f"lists {len(facts.chips)} chip(s)")
    advice = "in a container mount /usr/local/bin/npu-smi, /usr/local/dcmi and the driver's folder"
    if "is used" in facts.smi_problem:
        advice = (
            "another container holds the same chips: stop it, or give this one other chips (ASCEND_VISIBLE_DEVICES)"
        )
    return Finding("npu_smi", WARNING, facts.smi_problem, "a table of chips", advice)


def _health(facts: Facts) -> Finding:
    ill = [f"{chip.npu_id}.{chip.chip_id} {chip.health}" for chip in facts.chips if chip.health != "OK"]
    if not ill:
        return Finding("chip_health", OK, "all OK")
    return Finding(
        "chip_health",
        WARNING,
        f"card.chip: {', '.join(ill)}",
        "OK",
        "`npu-smi info -t health -i CARD` names the fault; leave the chip out with ASCEND_RT_VISIBLE_DEVICES, or reset "
        "it (`npu-smi set -t reset -i CARD -c CHIP`) when nobody uses it",
    )


def _in_use(facts: Facts) -> Finding:
    seen = facts.visible.devices if facts.visible else range(len(facts.chips))
    busy = [
        f"device {device}: {facts.chips[device].used_mb} of {facts.chips[device].total_mb} MB"
        for device in seen
        if device < len(facts.chips) and facts.chips[device].used_mb > _BUSY_SHARE * facts.chips[device].total_mb > 0
    ]
    if not busy:
        return Finding("chip_memory_in_use", OK, "all free")
    return Finding(
        "chip_memory_in_use",
        WARNING,
        "; ".join(busy[:8]) + (" ..." if len(busy) > 8 else ""),
        "free chips",
        "another program uses them (last table of `npu-smi info`): stop it, or choose free chips with "
        "ASCEND_RT_VISIBLE_DEVICES",
    )


def _device_nodes(facts: Facts) -> Finding:
    nodes = [*NODES, *facts.machine.glob("/dev/davinci[0-9]*")]
    missing = [node for node in nodes if not facts.machine.exists(node)]
    closed = [node for node in nodes if node not in missing and not facts.machine.accessible(node)]
    if not missing and not closed:
        return Finding(
            "device_nodes", OK, f"{len(nodes) - len(NODES)} /dev/davinciN, manager, svm and hdc, all accessible"
        )
    found = "; ".join(
        f"{word}: {', '.join(group)}" for word, group in (("missing", missing), ("not accessible", closed)) if group
    )
    advice = (
        "start the container with --device for each of them" if missing else "add this user to the group HwHiAiUser"
    )
    return Finding("device_nodes", ERROR if facts.on_npu else WARNING, found, "readable and writable", advice)


def _driver(facts: Facts) -> Finding:
    named = facts.driver.package or facts.driver.version if facts.driver else None
    version = named or facts.smi_version
    if not version:
        return Finding(
            "driver",
            UNKNOWN,
            "neither npu-smi nor driver/version.info tells",
            "",
            "in a container mount the driver's folder and /etc/ascend_install.info; else name it: driver_path in "
            "executor/scripts/set_env.sh",
        )
    if named and facts.smi_version and not facts.smi_version.lower().startswith(named.lower()):
        return Finding(
            "driver",
            WARNING,
            f"{named} by its version.info, {facts.smi_version} by npu-smi",
            "one version",
            "the machine was not restarted after an update, or the container's driver folder is not the host's",
        )
    return Finding("driver", OK, version)


def _firmware(facts: Facts) -> Finding:
    version = facts.firmware.version if facts.firmware else None
    on_board = facts.board.get("Firmware Version", "")
    version = version or (on_board if versions.numbers(on_board) else None)
    if not version:
        return Finding("firmware", UNKNOWN, "told by neither npu-smi nor firmware/version.info (usual in containers)")
    fits = versions.firmware_fits(facts.driver, version) if facts.driver else None
    if fits is False and facts.driver:
        ranges = ", ".join(f"{low} to {high}" for low, high in facts.driver.accepts)
        return Finding(
            "firmware",
            WARNING,
            version,
            f"{ranges}, says the driver",
            "install the firmware package of the driver's release",
        )
    remark = " (within what the driver names)" if fits else ""
    return Finding("firmware", OK, version + remark)


def _visible(facts: Facts) -> Finding:
    text = facts.machine.environment.get("ASCEND_RT_VISIBLE_DEVICES", "")
    visible = facts.visible
    if visible is None:
        return Finding("visible_devices", OK, f"ASCEND_RT_VISIBLE_DEVICES is not set: all {facts.chip_count}")
    found = f"ASCEND_RT_VISIBLE_DEVICES={text}: {len(visible.devices)} of {facts.chip_count}"
    if visible.problem:
        return Finding(
            "visible_devices", WARNING, f"{found}; {visible.problem}", "0,1,2 ...", "write it so, or unset it"
        )
    return Finding("visible_devices", OK, found)
