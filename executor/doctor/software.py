"""Judges Python, CANN, NNAL, torch and torch_npu, and whether they go together."""

from __future__ import annotations

import posixpath
import re

from executor.doctor import versions
from executor.doctor.facts import Facts
from executor.doctor.findings import ERROR, NOTE, OK, UNKNOWN, WARNING, Finding
from executor.host.npu_smi import A2, A3, DUO

OLDEST_PYTHON = (3, 11)
KERNELS = {A2: "ascend910b", A3: "ascend910_93", DUO: "ascend310p"}
JEMALLOC = (
    "/usr/lib/*/libjemalloc.so*",
    "/usr/lib64/libjemalloc.so*",
    "/usr/lib/libjemalloc.so*",
    "/usr/local/lib*/libjemalloc.so*",
)

# What an import of torch_npu says when something is not found, and what that means.
_SYMPTOMS = (
    ("libascend_hal", "the driver's libraries are not found: set driver_path in executor/scripts/set_env.sh"),
    ("libatb", "NNAL is not found: install it and source nnal/atb/set_env.sh"),
    (
        r"lib(hccl|ascendcl|ge_runner|graph|acl|runtime|error_manager)",
        "source CANN's set_env.sh (cann_path in executor/scripts/set_env.sh)",
    ),
    (
        "undefined symbol",
        "torch and torch_npu, or torch_npu and CANN, are not of one release: install a documented pair",
    ),
    ("drv|507899|device is used", "the driver does not answer: look at `npu-smi info` first"),
)


def check(facts: Facts) -> list[Finding]:
    """All findings about software."""
    findings = [_python(facts), _packages(facts), _torch(facts)]
    if facts.on_npu or facts.cann or facts.packages["torch_npu"]:
        findings += [_torch_npu(facts), _cann(facts)]
        if facts.cann and facts.family:
            findings.append(_kernels(facts))
        findings += [_pair(facts), _nnal(facts)]
        if facts.packages["torch_npu"]:
            findings.append(_import(facts))
    if facts.on_npu:
        findings += [_forbidden(facts), _jemalloc(facts)]
    return findings


def _python(facts: Facts) -> Finding:
    version = ".".join(str(part) for part in facts.machine.python_version)
    found = f"{version} ({facts.machine.python_path})"
    if facts.machine.python_version < OLDEST_PYTHON:
        advice = (
            "install one (the system's package, or conda) and name it: PYTHON=/path/to/python3.11 bash infer.sh ..."
        )
        other = _newer_python(facts)
        if other:
            advice = f"infer.sh uses {other}; run the doctor with it to see its packages"
        return Finding("python", WARNING if other else ERROR, found, "3.11 or newer", advice)
    venv = posixpath.join(facts.repo_root, ".venv/bin/python")
    if facts.machine.exists(venv) and not facts.machine.python_path.startswith(posixpath.dirname(venv)):
        return Finding("python", OK, found, "", f"infer.sh may use {venv}: run the doctor with it to see its packages")
    return Finding("python", OK, found)


def _newer_python(facts: Facts) -> str | None:
    """The interpreter that infer.sh would take instead of one that is too old."""
    question = "import sys; sys.exit(sys.version_info < (3, 11))"
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11"):
        shown = facts.machine.run([name, "-c", question])
        if shown and shown.status == 0:
            return name
    return None


def _packages(facts: Facts) -> Finding:
    text = facts.machine.read(posixpath.join(facts.repo_root, "requirements.txt")) or ""
    names = re.findall(r"^([A-Za-z][\w.-]*)", text, re.MULTILINE)
    missing = [name for name in names if facts.machine.package(name) is None]
    if missing:
        advice = "infer.sh installs them into .venv when it is first run (without touching a torch that is there)"
        return Finding("packages", NOTE, f"this Python lacks {', '.join(missing)}", "requirements.txt", advice)
    if not names:
        return Finding("packages", UNKNOWN, "there is no requirements.txt to compare with")
    return Finding("packages", OK, "all of requirements.txt is there")


def _torch(facts: Facts) -> Finding:
    version = facts.packages["torch"]
    if version is None:
        status = ERROR if facts.on_npu else NOTE
        advice = (
            "install the torch that your torch_npu is made for" if facts.on_npu else "infer.sh installs it into .venv"
        )
        return Finding("torch", status, "not installed", "2.7.1 to 2.14", advice)
    if not versions.is_supported_torch(version):
        return Finding("torch", WARNING, version, "2.7.1 to 2.14", "outside what this project is tested with")
    return Finding("torch", OK, version)


def _torch_npu(facts: Facts) -> Finding:
    version, torch = facts.packages["torch_npu"], facts.packages["torch"]
    if version is None:
        advice = "pip install the torch_npu for this CANN (table in docs/doctor.md) and the torch of the same number"
        return Finding("torch_npu", ERROR if facts.on_npu else NOTE, "not installed", "2.7.1 to 2.14", advice)
    if torch and not versions.torch_matches(torch, version):
        number = ".".join(str(part) for part in versions.numbers(version)[:3])
        advice = f"torch_npu is built for one torch: install torch=={number}, or another torch_npu"
        return Finding(
            "torch_npu",
            ERROR if facts.on_npu else WARNING,
            f"{version} beside torch {torch}",
            f"torch {number}",
            advice,
        )
    if not versions.is_supported_torch(version):
        return Finding("torch_npu", WARNING, version, "2.7.1 to 2.14", "outside what this project is tested with")
    return Finding("torch_npu", OK, f"{version}, made for this torch")


def _cann(facts: Facts) -> Finding:
    status = ERROR if facts.on_npu else NOTE
    if facts.cann is None:
        advice = (
            "install the CANN toolkit and the kernels (ops) package of this chip, or use an image that has them; "
            "when it lies elsewhere: cann_path in executor/scripts/set_env.sh"
        )
        return Finding("cann", status, "not found below /usr/local/Ascend and ~/Ascend", "a CANN toolkit", advice)
    if facts.setup.cann_path and facts.setup.cann_path.rstrip("/") != facts.cann.root:
        advice = "correct cann_path in executor/scripts/set_env.sh, or leave it empty"
        return Finding("cann", status, f"cann_path={facts.setup.cann_path} is no folder of a CANN toolkit", "", advice)
    version = facts.cann.version or "of unknown version"
    others = [root for root in facts.cann_roots if root != facts.cann.root]
    found = f"{version} in {facts.cann.root}" + (f"; also {', '.join(others)}" if others else "")
    if not facts.cann.sourced:
        advice = f"source its set_env.sh, or set cann_path={facts.cann.root} in executor/scripts/set_env.sh"
        return Finding("cann", status, found, "its environment set", advice)
    return Finding("cann", OK if facts.cann.version else UNKNOWN, found)


def _kernels(facts: Facts) -> Finding:
    folder = f"{facts.cann.root}/opp/built-in/op_impl/ai_core/tbe/kernel" if facts.cann else ""
    wanted = KERNELS[facts.family or A2]
    installed = [posixpath.basename(path) for path in facts.machine.glob(f"{folder}/ascend*")]
    if not installed:
        return Finding(
            "kernels", UNKNOWN, f"no kernels in {folder}", wanted, "install CANN's kernels (ops) package of this chip"
        )
    if any(name.startswith(wanted) for name in installed):
        return Finding("kernels", OK, ", ".join(installed))
    advice = "install CANN's kernels (ops) package of this chip, of the same release as the toolkit"
    return Finding("kernels", ERROR if facts.on_npu else WARNING, ", ".join(installed), wanted, advice)


def _pair(facts: Facts) -> Finding:
    torch_npu, cann = facts.packages["torch_npu"], facts.cann.version if facts.cann else None
    if not torch_npu or not cann:
        return Finding("torch_npu_cann", UNKNOWN, "one of the two is missing or tells no version")
    found = f"torch_npu {torch_npu} with CANN {cann}"
    documented = versions.documented_cann(torch_npu)
    if any(versions.same_cann(cann, name) for name in documented):
        return Finding("torch_npu_cann", OK, f"{found}: a documented pair")
    if documented:
        return Finding(
            "torch_npu_cann",
            UNKNOWN,
            f"{found}: not in the table",
            f"CANN {' or '.join(documented)}",
            "it may work; when an operator fails, try the documented pair first",
        )
    near = versions.documented_near(torch_npu)
    return Finding(
        "torch_npu_cann",
        UNKNOWN,
        f"{found}: this release is in no table known here",
        f"near it: {near}" if near else "",
        "compare with the version table of torch_npu's own documentation",
    )


def _nnal(facts: Facts) -> Finding:
    needed = facts.family == DUO or bool(facts.wish and facts.wish.soc == DUO)
    status = (ERROR if facts.on_npu else NOTE) if needed else NOTE
    if facts.nnal is None:
        why = "300I DUO computes attention with it" if needed else "not needed on A2 and A3"
        advice = "install NNAL of CANN's release and source nnal/atb/set_env.sh" if needed else ""
        return Finding("nnal", status, f"not installed ({why})", "NNAL (ATB)" if needed else "", advice)
    home = facts.machine.environment.get("ATB_HOME_PATH", "")
    if needed and not home:
        return Finding("nnal", status, f"{facts.nnal}, not sourced", "ATB_HOME_PATH", "source nnal/atb/set_env.sh")
    abi = re.search(r"cxx_abi_([01])", home)
    ours = facts.probe.get("cxx11_abi") if facts.probe else None
    if abi and ours is not None and int(abi.group(1)) != ours:
        advice = f"source nnal/atb/set_env.sh --cxx_abi={ours}, which is how this torch is built"
        return Finding("nnal", WARNING, f"{facts.nnal} with cxx_abi_{abi.group(1)}", f"cxx_abi_{ours}", advice)
    if facts.cann and facts.cann.version and not versions.same_cann(facts.nnal, facts.cann.version):
        return Finding(
            "nnal", WARNING, facts.nnal, f"CANN's own release, {facts.cann.version}", "install NNAL of that release"
        )
    return Finding("nnal", OK, facts.nnal)


def _import(facts: Facts) -> Finding:
    status = ERROR if facts.on_npu else WARNING
    if facts.probe is None:
        meaning = next((advice for sign, advice in _SYMPTOMS if re.search(sign, facts.probe_problem)), "")
        if not facts.on_npu:
            meaning = (
                "with torch_npu installed and no CANN, a plain `import torch` fails: uninstall torch_npu, or set "
                "TORCH_DEVICE_BACKEND_AUTOLOAD=0"
            )
        return Finding("torch_npu_import", status, facts.probe_problem, "import torch, torch_npu", meaning)
    if not facts.probe["npus"]:
        return Finding(
            "torch_npu_import", status, "imports, but sees no NPU", "1 or more", "see chips, device_nodes and driver"
        )
    return Finding("torch_npu_import", OK, f"imports and sees {facts.probe['npus']} NPU(s), {facts.probe['name']}")


def _forbidden(facts: Facts) -> Finding:
    there = [f"{name} {facts.packages[name]}" for name in ("triton", "triton-ascend") if facts.packages[name]]
    on_duo = facts.family == DUO or bool(facts.wish and facts.wish.soc == DUO)
    if there and on_duo:
        names = " ".join(name.split()[0] for name in there)
        return Finding("forbidden_packages", ERROR, ", ".join(there), "no triton on 300I DUO", f"pip uninstall {names}")
    return Finding("forbidden_packages", OK, f"{', '.join(there)}, allowed on this chip" if there else "none")


def _jemalloc(facts: Facts) -> Finding:
    if "jemalloc" in facts.machine.environment.get("LD_PRELOAD", ""):
        return Finding("jemalloc", OK, "preloaded")
    there = [path for pattern in JEMALLOC for path in facts.machine.glob(pattern)]
    if there:
        return Finding("jemalloc", OK, there[0])
    return Finding(
        "jemalloc",
        NOTE,
        "not installed",
        "",
        "a faster allocator for the host: apt install libjemalloc2 or yum install jemalloc",
    )
