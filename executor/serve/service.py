"""What all endpoints share: the recipe's settings, the model's name, and who answers.

Knows requests as `Ask`s; nothing of HTTP routes.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from executor.engine.loop import QueueFull
from executor.engine.params import check_params
from executor.errors import UserError
from executor.recipe.generation import sampling_params
from executor.recipe.schema import Recipe
from executor.schedule.request import SamplingParams
from executor.serve.asks import Ask, Done, Event, Failure
from executor.serve.backends import Backend
from executor.serve.errors import ApiError, busy
from executor.serve.feed import Feed, Joined
from executor.serve.metrics import Metrics

NARROWING = ("top_k", "top_p", "min_p")  # without a meaning for greedy answers, which does not make every value right
ALL_TOKENS = -1  # vLLM's top_k

_RECIPE_KEY = re.compile(r"generation_config\.(\w+)")


@dataclass
class Service:
    """One served model. `recipe` is settled; `processor` is that of its checkpoint."""

    recipe: Recipe
    processor: Any
    vocab_size: int
    backend: Backend
    created_s: int = field(default_factory=lambda: int(time.time()))
    is_ready: bool = False
    is_draining: bool = False

    def __post_init__(self) -> None:
        self.num_answered = self.num_failed = 0
        self._open: set[Feed] = set()
        self.metrics = Metrics(self.model_name, self.max_model_len, self.backend)

    @property
    def model_name(self) -> str:
        return self.recipe.server.served_model_name or Path(self.recipe.model.model_path).name

    @property
    def max_model_len(self) -> int:
        return self.recipe.scheduler.max_model_len

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for another model than this one."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404, f"the model {name!r} is not served here; this server has {self.model_name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def params(self, overrides: Mapping[str, Any], names: Mapping[str, str] | None = None) -> SamplingParams:
        """A request's parameters: its own, then the recipe's, then the checkpoint's.

        `names`: {parameter: how the request calls it}. Raises ApiError 400, whose `param` is the request's name.
        """
        try:
            params = sampling_params(self.recipe.generation, self.processor.generation_config, overrides)
            narrowing = {name: overrides[name] for name in NARROWING if overrides.get(name) not in (None, ALL_TOKENS)}
            check_params(replace(params, **narrowing), self.vocab_size)
        except UserError as error:
            raise _in_words_of(names or {}, str(error)) from error
        return params

    @property
    def num_open(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._open)

    def end_all(self, reason: str) -> None:
        """Give up what is not answered yet, however the engine is: whoever waits for it is told why."""
        for feed in tuple(self._open):
            feed.abort()
            feed.push(Failure("lost", reason))

    def ask(self, ask: Ask) -> Feed:
        """Raises ApiError when it takes nothing."""
        if self.is_draining:
            raise busy("the server is being stopped and takes no new requests")
        if not self.is_ready:
            raise busy("the model is being loaded")
        try:
            feed = self.backend.ask(ask)
        except QueueFull as error:
            raise busy(str(error)) from error
        except RuntimeError as error:
            raise ApiError(503, str(error)) from error
        measure = self.metrics.watch(ask)

        def observe(event: Event) -> None:
            measure(event)
            if isinstance(event, Done | Failure):
                self.num_answered += isinstance(event, Done)
                self.num_failed += isinstance(event, Failure)
                self._open.discard(feed)

        feed.observer = observe
        self._open.add(feed)
        return feed

    def ask_all(self, asks: Sequence[Ask]) -> Joined:
        """All of them or none: raises ApiError when it does not take each."""
        feeds: list[Feed] = []
        try:
            for ask in asks:
                feeds.append(self.ask(ask))
        except ApiError:
            for feed in feeds:
                feed.abort()
            raise
        return Joined(feeds)


def _in_words_of(names: Mapping[str, str], message: str) -> ApiError:
    """A message about keys of the recipe, about fields of a request."""
    keys = _RECIPE_KEY.findall(message)
    param = names.get(keys[0], keys[0]) if keys else None
    message = _RECIPE_KEY.sub(lambda match: names.get(match[1], match[1]), message)
    for name in ("max_new_tokens", "min_new_tokens"):  # bounds of each other
        message = re.sub(rf"\b{name}\b", names.get(name, name), message)
    return ApiError(400, message, param=param)
