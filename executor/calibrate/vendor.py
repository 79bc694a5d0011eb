"""msmodelslim instead of the built-in calibrator: whether it can make what is asked, and how it is driven.

It is installed by the user, in an environment of its own (it wants an older transformers), and found as a command. It
runs as a process: with a recipe, because without one it may ask a question; without stdin, where it would wait for the
answer; in folders that nobody else may write to, because it refuses others. It forgets files of the checkpoint, which
are added. Source: msmodelslim 26.1.0.
"""

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dataset.sample import media_source
from executor.calibrate.plan import FLOAT_MERGERS, FLOAT_WHERE_STATIC, ROUTER, VISION
from executor.calibrate.sample import check_count, chosen, open_calibration
from executor.calibrate.settings import STATIC, Settings
from executor.calibrate.write import is_other_file
from executor.checkpoint.writing import check_empty, copy_files, make_folder
from executor.errors import UserError
from models.registry import family_folder

logger = logging.getLogger(__name__)

COMMAND = "msmodelslim"
NO_OTHERS = 0o750, 0o640  # of folders and files that it reads and writes
ALPHA = 0.9  # of its own recipes for these models
SHARD_GB = 4
_SCOPES = {"W8A8": "per_tensor", "W8A8_DYNAMIC": "per_token", "W8A8_MIX": "pd_mix", "W4A8_DYNAMIC": "per_token"}
_A3B_HIDDEN_SIZE = 2048
_QWEN2_5 = {8192: "72B", 5120: "32B"}  # by hidden size


def find_tool(command: str = COMMAND) -> str | None:
    """The command's path, None where it is not installed."""
    return shutil.which(command)


def refusal(config: Mapping[str, Any], settings: Settings) -> str | None:
    """Why the tool cannot make this, None where it can."""
    if settings.scheme == "w8a8s":
        return "its v1 has no W8A8S for these models"
    if settings.percentile < 100 or settings.rounding != "nearest" or settings.quantize:
        return "--percentile, --rounding and --quantize belong to the built-in calibrator"
    if _is_qwen2_5(config) and config.get("tie_word_embeddings"):
        return "it stops at tied embeddings of Qwen2.5-VL, which have no lm_head.weight"
    return None


def model_type(config: Mapping[str, Any]) -> str:
    """Its name for the model: the one whose way through the tool fits, where it does not know the size."""
    text = config.get("text_config") or config
    if _is_qwen2_5(config):
        return f"Qwen2.5-VL-{_QWEN2_5.get(text.get('hidden_size'), '7B')}-Instruct"
    if text.get("num_experts"):
        return (
            "Qwen3-VL-235B-A22B"
            if text.get("num_experts") and text.get("hidden_size", 0) > 2048
            else "Qwen3-VL-30B-A3B"
        )
    return "Qwen3-VL-4B-Instruct" if _is_tied(config) else "Qwen3-VL-32B-Instruct"


def _is_qwen2_5(config: Mapping[str, Any]) -> bool:
    return family_folder(config) == "qwen2_5_vl"


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings"))


def recipe(config: Mapping[str, Any], settings: Settings, pictures: Path) -> dict[str, Any]:
    """Its recipe for these settings, as the content of a YAML file."""
    names = _old_names if _is_qwen2_5(config) else list
    steps: list[dict[str, Any]] = []
    kinds = settings.kinds
    if settings.smooth:
        parts = ["norm-linear", "ov", "up-down"]
        if not _is_qwen2_5(config):
            parts.append("linear-linear")
        if not _is_qwen2_5(config) and not _is_tied(config):
            steps.append({"type": "quarot", "block_size": 32})
        smooth = {"type": "iter_smooth", "alpha": settings.smooth, "scale_min": 1e-5, "symmetric": True}
        steps.append({**smooth, "enable_subgraph_type": parts, "include": ["*"]})
    stays = [*settings.keep_float]
    if kinds.linears != "W8A16":
        stays += FLOAT_MERGERS
    if kinds.linears in STATIC:
        stays += FLOAT_WHERE_STATIC
    if not settings.quantize_vision:
        stays.append(VISION)
    routers = [ROUTER, "*experts*"]
    steps.append(_linears(kinds.linears, ["*"], [*names(stays), *routers]))
    if (config.get("text_config") or config).get("num_experts"):
        steps.append(_linears(kinds.experts, ["*experts*"], [ROUTER, *names(list(settings.keep_float))]))
    label = {"w_bit": 8, "a_bit": 8, "is_sparse": False, "kv_cache": False}
    metadata = {"config_id": settings.scheme, "score": 90, "verified_model_types": ["any"], "label": label}
    save = [{"type": "ascendv1_saver", "part_file_size": SHARD_GB}]
    spec = {"process": steps, "save": save, "dataset": str(pictures), "default_text": "Describe this image."}
    return {"apiversion": "multimodal_vlm_modelslim_v1", "metadata": metadata, "spec": spec}


def _linears(kind: str, include: list[str], exclude: list[str]) -> dict[str, Any]:
    weight = {"scope": "per_channel", "dtype": "int4" if kind.startswith("W4") else "int8", "symmetric": True}
    scheme: dict[str, Any] = {"weight": {**weight, "method": "minmax"}}
    if kind in _SCOPES:
        symmetric = _SCOPES[kind] == "per_token"
        scheme["act"] = {"scope": _SCOPES[kind], "dtype": "int8", "symmetric": symmetric, "method": "minmax"}
    return {"type": "linear_quant", "qconfig": scheme, "include": include, "exclude": exclude}


def _old_names(patterns: list[str]) -> list[str]:
    """As the transformers that it uses for Qwen2.5-VL calls the parts."""
    return [
        pattern.replace("model.language_model.", "model.").replace("model.visual.", "visual.") for pattern in patterns
    ]


def write_pictures(data: Any, settings: Settings, folder: Path, path: Path) -> int:
    """The rows of a calibration set that are one picture and a text, in the form that it reads; how many."""
    rows = []
    for index in chosen(data, settings.samples):
        row = data[index]
        sources = [media_source(part) for part in row.media_parts]
        is_picture = len(sources) == 1 and row.media_parts[0].get("type", "image").startswith("image")
        if row.error or not is_picture or not isinstance(sources[0], str) or not Path(sources[0]).is_file():
            logger.warning("calibration: %s is left out: msmodelslim takes rows of one picture file", row.id)
            continue
        name = f"{len(rows):05d}{Path(sources[0]).suffix}"
        shutil.copyfile(sources[0], folder / name)
        rows.append({"image": name, "text": row.question or "Describe this image."})
    (folder / "index.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    check_count(len(rows), bool(rows), settings, path)
    return len(rows)


def drive(
    command: str, source: Path, config: Mapping[str, Any], out: Path, settings: Settings, calibration: Path, device: str
) -> int:
    """Let the tool write `out`, and add what it forgets; how many pictures it was shown.

    RuntimeError where it fails or writes nothing, with its last words.
    """
    check_empty(out)
    _check_modes(source)
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=out.parent) as scratch:
        pictures, written = (Path(scratch) / name for name in ("pictures", "written"))
        for folder in (pictures, written):
            folder.mkdir(mode=NO_OTHERS[0])
        count = write_pictures(open_calibration(calibration), settings, pictures, calibration)
        steps = Path(scratch) / "recipe.yaml"
        steps.write_text(yaml.safe_dump(recipe(config, settings, pictures), sort_keys=False))
        for file in (*pictures.iterdir(), steps):
            file.chmod(NO_OTHERS[1])
        words = [
            command,
            "quant",
            "--model_path",
            str(source.resolve()),
            "--save_path",
            str(written),
            "--device",
            device,
        ]
        words += ["--model_type", model_type(config), "--config_path", str(steps), "--trust_remote_code", "False"]
        _run(words)
        if not any(written.glob("quant_model_description*.json")):
            raise RuntimeError(f"{command} has ended without a word of failure, and has written no checkpoint")
        check_empty(out)  # again: another run may have written it meanwhile
        make_folder(out)
        copy_files(source, out, is_other_file)
        copy_files(written, out, lambda name: not name.name.endswith("_best_practice.yaml"))
    return count


def _check_modes(source: Path) -> None:
    """UserError for files that others may write to: the tool refuses them after minutes."""
    for path in (source, *source.iterdir()):
        if path.stat().st_mode & 0o022:
            raise UserError(
                f"--model_path: {path} may be written to by others, which msmodelslim refuses: chmod -R go-w "
                f"{source}, or use --tool builtin"
            )


def _run(words: Sequence[str]) -> None:
    """Run the tool; its own lines go to stderr, and its last ones into the error where it fails."""
    logger.info("running %s", " ".join(words))
    last: list[str] = []
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            for line in process.stdout:
                sys.stderr.write(line)
                last = [*last[-7:], line.rstrip()]
        except BaseException:  # a signal, too: it would go on by itself for hours
            process.terminate()
            raise
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with status {process.returncode}: " + " | ".join(filter(None, last)))
