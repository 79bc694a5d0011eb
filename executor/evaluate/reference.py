"""Hidden states of a prompt as transformers' own classes compute them, in float32 on the CPU.

The one file of the product that loads transformers' models, and it does so when it is asked to. They are given our
token ids, positions and patches, so that a difference in a processor shows in its own stage and not in all that follow.
What transformers' processors give is compared where they load: those for pictures always, on Pillow where there is no
torchvision; token ids only with torchvision, which transformers asks for.
Legend: T prompt tokens, P patches.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from executor.engine.encode import passes, patches_of
from executor.engine.parts import MERGER, PATCH_EMBED, text_layer, vision_block, vision_tap
from executor.errors import ODD_DATA_ERRORS, UserError
from executor.evaluate.capture import (
    EMBEDDED,
    LOGITS,
    MERGED,
    NORM,
    PATCHES,
    POSITIONS,
    TOKEN_IDS,
    Hidden,
    distinct,
    on_host,
)
from executor.media.image import decode_image
from executor.media.media import load_media
from executor.schedule.request import MediaItem, Prompt

logger = logging.getLogger(__name__)

KINDS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class Reference:
    """transformers' model of a float checkpoint folder; `processor` is the recipe's own, which makes the patches."""

    def __init__(self, folder: Path, processor: Any) -> None:
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self._folder, self._processor = folder, processor
        try:
            model, told = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        except (
            *ODD_DATA_ERRORS,
            SafetensorError,
        ) as error:  # a damaged folder, or an architecture that transformers has not
            reason = " ".join(str(error).split())
            raise UserError(
                f"eval_config.dump_layers: transformers cannot load {folder}: {reason}; give a whole float checkpoint "
                "by eval_config.reference_model"
            ) from error
        lacking = sorted([*told["missing_keys"], *told.get("mismatched_keys", ())], key=str)
        if lacking:  # transformers draws these at random and goes on
            raise UserError(
                f"eval_config.dump_layers: {folder} lacks {len(lacking)} of the weights that transformers' model has, "
                f"such as {lacking[0]}; give a whole float checkpoint by eval_config.reference_model"
            )
        self._model = model.eval()
        self._kept: dict[str, list[Tensor]] = {}
        self._hook()

    @torch.inference_mode()
    def capture(self, prompt: Prompt, sources: Sequence[Any] = ()) -> Hidden:
        """The stages that transformers has, as executor.evaluate.capture.capture gives them.

        `sources`: of the prompt's media, in their order, as messages name them; none: patches are not compared.
        """
        self._kept = {}
        inputs: dict[str, Tensor] = {}
        for kind, (pixels, grid) in KINDS.items():
            items = [item for item in prompt.media if item.kind == kind]
            if items:
                inputs[pixels] = torch.cat([self._patches(item) for item in items])
                inputs[grid] = torch.tensor([item.grid_thw for item in items])
        self._model(
            input_ids=torch.tensor([prompt.token_ids]),
            position_ids=torch.from_numpy(prompt.positions)[:, None],
            logits_to_keep=1,
            use_cache=False,
            **inputs,
        )
        found = {name: torch.cat(tensors) for name, tensors in self._kept.items()}
        for name in self._vision:
            if name in found:
                found[name] = _of_distinct(found[name], prompt.media)
        return self._processor_stages(prompt, sources) | found

    def _patches(self, item: MediaItem) -> Tensor:
        form = self._processor.picture
        (batch,) = passes([item], item.num_tokens)
        return patches_of(batch, form, torch.float32, torch.device("cpu"))

    def _hook(self) -> None:
        visual, text = self._model.model.visual, self._model.model.language_model
        vision = {
            PATCH_EMBED: visual.patch_embed,
            **{vision_block(index): block for index, block in enumerate(visual.blocks)},
            MERGER: visual.merger,
            **{vision_tap(index): merger for index, merger in enumerate(getattr(visual, "deepstack_merger_list", ()))},
        }
        self._vision = (*vision, EMBEDDED)
        layers = {text_layer(index): layer for index, layer in enumerate(text.layers)}
        for name, module in {**vision, **layers, NORM: text.norm, LOGITS: self._model.lm_head}.items():
            module.register_forward_hook(lambda _, inputs, output, name=name: self._keep(name, output))
        self._keep_input(visual.blocks[0], EMBEDDED, "hidden_states")
        self._keep_input(text, MERGED, "inputs_embeds")

    def _keep_input(self, module: Any, name: str, argument: str) -> None:
        def hook(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._keep(name, named[argument] if argument in named else inputs[0])

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def _keep(self, name: str, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        self._kept.setdefault(name, []).append(on_host(x))

    # What transformers' own processors make of the same media

    def _processor_stages(self, prompt: Prompt, sources: Sequence[Any]) -> Hidden:
        stages: Hidden = {}
        if any(item.kind == "video" for item in prompt.media):
            logger.info("a prompt with a video: transformers' processor is not compared, which needs torchvision")
            return stages
        stages[POSITIONS] = self._positions(prompt)
        pictures = [self._picture(source) for source in sources]
        if len(pictures) == len(prompt.media):
            if pictures:
                made = self._made_of(pictures)
                stages[PATCHES] = _of_distinct(made["pixel_values"].float(), prompt.media)
            token_ids = self._token_ids(prompt, pictures)
            if token_ids is not None:
                stages[TOKEN_IDS] = token_ids
        return stages

    def _positions(self, prompt: Prompt) -> Tensor:
        """[T, 3]"""
        index = self._model.model.get_rope_index
        token_ids, media = torch.tensor([prompt.token_ids]), prompt.media
        more = {}
        if "mm_token_type_ids" in inspect.signature(index).parameters:
            more["mm_token_type_ids"] = (token_ids == self._processor.image_token_id).int()
        grids = torch.tensor([item.grid_thw for item in media]) if media else None
        return index(input_ids=token_ids, image_grid_thw=grids, **more)[0][:, 0].T.contiguous()

    def _picture(self, source: Any) -> Image.Image:
        opened = load_media(source, "image")
        return Image.fromarray(decode_image(opened.content, source=opened.source).permute(1, 2, 0).numpy())

    def _made_of(self, pictures: Sequence[Image.Image]) -> Any:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(self._folder)
        return processor(images=list(pictures), size=self._bounds(), return_tensors="pt")

    def _bounds(self) -> dict[str, int]:
        options, settings = self._processor.options, self._processor.picture
        return {
            "shortest_edge": options.min_pixels or settings.min_pixels,
            "longest_edge": options.max_pixels or settings.max_pixels,
        }

    def _token_ids(self, prompt: Prompt, pictures: Sequence[Image.Image]) -> Tensor | None:
        """[T, 1], of the text that was tokenized; None where transformers' processor does not load."""
        from transformers import AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(self._folder)
        except ImportError:
            return None
        made: Callable[..., Any] = processor
        options = {"images": list(pictures), "images_kwargs": {"size": self._bounds()}} if pictures else {}
        return made(text=[prompt.text], return_tensors="pt", **options)["input_ids"][0][:, None]


def _of_distinct(rows: Tensor, media: Sequence[MediaItem]) -> Tensor:
    """Rows `[P, n]` or `[M, n]` of all media, pictures before videos, as rows of the `distinct` ones in their order."""
    in_order = [item for kind in KINDS for item in media if item.kind == kind]
    num_patches = [t * h * w for t, h, w in (item.grid_thw for item in in_order)]
    counts = num_patches if len(rows) == sum(num_patches) else [item.num_tokens for item in in_order]
    by_digest = dict(zip((item.digest for item in in_order), rows.split(counts), strict=True))
    return torch.cat([by_digest[item.digest] for item in distinct(media)])
