"""What a checkpoint folder says besides its weights: JSON files, tokenizer, chat template, pixel settings.

Reads local files only; never downloads, never runs code that comes with a checkpoint, needs no processor class of
transformers (those want torchvision). Knows no model family: a family hands in the defaults of its own classes.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executor.checkpoint.folder import read_json
from executor.errors import UserError

BICUBIC = 3  # PIL's number, as checkpoints write it


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, from tokenizer.json or from vocab.json and merges.txt."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model_path '{folder}' is not a folder; give the local folder of a checkpoint")
    has_pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not (folder / "tokenizer.json").is_file() and not has_pair:
        raise UserError(
            f"model_path '{folder}' has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt; "
            "copy them from the original checkpoint"
        )
    from transformers import AutoTokenizer  # two seconds; whoever only checks a recipe does not pay them

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer in '{folder}' cannot be read: {error}") from error


def load_chat_template(folder: Path, tokenizer: Any) -> str:
    """The Jinja chat template, where transformers' processors look: chat_template.jinja, chat_template.json,
    processor_config.json, then the tokenizer's own. The first wins: some tokenizers carry a text-only template."""
    path = Path(folder) / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        template = read_json(folder, name, required=False).get("chat_template")
        if isinstance(template, dict):  # several templates by name
            template = template.get("default")
        if isinstance(template, str):
            return template
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise UserError(
            f"model_path '{folder}' has no chat template: neither chat_template.jinja, chat_template.json nor one in "
            "tokenizer_config.json; copy the file from the original checkpoint"
        )
    return template


def load_tools_template(folder: Path, tokenizer: Any) -> str | None:
    """The tokenizer's own template (tokenizer_config.json) where it renders tools, else None.

    Read from the file: a chat_template.jinja beside it takes its place in `tokenizer`.
    """
    for template in (
        read_json(folder, "tokenizer_config.json", required=False).get("chat_template"),
        tokenizer.chat_template,
    ):
        if isinstance(template, list):  # the older form: [{"name", "template"}]
            template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default")
        if isinstance(template, str) and re.search(r"\btools\b", template):
            return template
    return None


def read_eos_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: generation_config.json's, else config.json's, else the tokenizer's."""
    config = read_json(folder, "config.json", required=False)
    for holder in (read_json(folder, "generation_config.json", required=False), config, config.get("text_config", {})):
        ids = holder.get("eos_token_id")
        if isinstance(ids, int):
            return (ids,)
        if ids:
            return tuple(ids)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model_path '{folder}' names no eos_token_id, neither in generation_config.json, config.json nor in the "
            "tokenizer: an answer could never end"
        )
    return (tokenizer.eos_token_id,)


@dataclass(frozen=True)
class PixelSettings:
    """How frames become patches. Sizes in pixels; mean and std of channel values scaled to [0, 1].

    `min_pixels`, `max_pixels` bound a picture's area after the resize. For a video they bound what the family's
    transformers class bounds: one frame (Qwen2.5) or all frames together (Qwen3).
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int
    max_pixels: int

    @property
    def factor(self) -> int:
        """Height and width after the resize are multiples of this."""
        return self.patch_size * self.merge_size

    def check_against(self, vision_config: dict[str, Any], folder: Path) -> None:
        """Raise UserError when the vision encoder of config.json cuts patches otherwise."""
        for name, key in (
            ("patch_size", "patch_size"),
            ("temporal_patch_size", "temporal_patch_size"),
            ("merge_size", "spatial_merge_size"),
        ):
            if vision_config.get(key, getattr(self, name)) != getattr(self, name):
                raise UserError(
                    f"'{folder}': config.json has vision {key}={vision_config[key]}, its preprocessor config "
                    f"{name}={getattr(self, name)}; both must come from the same checkpoint"
                )


@dataclass(frozen=True)
class VideoSettings(PixelSettings):
    """Pixels, and which frames are looked at. Without `num_frames`, `fps` frames per second within the bounds."""

    fps: float
    min_frames: int
    max_frames: int
    num_frames: int | None
    cap_pixels_per_frame: bool
    max_video_tokens: int


def read_pixel_settings(folder: Path, defaults: dict[str, Any]) -> PixelSettings:
    """Picture settings of preprocessor_config.json (or processor_config.json) over the family's `defaults`."""
    return PixelSettings(**_common_settings(_preprocessor_section(folder, "image_processor"), defaults, folder))


def read_video_settings(folder: Path, defaults: dict[str, Any]) -> VideoSettings:
    """Video settings of video_preprocessor_config.json over `defaults`; a checkpoint without that file means its
    picture settings to be the videos' too, as transformers reads it."""
    section = _preprocessor_section(folder, "video_processor")
    common = _common_settings(section, defaults, folder)
    merged = {**defaults, **{key: value for key, value in section.items() if value is not None}}
    return VideoSettings(
        **common,
        fps=merged["fps"],
        min_frames=merged["min_frames"],
        max_frames=merged["max_frames"],
        num_frames=merged.get("num_frames"),
        cap_pixels_per_frame=bool(merged.get("cap_pixels_per_frame")),
        max_video_tokens=merged["max_video_tokens"],
    )


def _preprocessor_section(folder: Path, key: Any) -> dict[str, Any]:
    section = read_json(folder, "processor_config.json", required=False).get(key)
    if isinstance(section, dict):
        return section
    if key == "video_processor":
        section = read_json(folder, "video_preprocessor_config.json", required=False)
        if section:
            return section
    return read_json(folder, "preprocessor_config.json")


def _common_settings(section: dict[str, Any], defaults: dict[str, Any], folder: Path) -> dict[str, Any]:
    merged = {**defaults, **{key: value for key, value in section.items() if value is not None}}
    for key, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", BICUBIC)):
        if merged.get(key, wanted) != wanted:
            raise UserError(
                f"the preprocessor config in '{folder}' has {key}={merged[key]}; only {key}={wanted} is supported"
            )
    if abs(merged.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-9:
        raise UserError(
            f"the preprocessor config in '{folder}' has rescale_factor={merged['rescale_factor']}; "
            "only 1/255 is supported"
        )
    size = merged["size"]
    return {
        "patch_size": merged["patch_size"],
        "temporal_patch_size": merged["temporal_patch_size"],
        "merge_size": merged["merge_size"],
        "mean": tuple(merged["image_mean"]),
        "std": tuple(merged["image_std"]),
        # The older keys beside `size` win, as in transformers.
        "min_pixels": section.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
        "max_pixels": section.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
    }
