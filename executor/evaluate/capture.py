"""Hidden states of a prompt, stage by stage, as the recipe's own model computes them.

Taken by hooks on the model's parts while the engine's runner encodes the media and computes the prompt, in chunks of a
step's size; nothing in the layers knows of it. One rank that has everything; with several, a rank has slices.
Legend: T prompt tokens, P patches, M visual tokens, n hidden sizes, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from executor.engine.engine import Engine
from executor.engine.parts import HEAD, MERGER, PATCH_EMBED, parts, text_layer, vision_block, vision_tap
from executor.engine.runner import Runner
from executor.schedule.plan import Plan, Row
from executor.schedule.request import MediaItem, Prompt, Request, SamplingParams

Hidden = dict[str, Tensor]
"""Stage -> what it yields, [rows, width] on the host, float32 or int64; the stages in the order of `stage_names`."""

TOKEN_IDS, POSITIONS, PATCHES = "token ids", "positions", "patches"
EMBEDDED, MERGED, NORM, LOGITS = "vision embedding", "merged embeddings", "final norm", "logits"
PROCESSOR = (TOKEN_IDS, POSITIONS, PATCHES)


def stage_names(model: nn.Module) -> list[str]:
    """All stages, in the order in which a wrong one shows in the next."""
    visual = model.visual
    taps = {layer: vision_tap(index) for index, layer in enumerate(visual.tapped_layers)}
    names = [*PROCESSOR, PATCH_EMBED, EMBEDDED]
    for block in range(len(visual.blocks)):
        names += [vision_block(block), *((taps[block],) if block in taps else ())]
    return [*names, MERGER, MERGED, *map(text_layer, range(len(model.language_model.layers))), NORM, LOGITS]


def distinct(media: Sequence[MediaItem]) -> list[MediaItem]:
    """Each picture and video once, in the order of their first appearance, as the engine encodes them."""
    return list({item.digest: item for item in reversed(media)}.values())[::-1]


@torch.inference_mode()
def capture(engine: Engine, prompt: Prompt) -> Hidden:
    """All stages of one prompt; logits of its last token. The engine must be idle, and one rank alone.

    token ids [T, 1], positions [T, 3], patches and vision blocks [P, n] (of `distinct` media, one after another), the
    merger and taps [M, n], merged embeddings and layers [T, n], logits [1, V]. UserError for a prompt too long.
    """
    runner, request = engine.runner, Request("hidden states", prompt, SamplingParams(max_new_tokens=1))
    engine.scheduler.check_possible(request)
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str, x: Tensor) -> None:
        kept.setdefault(name, []).append(on_host(x))

    media = distinct(prompt.media)
    with _hooked(runner.model, keep):
        if media:
            runner.encode(media)
        _compute(runner, request, engine.scheduler.max_num_batched_tokens)
    runner.features.clear()
    kept[TOKEN_IDS] = [torch.tensor(prompt.token_ids)[:, None]]
    kept[POSITIONS] = [torch.from_numpy(prompt.positions).T]
    kept[LOGITS] = [kept.pop(HEAD)[-1][-1:]]
    return {name: torch.cat(kept[name]) for name in stage_names(runner.model) if name in kept}


def on_host(x: Tensor) -> Tensor:
    """`[..., n]` as float32 `[rows, n]` of its own."""
    return x.detach().to("cpu", torch.float32, copy=True).flatten(0, -2)


def _compute(runner: Runner, request: Request, chunk_tokens: int) -> None:
    """The prompt, from its first token to its last; every token's logits are asked for, so that none is left out."""
    num_tokens = len(request.prompt.token_ids)
    request.block_ids = list(range(-(-num_tokens // runner.block_size)))
    for start in range(0, num_tokens, chunk_tokens):
        count = min(chunk_tokens, num_tokens - start)
        runner.forward(Plan((Row(request, start, count, 0, range(start, start + count)),)))


@contextmanager
def _hooked(model: nn.Module, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    hooks = [part.register_forward_hook(_after(name, keep)) for name, part in parts(model).items()]
    visual, text = model.visual, model.language_model
    hooks += [
        visual.register_forward_pre_hook(lambda _, inputs: keep(PATCHES, inputs[0])),
        visual.blocks[0].register_forward_pre_hook(lambda _, inputs: keep(EMBEDDED, inputs[0])),
        text.register_forward_pre_hook(lambda _, inputs: keep(MERGED, inputs[0])),
        text.register_forward_hook(_after(NORM, keep)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _after(name: str, keep: Callable[[str, Tensor], None]) -> Callable[[nn.Module, Any, Any], None]:
    """A layer of text gives what it adds, and what that is added to."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            keep(name, output[0].float() + output[1].float())
        elif output.numel():
            keep(name, output)

    return hook
