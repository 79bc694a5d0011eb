"""Judges whether a recipe can run on this machine: device, types, ranks, checkpoint, room."""

from __future__ import annotations

import json
import posixpath
import re

from executor.doctor.facts import Facts
from executor.doctor.findings import ERROR, NOTE, OK, UNKNOWN, WARNING, Finding
from executor.doctor.recipe import Wish
from executor.host.npu_smi import DUO

_PART = re.compile(r"part\d+-of-(\d+)/")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def check(facts: Facts) -> list[Finding]:
    """All findings about the recipe; none without one."""
    wish = facts.wish
    if wish is None:
        return [_disk(facts, facts.machine.cwd, "disk")]
    folder = facts.path(wish.model_path)
    findings = [_device(facts, wish), _dtype(facts, wish), _world(facts, wish), _model(facts, wish, folder)]
    weights = _weights_bytes(facts, folder)
    if weights:
        findings.append(_room(facts, wish, weights))
    findings.append(_disk(facts, folder if facts.machine.exists(folder) else _hub_cache(facts), "disk"))
    if not facts.machine.port_is_free(wish.port):
        advice = "for `serve` choose another: --set server_config.port=..."
        findings.append(Finding("server_port", WARNING, f"port {wish.port} is taken", "free", advice))
    return findings


def _device(facts: Facts, wish: Wish) -> Finding:
    found = f"device {wish.device}" + (f", soc {wish.soc}" if wish.soc else "")
    if wish.device == "cuda" and not facts.machine.glob("/dev/nvidia[0-9]*"):
        return Finding("recipe_device", ERROR, f"{found}, but no NVIDIA GPU here", "", "--set model_config.device=cpu")
    if wish.device == "npu_emulated":
        if not wish.soc:
            return Finding("recipe_device", ERROR, found, "a chip to emulate", "--set model_config.soc=atlas_800i_a2")
        if facts.machine.run(["gcc", "--version"]) is None:
            return Finding(
                "recipe_device", ERROR, f"{found}, but no gcc here", "gcc", "install gcc: it builds the stubs"
            )
        return Finding("recipe_device", OK, found)
    if wish.soc and wish.device not in ("npu", "auto"):
        advice = f"set device: npu, or on this machine: --set model_config.soc=null with device {wish.device}"
        return Finding("recipe_device", ERROR, found, "device npu for a soc", advice)
    if wish.soc and facts.family and wish.soc != facts.family:
        advice = f"--set model_config.soc={facts.family} (or null: asked from the driver), and see that dtype suits it"
        return Finding("recipe_device", ERROR, f"{found}, but the chips here are {facts.family}", facts.family, advice)
    if facts.on_npu and not facts.chip_count:
        return Finding("recipe_device", ERROR, f"{found}, but no NPU here", "an NPU", "see chips, above")
    return Finding("recipe_device", OK, found)


def _dtype(facts: Facts, wish: Wish) -> Finding:
    """300I DUO computes in float16 only and decodes eagerly only; graphs need the device they are made for."""
    family = wish.soc or (facts.family if facts.on_npu else None)
    found = f"dtype {wish.dtype}, exe_mode {wish.exe_mode}"
    if family == DUO and wish.dtype not in ("auto", "float16"):
        return Finding(
            "recipe_dtype", ERROR, found, "float16 on 300I DUO", "--set model_config.dtype=auto (or float16)"
        )
    if family == DUO and wish.exe_mode != "eager":
        return Finding("recipe_dtype", ERROR, found, "eager on 300I DUO", "--set model_config.exe_mode=eager")
    if family and family != DUO and wish.quantization == "w8a8sc":
        return Finding("recipe_dtype", ERROR, f"{found}, w8a8sc", "300I DUO for w8a8sc", "use the w8a8 checkpoint")
    if wish.exe_mode in ("ge_graph", "npugraph_ex") and wish.device in ("cpu", "cuda"):
        return Finding("recipe_dtype", ERROR, found, "an npu device", "--set model_config.exe_mode=eager")
    return Finding("recipe_dtype", OK, found)


def _world(facts: Facts, wish: Wish) -> Finding:
    nodes, world = facts.num_nodes, wish.world_size
    found = f"world_size {world}, attn_tp_size {wish.attn_tp_size or world}"
    if wish.attn_tp_size and world % wish.attn_tp_size:
        advice = "world_size must be a multiple of attn_tp_size (each group of that many is one replica)"
        return Finding("recipe_world_size", ERROR, found, "a multiple", advice)
    if world > 1 and world % nodes:
        advice = "every node runs the same number of ranks: correct world_size, or IPs in executor/scripts/set_env.sh"
        return Finding("recipe_world_size", ERROR, f"{found} on {nodes} nodes", f"a multiple of {nodes}", advice)
    if not facts.on_npu:
        return Finding("recipe_world_size", OK, found)
    usable = facts.usable_chips
    if not usable:
        status, why = (ERROR, "see visible_devices") if facts.chip_count else (UNKNOWN, "see recipe_device")
        return Finding("recipe_world_size", status, f"{found}; no usable chip here", "1 or more", why)
    found += f"; {usable} usable chip(s) x {nodes} node(s)"
    if world > usable * nodes:
        advice = (
            f"--set parallel_config.world_size={max(1, usable * nodes)} (and attn_tp_size to suit), add nodes to IPs "
            "in executor/scripts/set_env.sh, or chips to ASCEND_RT_VISIBLE_DEVICES"
        )
        return Finding("recipe_world_size", ERROR, found, f"at most {usable * nodes}", advice)
    return Finding("recipe_world_size", OK, found)


def _model(facts: Facts, wish: Wish, folder: str) -> Finding:
    machine, path = facts.machine, wish.model_path
    if not machine.is_dir(folder):
        if _HUB_ID.match(path) and not machine.exists(folder):
            return _hub_model(facts, path)
        advice = "correct model_config.model_path, or bring the checkpoint there (on every node at the same place)"
        return Finding("model_path", ERROR, f"{path}: there is no such folder", "a checkpoint", advice)
    if not machine.exists(posixpath.join(folder, "config.json")):
        advice = "the folder must be the checkpoint itself, the one that holds config.json and *.safetensors"
        return Finding("model_path", ERROR, f"{folder} has no config.json", "config.json", advice)
    files = _weight_files(facts, folder)
    missing = [name for name in files if not machine.size_bytes(posixpath.join(folder, name))]
    if missing:
        found = f"{folder} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing[:3])}"
        return Finding("model_path", ERROR, found, "all of its index", "finish the download or the copy")
    size = len({posixpath.dirname(name) for name in files} - {""})
    ranks = wish.attn_tp_size or wish.world_size
    if size and size != ranks:
        found = f"{folder} was compressed for {size} rank(s), the recipe has {ranks}"
        advice = f"--set parallel_config.attn_tp_size={size}, or compress the w8a8s weights again for {ranks}"
        return Finding("model_path", ERROR, found, f"{size} ranks", advice)
    if not files:
        advice = "bring the weights there; other formats (*.bin) have to be converted to safetensors"
        return Finding("model_path", ERROR, f"{folder} has no *.safetensors", "weights", advice)
    return Finding("model_path", OK, f"{folder}, {len(files)} weight file(s), {_gb(_weights_bytes(facts, folder))}")


def _weight_files(facts: Facts, folder: str) -> list[str]:
    """Names of the weight files: as the index has them, else as they lie there."""
    for index in facts.machine.glob(posixpath.join(folder, "*.safetensors.index.json")):
        try:
            named = json.loads(facts.machine.read(index) or "")["weight_map"].values()
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        return sorted({str(name) for name in named})
    here = [posixpath.basename(path) for path in facts.machine.glob(posixpath.join(folder, "*.safetensors"))]
    return here or _files_of_parts(facts, folder)


def _files_of_parts(facts: Facts, folder: str) -> list[str]:
    """Of weights that were compressed for a number of ranks: those of every part, a name for a part that is absent."""
    found = facts.machine.glob(posixpath.join(folder, "part*-of-*", "*.safetensors"))
    names = [posixpath.relpath(path, folder) for path in found]
    sizes = {int(numbered[1]) for numbered in map(_PART.match, names) if numbered}
    there = {posixpath.dirname(name) for name in names}
    parts = [f"part{rank}-of-{size}" for size in sorted(sizes) for rank in range(size)]
    return sorted([*names, *(f"{part}/*.safetensors" for part in parts if part not in there)])


def _weights_bytes(facts: Facts, folder: str) -> int:
    return sum(facts.machine.size_bytes(posixpath.join(folder, name)) for name in _weight_files(facts, folder))


def _hub_cache(facts: Facts) -> str:
    environment = facts.machine.environment
    home = environment.get("HF_HOME") or posixpath.join(environment.get("HOME", "/"), ".cache/huggingface")
    return environment.get("HF_HUB_CACHE") or posixpath.join(home, "hub")


def _hub_model(facts: Facts, name: str) -> Finding:
    cached = posixpath.join(_hub_cache(facts), "models--" + name.replace("/", "--"))
    if facts.machine.glob(posixpath.join(cached, "snapshots/*/config.json")):
        return Finding("model_path", OK, f"{name}, in the local hub cache")
    environment = facts.machine.environment
    if any(
        environment.get(key, "").lower() in ("1", "true", "yes", "on")
        for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        advice = f"unset HF_HUB_OFFLINE, or on a machine with a network: hf download {name}"
        return Finding("model_path", ERROR, f"{name} is not here, and downloads are forbidden", "a checkpoint", advice)
    if facts.machine.is_dir(posixpath.dirname(facts.path(name))):
        advice = f"if a folder is meant, correct model_config.model_path; else it is downloaded from the hub as {name}"
        return Finding(
            "model_path", WARNING, f"{name}: {name.split('/')[0]} is a folder here and has no such one", "", advice
        )
    advice = f"it is downloaded when the recipe first runs; beforehand: hf download {name}"
    return Finding("model_path", NOTE, f"{name} is no folder here and not in the local hub cache", "", advice)


def _room(facts: Facts, wish: Wish, weights: int) -> Finding:
    """The least that a rank can hold is its part of the weights; `plan` computes the rest."""
    if not facts.on_npu:
        free = facts.machine.memory_bytes()
        found = f"weights {_gib(weights)}, host memory {_gib(free)}"
        status = ERROR if weights > free and wish.device in ("cpu", "auto") else OK
        advice = "use a smaller model" if status == ERROR else ""
        return Finding("recipe_memory", status, found, "weights and KV cache in memory" if advice else "", advice)
    sizes = [chip.total_mb * 2**20 for chip in facts.chips if chip.total_mb]
    share = weights // (wish.attn_tp_size or wish.world_size)
    if not sizes:
        return Finding(
            "recipe_memory", UNKNOWN, f"{_gib(share)} of weights for each rank; the chips' memory is not told"
        )
    found = f"about {_gib(share)} of weights for each rank, {_gib(min(sizes))} on a chip"
    if weights // wish.world_size > min(sizes):  # even when experts are spread over all ranks
        advice = "more ranks (attn_tp_size), a quantized checkpoint, or a smaller model"
        return Finding("recipe_memory", ERROR, found, "weights and KV cache on the chip", advice)
    if share > 0.85 * min(sizes):
        advice = "little or nothing is left for the KV cache: `bash infer.sh RECIPE plan` computes it"
        return Finding("recipe_memory", WARNING, found, "", advice)
    return Finding("recipe_memory", OK, found)


def _disk(facts: Facts, path: str, name: str) -> Finding:
    free = facts.machine.free_disk_bytes(path)
    if free is None:
        return Finding(name, UNKNOWN, f"the free space of {path} is not told")
    if free < 2**30:
        advice = "logs, compile caches and downloads need room: clear some"
        return Finding(name, WARNING, f"{_gb(free)} free at {path}", "1 GB or more", advice)
    return Finding(name, OK, f"{_gb(free)} free at {path}")


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
