"""What a checkpoint folder says besides its weights: JSON files, tokenizer, chat template, pixel settings.

Reads local files only; never downloads, never runs code that comes with a checkpoint, needs no processor class of
transformers (those want torchvision). Knows no model family: a family hands in the defaults of its own classes.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executor.checkpoint.fields import Fields, as_number
from executor.checkpoint.folder import read_json
from executor.errors import UserError

logger = logging.getLogger(__name__)

BICUBIC = 3  # PIL's number, as checkpoints write it
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json",
                   "special_tokens_map.json")  # fmt: skip


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
    files = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in files:
        if name.endswith(".json"):
            read_json(folder, name)
    try:
        return _open_tokenizer(folder)
    # The tokenizers library raises a bare Exception for a file that it cannot read, and transformers whatever an odd
    # value runs into: there is no narrower class.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the tokenizer in '{folder}' cannot be read ({reason}); copy the original's {', '.join(files)}"
        ) from error


def _open_tokenizer(folder: Path) -> Any:
    from transformers import AutoConfig, AutoTokenizer, PretrainedConfig  # two seconds: not at import

    # transformers would read all of config.json only to learn the tokenizer's class, and refuse values that no
    # tokenizer depends on; so it gets a config of that model type without them.
    named = read_json(folder, "config.json", required=False).get("model_type")
    try:
        config = AutoConfig.for_model(named)
    except (ValueError, TypeError):
        config = PretrainedConfig()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), config=config, local_files_only=True)
    # Some odd values show up only in use.
    ids = tokenizer.encode("a b", add_special_tokens=False)
    if not ids or not isinstance(tokenizer.decode(ids), str) or not tokenizer.added_tokens_decoder:
        raise ValueError("it turns text into nothing, or has no special tokens")
    if not isinstance(tokenizer.eos_token_id, int | None):
        raise ValueError(f"eos_token is {tokenizer.eos_token!r}")
    return tokenizer


def load_chat_template(folder: Path, tokenizer: Any) -> str:
    """The Jinja chat template, where transformers' processors look: chat_template.jinja, chat_template.json,
    processor_config.json, then the tokenizer's own. The first wins: some tokenizers carry a text-only template."""
    template, file = _find_chat_template(Path(folder), tokenizer)
    if not isinstance(template, str) or not template.strip():
        raise UserError(
            f"model_path '{folder}' has no chat template: neither chat_template.jinja, chat_template.json nor one in "
            "tokenizer_config.json; copy the file from the original checkpoint"
        )
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{folder}/{file}: the chat template is no valid Jinja, line {error.lineno}: {error.message}; copy it from "
            "the original checkpoint"
        ) from error
    except (TemplateError, TypeError, ValueError):
        pass  # what it does not render is a request's matter
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


def _find_chat_template(folder: Path, tokenizer: Any) -> tuple[Any, str]:
    """The template and the file that it stands in."""
    name = "chat_template.jinja"
    if (folder / name).is_file():
        try:
            return (folder / name).read_text(encoding="utf-8-sig"), name
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{folder}/{name} cannot be read ({error}): copy it from the original checkpoint"
            ) from error
    for name in ("chat_template.json", "processor_config.json"):
        template = _default_template(read_json(folder, name, required=False).get("chat_template"), f"{folder}/{name}")
        if template:
            return template, name
    name = "tokenizer_config.json"
    return _default_template(tokenizer.chat_template, f"{folder}/{name}"), name


def _default_template(value: Any, file: str) -> str | None:
    """A template, or the one of several that is called default."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):  # the older form of several
        value = {str(entry.get("name")): entry.get("template") for entry in value}
    if isinstance(value, dict):
        value = value.get("default")
    if value is not None and not isinstance(value, str):
        raise Fields({"chat_template": value}, file).fault("chat_template", "a Jinja template as text")
    return value


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

    def check_against(self, vision: Any, folder: Path) -> None:
        """Raise UserError when the vision encoder (a family's VisionConfig) cuts patches otherwise."""
        for name, key in (
            ("patch_size", "patch_size"),
            ("temporal_patch_size", "temporal_patch_size"),
            ("merge_size", "spatial_merge_size"),
        ):
            if getattr(vision, name) != getattr(self, name):
                raise UserError(
                    f"'{folder}': config.json has vision {key}={getattr(vision, name)}, its preprocessor config "
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


def read_pixel_settings(folder: Path, defaults: Mapping[str, Any]) -> PixelSettings:
    """Picture settings of preprocessor_config.json (or processor_config.json) over the family's `defaults`."""
    return PixelSettings(**_common_settings(_preprocessor_section(folder, "image_processor"), defaults))


def read_video_settings(folder: Path, defaults: Mapping[str, Any]) -> VideoSettings:
    """Video settings of video_preprocessor_config.json over `defaults`; a checkpoint without that file means its
    picture settings to be the videos' too, as transformers reads it."""
    said = _preprocessor_section(folder, "video_processor")
    min_frames, max_frames = (said.whole(key, defaults[key], null=True) for key in ("min_frames", "max_frames"))
    if min_frames > max_frames:
        raise said.fault("min_frames" if "min_frames" in said else "max_frames", "min_frames not above max_frames")
    samples = said.flag("do_sample_frames", None)
    if samples is False and not defaults["do_sample_frames"]:  # the class's own, which its users sample before
        logger.warning(
            "%s: do_sample_frames is false, but frames are sampled here, as the model was trained", said.file
        )
    if samples is False and defaults["do_sample_frames"]:
        raise said.fault(
            "do_sample_frames",
            "true: frames are sampled here as the model was trained. Set it so, and num_frames or fps to the frames "
            "that you want",
        )
    return VideoSettings(
        **_common_settings(said, defaults),
        fps=said.number("fps", defaults["fps"], null=True),
        min_frames=min_frames,
        max_frames=max_frames,
        num_frames=said.whole("num_frames", None, null=True),
        cap_pixels_per_frame=said.flag("cap_pixels_per_frame", False),
        max_video_tokens=said.whole("max_video_tokens", defaults["max_video_tokens"], null=True),
    )


def read_max_pixels(folder: Path) -> int | None:
    """The largest area of a picture that the folder's files name, None where they leave it to the family's class."""
    said = _preprocessor_section(folder, "image_processor", required=False)
    return _bound(said, _edges(said), "max_pixels", "longest_edge", None)


def read_min_pixels(folder: Path) -> int | None:
    """The least area of a picture that the folder's files name, None where they leave it to the family's class."""
    said = _preprocessor_section(folder, "image_processor", required=False)
    return _bound(said, _edges(said), "min_pixels", "shortest_edge", None)


def _preprocessor_section(folder: Path, key: str, *, required: bool = True) -> Fields:
    """The settings of one kind of media, with the file they stand in. Numbers may be written as texts."""
    both = Fields(read_json(folder, "processor_config.json", required=False), f"{folder}/processor_config.json")
    section = both.section(key)
    if section is not None:
        return Fields(section.values, both.file, key, texts=True)
    names = ["preprocessor_config.json"]
    if key == "video_processor" and read_json(folder, "video_preprocessor_config.json", required=False):
        names = ["video_preprocessor_config.json"]
    return Fields(read_json(folder, names[0], required=required), f"{folder}/{names[0]}", texts=True)


def _common_settings(said: Fields, defaults: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "do_pad": False}
    wanted["do_convert_rgb"] = True
    for key, flag in wanted.items():
        if said.flag(key, flag) != flag:
            raise UserError(f"{said.file} has {key}={not flag}; only {key}={flag} is supported")
    if not _is_bicubic(said.values.get("resample")):
        raise UserError(f"{said.file} has resample={said.values['resample']!r}; only {BICUBIC} (bicubic) is supported")
    factor = said.number("rescale_factor", 1 / 255, null=True)
    if abs(factor * 255 - 1) > 1e-9:
        raise UserError(f"{said.file} has rescale_factor={factor}; only 1/255 is supported")
    sizes = {
        key: said.whole(key, defaults[key], null=True) for key in ("patch_size", "temporal_patch_size", "merge_size")
    }
    least, most = _bounds(said, defaults["size"])
    token_pixels = (sizes["patch_size"] * sizes["merge_size"]) ** 2
    if most < token_pixels:
        raise UserError(
            f"{said.file}: max_pixels (size.longest_edge) is {most}, wanted at least the pixels of one token, "
            f"{token_pixels}: it is an area, not a length"
        )
    return {
        **sizes,
        "mean": _channels(said, "image_mean", defaults["image_mean"], zero=True),
        "std": _channels(said, "image_std", defaults["image_std"], zero=False),
        "min_pixels": least,
        "max_pixels": most,
    }


def _is_bicubic(resample: Any) -> bool:
    """null: not said. PIL's number and both libraries' names, `PIL.Image.BICUBIC` and `bicubic`."""
    if isinstance(resample, str):
        return resample.rpartition(".")[2].lower() in ("bicubic", str(BICUBIC))
    return resample is None or (resample == BICUBIC and not isinstance(resample, bool))


def _bounds(said: Fields, default: Mapping[str, int]) -> tuple[int, int]:
    """Least and most pixels. One that is not said is the class's."""
    edges = _edges(said)
    least = _bound(said, edges, "min_pixels", "shortest_edge", default["shortest_edge"])
    most = _bound(said, edges, "max_pixels", "longest_edge", default["longest_edge"])
    if least > most:
        raise UserError(f"{said.file}: min_pixels {least} is above max_pixels {most}; swap or mend them")
    return least, most


def _edges(said: Fields) -> Fields:
    """`size`, whose shortest_edge and longest_edge here mean areas."""
    wanted = "an object with shortest_edge and longest_edge, the least and most pixels of a picture's area"
    if "size" in said and not isinstance(said.values["size"], Mapping):
        raise said.fault("size", wanted)
    edges = said.section("size") or Fields({}, said.file, "size")
    for key in edges.values:
        if key in edges and key not in ("shortest_edge", "longest_edge", "min_pixels", "max_pixels"):
            raise edges.fault(key, wanted)
    return edges


def _bound(said: Fields, edges: Fields, older: str, newer: str, default: int | None) -> Any:
    """One bound: the older key beside `size` wins, as in transformers."""
    in_size = edges.whole(newer, edges.whole(older, default, null=True), null=True)
    return said.whole(older, in_size, null=True)


def _channels(said: Fields, key: str, default: Sequence[float], *, zero: bool) -> tuple[float, ...]:
    """One number for each of red, green and blue; a single one is all three's."""
    value = said.values.get(key)
    if value is None:
        return tuple(default)
    entries = value if isinstance(value, list) else [value] * 3
    numbers = [as_number(entry) for entry in entries]
    if len(numbers) != 3 or any(number is None or number < 0 or (number == 0 and not zero) for number in numbers):
        raise said.fault(key, f"three numbers, {'at least' if zero else 'above'} 0, or one for all three")
    return tuple(numbers)
