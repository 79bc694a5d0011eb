"""Keys of a recipe that say something to another choice than the one that is made: each is told, in one line."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

from executor.recipe.section import Section

logger = logging.getLogger(__name__)


def warn_of_unused(
    section: str, settings: Section, readers: Mapping[str, Sequence[str]], choice: str | None, chosen: str
) -> None:
    """`readers`: key -> the choices that read it; `choice` is the one made, `chosen` says it in words."""
    for key, names in readers.items():
        value = getattr(settings, key)
        if choice not in names and value != type(settings).model_fields[key].default:
            _warn(f"{section}.{key}: got {value}, which has no effect {chosen}; what reads it: {', '.join(names)}")


@cache
def _warn(message: str) -> None:
    """Once: a recipe is settled more than once, and `plan` settles many."""
    logger.warning("%s", message)
