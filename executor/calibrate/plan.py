"""Which linear becomes what: a scheme's own choice, and what the command line says over it.

What stays float by itself is what msmodelslim's recipes for these models leave float: the router, mergers, and with
activations of one scale the linears whose inputs spread most: the text's down_proj and the encoder's second of an MLP.
The output head is no linear of a layer, and always stays.
"""

import fnmatch
import logging
from collections.abc import Sequence
from itertools import groupby

from executor.calibrate.linears import LinearSource
from executor.calibrate.settings import FLOAT, STATIC, Settings
from executor.errors import UserError, nearest

logger = logging.getLogger(__name__)

ROUTER = "*.mlp.gate"
ALWAYS_FLOAT = (ROUTER,)
FLOAT_MERGERS = ("model.visual.merger.*", "model.visual.deepstack_merger_list.*")
FLOAT_WHERE_STATIC = (
    "model.language_model.layers.*.mlp.down_proj",
    "model.visual.blocks.*.mlp.linear_fc2",
    "model.visual.blocks.*.mlp.down_proj",
)
VISION = "model.visual.*"


def float_patterns(settings: Settings) -> tuple[str, ...]:
    """What stays float where the command line says nothing."""
    patterns = ALWAYS_FLOAT
    if settings.kinds.linears != "W8A16":
        patterns += FLOAT_MERGERS
    if settings.kinds.linears in STATIC:
        patterns += FLOAT_WHERE_STATIC
    return patterns if settings.quantize_vision else (*patterns, VISION)


def plan(linears: Sequence[LinearSource], settings: Settings) -> dict[str, str]:
    """Canonical name -> type. Linears that are multiplied together have one type: float where one of them stays.

    Raises UserError for a pattern that no linear matches, and for a scheme that this model has no use for.
    """
    if settings.scheme == "w4a8_dynamic" and not any(source.is_expert for source in linears):
        raise UserError(
            "--scheme: w4a8_dynamic has four bits in the experts of a mixture, and this model is dense; use "
            "w8a8_dynamic"
        )
    names = [source.name for source in linears]
    for option, patterns in (("--keep_float", settings.keep_float), ("--quantize", settings.quantize)):
        for pattern in patterns:
            if not any(_matches(name, (pattern,)) for name in names):
                raise UserError(
                    f"{option}: no linear is called {pattern}{nearest(pattern, names)}; patterns are of whole names "
                    f"such as {names[-1]}, with * for any text"
                )
    kinds: dict[str, str] = {}
    for module, group in groupby(linears, key=lambda source: source.module):
        together = list(group)
        found = {_kind(source, settings) for source in together}
        if len(found) > 1:
            logger.warning("%s stays float as a whole: its parts are multiplied together", module)
            found = {FLOAT}
        kinds |= dict.fromkeys((source.name for source in together), found.pop())
    if all(kind == FLOAT for kind in kinds.values()):
        raise UserError("--keep_float: it leaves no linear to quantize")
    return kinds


def _kind(source: LinearSource, settings: Settings) -> str:
    if _matches(source.name, settings.keep_float):
        return FLOAT
    by_itself = _matches(source.name, float_patterns(settings)) and not _matches(source.name, settings.quantize)
    if by_itself:
        return FLOAT
    return settings.kinds.experts if source.is_expert else settings.kinds.linears


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
