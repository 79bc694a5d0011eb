"""The parts of a model that a profile shows and a comparison of hidden states looks at, by name.

Both families are laid out alike (models/FAMILY/model.py), and every part is a module that is called as one.
Knows no device and nothing of what its parts compute.
"""

from torch import nn

PATCH_EMBED, MERGER, HEAD = "vision patch embedding", "vision merger", "head"


def vision_block(index: int) -> str:
    return f"vision block {index}"


def vision_tap(index: int) -> str:
    """A DeepStack merger."""
    return f"vision tap {index}"


def text_layer(index: int) -> str:
    return f"layer {index}"


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """In the order in which a prompt with a picture goes through them, taps behind all blocks."""
    visual, text = model.visual, model.language_model
    return {
        PATCH_EMBED: visual.patch_embed.proj,
        **{vision_block(index): block for index, block in enumerate(visual.blocks)},
        MERGER: visual.merger,
        **{vision_tap(index): merger for index, merger in enumerate(getattr(visual, "deepstack_merger_list", ()))},
        **{text_layer(index): layer for index, layer in enumerate(text.layers)},
        HEAD: model.lm_head,
    }
