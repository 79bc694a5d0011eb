"""From `model_path` to a folder on this machine, and the JSON files in it. Reads no weights."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from executor.checkpoint.files import find_weights
from executor.checkpoint.parts import part_folders
from executor.errors import UserError, nearest
from executor.host.env import find_path, hub_offline

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
# What a checkpoint is made of; pickled weights and other frameworks' files are left behind.
_WANTED_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")


def find_checkpoint(model_path: str, hub: str) -> Path:
    """The folder of a checkpoint: a local path, else a hub id from the local cache, else downloaded.

    Raises UserError when it is neither there nor to be had, with the command that downloads it.
    """
    folder = find_path(model_path)
    if folder.is_dir():
        return folder
    _refuse_file(model_path, folder)
    if not _HUB_ID.match(model_path):
        raise UserError(
            f"model_config.model_path: there is no folder {model_path}{_neighbours(folder)}; give the folder of a "
            "checkpoint (config.json, *.safetensors, tokenizer files) or a hub id such as Qwen/Qwen3-VL-8B-Instruct"
        )
    return _from_modelscope(model_path) if hub == "modelscope" else _from_huggingface(model_path)


def is_hub_id(model_path: str) -> bool:
    """Whether this is the name of a model on a hub rather than a folder here."""
    return not find_path(model_path).exists() and bool(_HUB_ID.match(model_path))


def local_checkpoint(model_path: str, hub: str) -> Path | None:
    """The folder if it is on this machine, whole or with its config.json at least; nothing is downloaded.

    Raises UserError for what is no folder.
    """
    folder = find_path(model_path)
    if folder.is_dir():
        return folder
    _refuse_file(model_path, folder)
    if not _HUB_ID.match(model_path) or hub == "modelscope":
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(model_path, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return cached if (cached / "config.json").is_file() else None


def _refuse_file(model_path: str, found: Path) -> None:
    if found.exists():
        raise UserError(f"model_config.model_path: {model_path} is a file; it must be the folder of a checkpoint")


def read_json(folder: Path, name: str, *, required: bool = True) -> dict[str, Any]:
    """A JSON object of the checkpoint; {} for an absent one that is not `required`. UserError if it is broken."""
    path = Path(folder) / name
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if not required:
            return {}
        raise UserError(f"{folder} has no {name}: it is no checkpoint, or was not copied whole") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # damaged, of another encoding, numbers or nesting without end
        raise UserError(f"{path} is not valid JSON ({error}): copy it again from where it came") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _from_huggingface(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = list(_WANTED_FILES)
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=wanted))
        if _is_whole(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    command = f"hf download {hub_id} --local-dir weights/{hub_id.split('/')[1]}"
    if hub_offline():
        raise UserError(_not_here(hub_id, "downloads are switched off by HF_HUB_OFFLINE", command))
    logger.warning("downloading %s from the hub", hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    # httpx's and requests' errors are no OSErrors in every release of huggingface_hub; its own are.
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise UserError(_not_here(hub_id, f"the download failed: {_first_line(error)}", command)) from error


def _from_modelscope(hub_id: str) -> Path:
    command = f"modelscope download --model {hub_id} --local_dir weights/{hub_id.split('/')[1]}"
    try:
        from modelscope import snapshot_download
    except ImportError:
        reason = "hub: modelscope needs the package modelscope (pip install modelscope)"
        raise UserError(_not_here(hub_id, reason, command)) from None
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
        if _is_whole(folder):
            return folder
    except ValueError:  # modelscope's word for "not in the cache"
        pass
    logger.warning("downloading %s from modelscope", hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_WANTED_FILES)))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(_not_here(hub_id, f"the download failed: {_first_line(error)}", command)) from error


def _is_whole(folder: Path) -> bool:
    """An interrupted download leaves a folder without its config, or with an index and not all of its shards."""
    if not (folder / "config.json").is_file():
        return False
    try:
        for part in part_folders(folder) or (folder,):
            find_weights(part)
    except UserError:
        return False
    return True


def _not_here(hub_id: str, reason: str, command: str) -> str:
    folder = f"weights/{hub_id.split('/')[1]}"
    return (
        f"model_config.model_path: {hub_id} is neither a folder here nor in the local hub cache, and {reason}.\n"
        f"Download it where there is a network:  {command}\n"
        f"and then run with:  --set model_config.model_path={folder}"
    )


def _neighbours(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    return nearest(path.name, names)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
