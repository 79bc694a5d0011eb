"""From a model's class and a checkpoint to a model that is ready to run on the bound device."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from executor.checkpoint.early import EarlyPreparation
from executor.checkpoint.mapped import mapped_rows
from executor.checkpoint.part_pulls import of_part
from executor.checkpoint.pull import Pull, deferred, drained, finalize, materialise
from executor.checkpoint.strangers import check_unread
from executor.checkpoint.weights import Checkpoint, LoadReport, check_complete, load_weights
from executor.device.ops import Ops

logger = logging.getLogger(__name__)

EMBEDDING = "model.language_model.embed_tokens"
"""Canonical name of the token embedding in every family."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made inside have `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_on_meta(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The model without memory: for counting, for checking a recipe, and as the first step of loading."""
    with default_dtype(dtype), torch.device("meta"):
        return build()


def load_model(
    build: Callable[[], nn.Module],
    checkpoint: Checkpoint,
    device: Ops,
    dtype: torch.dtype,
    choose: Callable[[nn.Module], Iterable[str]] = lambda model: (),
) -> tuple[nn.Module, LoadReport]:
    """Build, read this rank's slices, and let every layer take the device's own layout.

    `choose` hands layers their schemes before they have memory, and names the tensors that these leave knowingly.
    Raises UserError for a checkpoint that does not fit.
    """
    with default_dtype(dtype), deferred():
        with device.device:
            model = build()
        ignore = [*choose(model), *(("lm_head.weight",) if model.config.tie_word_embeddings else ())]
    materialise(model, device.device)
    if checkpoint.ignored:
        names = ", ".join(file.relative_to(checkpoint.folder).as_posix() for file in checkpoint.ignored)
        logger.warning("%s: beside the quantized weights, and not read: %s", checkpoint.folder, names)
    wide = [
        name for name, info in checkpoint.catalog.items() if name.endswith(".deq_scale") and info.dtype is torch.int64
    ]
    if wide:
        logger.info("%s: deq_scale of %d linears is int64: the float32 in it is taken", checkpoint.folder, len(wide))
    pulls = list(model.pulls(checkpoint.catalog))
    check_complete(model, pulls)
    pulls = in_files(pulls, checkpoint)
    check_unread(pulls, checkpoint, ignore)
    early = EarlyPreparation(model, pulls if device.prepares_in_any_order else ())
    with early:
        # Drained: pulls hold the plain weights, which every layer gives up.
        report = load_weights(drained(pulls), checkpoint, ignore=ignore, filled=early.filled)
    if model.lm_head.tied and device.copies_tied_head(dtype if model.lm_head.own is None else torch.int8):
        _leave_in_file(model.language_model.embed_tokens, checkpoint)
    finalize(model, done=early.prepared)
    return model.eval(), report


def in_files(pulls: Iterable[Pull], checkpoint: Checkpoint) -> list[Pull]:
    """The pulls of a model as they are of the checkpoint's tensors, which may be whole or this rank's part."""
    return list(of_part(pulls) if checkpoint.is_part else pulls)


def _leave_in_file(embedding: nn.Module, checkpoint: Checkpoint) -> None:
    """Look tokens up in the checkpoint's own file: the only copy in memory is the head's, made already or about to be.

    Not where the file has another type: rows would be rounded at every lookup.
    """
    (pull,) = in_files(embedding.pulls(checkpoint.catalog, EMBEDDING), checkpoint)
    info = checkpoint.catalog[pull.name]
    if info.dtype is not embedding.weight.dtype:
        logger.info("tied weights stand twice: the file has %s, the recipe %s", info.dtype, embedding.weight.dtype)
        return
    embedding.weight = nn.Parameter(mapped_rows(info, pull.index[0]), requires_grad=False)
    logger.info("token embeddings are looked up in %s; the output head has their copy in memory", info.file.name)
