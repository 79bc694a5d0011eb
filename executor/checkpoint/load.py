"""From a model's class and a checkpoint to a model that is ready to run on the bound device."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from executor.checkpoint.pull import finalize
from executor.checkpoint.weights import Checkpoint, LoadReport, check_complete, load_weights
from executor.device.ops import Ops

logger = logging.getLogger(__name__)


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
    build: Callable[[], nn.Module], checkpoint: Checkpoint, device: Ops, dtype: torch.dtype
) -> tuple[nn.Module, LoadReport]:
    """Build, read this rank's slices, and let every layer take the device's own layout.

    Raises UserError for a checkpoint that does not fit.
    """
    with default_dtype(dtype), device.device:
        model = build()
    pulls = list(model.pulls(checkpoint.catalog))
    check_complete(model, pulls)
    report = load_weights(pulls, checkpoint, ignore=("lm_head.weight",) if model.config.tie_word_embeddings else ())
    del pulls  # they hold the plain weights, which every layer is about to give up
    finalize(model)
    return model.eval(), report
