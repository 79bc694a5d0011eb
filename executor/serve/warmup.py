"""The first requests, asked before anybody else may ask: what a first use imports, packs or starts is there then.

A text and a picture, greedy, not, and bound by a grammar: template, tokenizer, its tables for grammars, decoders,
encoder, every kind of step, and the sampler.
"""

import base64
import io
import logging
import time
from dataclasses import replace
from typing import Any

from executor.errors import EngineEnded
from executor.schedule.request import Grammar, SamplingParams
from executor.serve.asks import Ask, ChatPrompt, Delta, Done, Failure
from executor.serve.backends import Backend

logger = logging.getLogger(__name__)

GREEDY = SamplingParams(max_new_tokens=4, ignore_eos=True)
BOUND = replace(GREEDY, grammar=Grammar("regex", "[0-9]+"))
DRAWN = replace(GREEDY, temperature=1.0, top_k=20, top_p=0.9, seed=1)
PICTURE_PIXELS = 224  # on each side


async def warm_up(backend: Backend) -> None:
    """Raises RuntimeError where the backend ends meanwhile; a request that fails for its own reason is told in the log:
    a model without room for a picture still answers texts."""
    started = time.monotonic()
    text = {"type": "text", "text": "What is this?"}
    for name, content, params in (
        ("text", [text], GREEDY),
        ("text", [text], DRAWN),
        ("bound text", [text], BOUND),
        ("picture", [_picture(), text], GREEDY),
    ):
        reason = await _ask(backend, Ask(f"warm-up-{name}", ChatPrompt([{"role": "user", "content": content}]), params))
        if backend.fault is not None:
            raise EngineEnded(f"the engine has ended at its first request: {backend.fault}")
        if reason is not None:
            logger.warning("the first %s was not answered: %s", name, reason)
    logger.info("the first requests were answered in %.1f s", time.monotonic() - started)


async def _ask(backend: Backend, ask: Ask) -> str | None:
    """Why it was not answered."""
    reason = None
    async for event in backend.ask(ask):
        if isinstance(event, Failure):
            reason = event.message
        elif isinstance(event, Delta) and event.error is not None:
            reason = event.error
        elif isinstance(event, Done):
            break
    return reason


def _picture() -> dict[str, Any]:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (PICTURE_PIXELS, PICTURE_PIXELS), (200, 120, 40)).save(file, format="JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
