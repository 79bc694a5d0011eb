"""`bench serve`: load over HTTP on a running server, or on the recipe's own, started for it.

Each load (a request rate, a number of requests at once, or both) is measured `repetitions` times, after warm-ups of its
own. Prompts that are drawn (data_config.dataset: random) are others in every run, so that no prefix cache helps; the
rows of other data sets are the same in every run, and what a cache spared stands in the results.
"""

import json
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TextIO

from dataset.load import load_dataset
from dataset.sample import Dataset
from executor.bench.bodies import chat_body
from executor.bench.client import CHAT, MODELS, Client, Endpoint, Reply, reason_of, words_of
from executor.bench.load import Body, arrival_times_s, loads_of, num_tokens_per_piece, results_of, send_all
from executor.bench.machine import machine, versions
from executor.bench.own_server import OwnServer, own_server
from executor.bench.publish import now, publish, results_place
from executor.bench.results import Load, Point, Report, Run, Startup, recipe_tree
from executor.bench.server_figures import ServerFigures, watched
from executor.bench.workload import with_fixed_lengths, workload
from executor.errors import UserError
from executor.recipe.schema import Recipe

logger = logging.getLogger(__name__)

HELD_BYTES = 512 * 1024 * 1024
"""Of requests that are made before a run; further ones are made while it goes on, at the cost of the client's time."""
PROBE_S = 30.0
"""In which a running server must say what it serves."""


def measure(recipe: Recipe, out: TextIO) -> tuple[dict[str, Any], int]:
    """Everything that the recipe asks for, printed and saved; the JSON document and the exit status.

    Raises UserError for a server that is not there, refuses the key or has not the model, and RuntimeError where the
    recipe's own ends. After an interruption the runs that were whole are printed and saved, and KeyboardInterrupt says
    so.
    """
    import uvloop

    created = now()
    recipe = with_fixed_lengths(recipe)
    path = results_place(recipe, "serve", created)
    base_url = recipe.bench.base_url
    endpoint = Endpoint.at(base_url, recipe.server.api_key) if base_url is not None else None
    loads = loads_of(recipe.bench.request_rates, recipe.bench.concurrencies)
    dataset, num_requests = _requests(recipe, len(loads))
    with own_server(recipe) if endpoint is None else nullcontext() as server:
        serving = Serving(recipe, dataset, num_requests, endpoint or server.endpoint, server)
        is_whole = True
        try:
            uvloop.run(serving.all_runs(loads))
        except KeyboardInterrupt:
            is_whole = False
    if not serving.runs:
        raise KeyboardInterrupt("before anything was measured")
    report = Report(
        mode="serve",
        dataset=recipe.data.dataset,
        created=created,
        recipe=recipe_tree(recipe),
        workload=workload(recipe, dataset.first(num_requests)),
        machine=machine(recipe, is_remote=server is None),
        versions=versions(),
        points=tuple(Point(load, tuple(runs)) for load, runs in serving.runs.items()),
        startup=serving.startup,
    )
    document, status = publish(recipe, report, path, out)
    if not is_whole:
        raise KeyboardInterrupt(f"what was measured until then is in {path}")
    return document, status if serving.saw_mistake else min(status, 1)


def _requests(recipe: Recipe, num_loads: int) -> tuple[Dataset, int]:
    """The data set, and how many requests a run has. A drawn one holds those of all runs, one run after the other."""
    dataset, bench = load_dataset(recipe.data, recipe), recipe.bench
    num_requests = len(dataset)
    if recipe.data.dataset == "random" and recipe.data.prompt is None and not recipe.data.media:
        total = num_loads * (bench.warmups + bench.repetitions * num_requests)
        dataset = load_dataset(recipe.data, recipe.replace(data={"limit": total}))
    return dataset, num_requests


class Serving:
    """The runs on one server; `runs` has those that were whole, by load, also after an interruption."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, num_requests: int, endpoint: Endpoint, server: OwnServer | None
    ) -> None:
        self.recipe, self.dataset, self.num_requests = recipe, dataset, num_requests
        self.endpoint, self.server = endpoint, server
        self.startup = Startup()
        self.runs: dict[Load, list[Run]] = {}
        self.saw_mistake = False  # some request was refused for what it is
        self._model_name = ""
        self._num_drawn = 0  # samples that have been sent; the next ones come after them

    async def all_runs(self, loads: list[Load]) -> None:
        """Every load once, with its warm-ups before, then every load again: see executor.bench.workload."""
        if self.server is not None:
            logger.info("starting the recipe's server at %s", self.endpoint.url)
            await self.server.ready()
            self.startup = Startup(weights_s=self.server.startup_s)
            logger.info("the server answers after %.1f s", self.server.startup_s)
        self._model_name = await model_name(self.endpoint, self.recipe.server.served_model_name)
        client = Client(self.endpoint, self.recipe.bench.timeout_s)
        try:
            for number in range(self.recipe.bench.repetitions):
                for load in loads:
                    if number == 0:
                        await self._warm_up(client, load)
                    run = await self._run(client, load, number)
                    if self.server is not None:
                        self.server.check()
                    self.runs.setdefault(load, []).append(run)
        finally:
            client.close()

    async def _warm_up(self, client: Client, load: Load) -> None:
        bodies = self._bodies(self.recipe.bench.warmups)
        replies, *_ = await send_all(client, bodies, [0.0] * len(bodies), load.concurrency)
        self._judge_warmups([reply for reply in replies if reply.is_sent])

    async def _run(self, client: Client, load: Load, number: int) -> Run:
        bodies = self._bodies(self.num_requests)
        arrivals_s = arrival_times_s(len(bodies), load.request_rate, self.recipe.bench.burstiness, number)
        async with watched(client) as figures:
            cpu_s = time.process_time()
            replies, begun_s, duration_s = await send_all(client, bodies, arrivals_s, load.concurrency)
            cpu_s = time.process_time() - cpu_s
        num_failed = sum(reply.error is not None for reply in replies)
        self.saw_mistake = self.saw_mistake or any(reply.is_mistake for reply in replies)
        logger.info(
            "%s, run %d of %d: %d requests in %.1f s%s",
            load.words, number + 1, self.recipe.bench.repetitions, len(replies), duration_s,
            f", {num_failed} failed" if num_failed else "",
        )  # fmt: skip
        return Run(
            duration_s=duration_s,
            requests=results_of(replies, begun_s),
            stages_s=figures.stages_s,
            model_tpot_s=figures.model_tpot_s,
            peak_memory_bytes=self.server.peak_memory_bytes() if self.server is not None else None,
            beside=_beside(figures, replies, cpu_s / duration_s),
        )

    def _bodies(self, num: int) -> list[Body]:
        """The next `num` requests, made now as far as HELD_BYTES reach."""
        bodies: list[Body] = []
        held_bytes = 0
        for place in range(self._num_drawn, self._num_drawn + num):
            make = partial(self._body, place % len(self.dataset))
            body = _made(make) if held_bytes < HELD_BYTES else make
            held_bytes += len(body) if isinstance(body, bytes) else 0
            bodies.append(body)
        if len(self.dataset) > self.num_requests:  # drawn ones
            self._num_drawn += num
        return bodies

    def _body(self, place: int) -> bytes:
        return chat_body(self.dataset[place], self.recipe, self._model_name)

    def _judge_warmups(self, replies: list[Reply]) -> None:
        """Raises UserError or RuntimeError where no warm-up was answered, for then no request will be."""
        answered = [reply for reply in replies if reply.error is None]
        if self.server is not None and answered and self.startup.first_token_s is None:
            first_s = min(reply.piece_times_s[0] for reply in answered)
            self.startup = Startup(self.server.startup_s, first_s - self.server.begun_s)
        if answered or not replies:
            if answered and not all(reply.has_usage for reply in answered):
                logger.warning(
                    "%s does not count tokens (stream_options.include_usage): pieces of answers are counted instead, "
                    "and prompts are not",
                    self.endpoint.url,
                )
            return
        words = f"{self.endpoint.url} answers none of the warm-ups: {replies[0].error}"
        if self.server is not None:
            self.server.check()
        if replies[0].is_mistake:
            raise UserError(words)
        raise RuntimeError(words)


def _made(make: Callable[[], bytes]) -> Body:
    """A request made now, or what makes it, where it cannot be made: then it fails when it is its turn."""
    try:
        return make()
    except UserError:
        return make


def _beside(figures: ServerFigures, replies: list[Reply], client_cpu: float) -> dict[str, float]:
    tokens = num_tokens_per_piece(replies)
    return {**figures.others, **({} if tokens is None else {"tokens_per_piece": tokens}), "client_cpu": client_cpu}


async def model_name(endpoint: Endpoint, wanted: str | None) -> str:
    """How requests name the model: as `wanted`, which the server must have, else the first that it has.

    Raises UserError where nobody listens, and for a wrong key or name.
    """
    client = Client(endpoint, PROBE_S)
    try:
        status, content = await client.get(MODELS)
    except TimeoutError:
        raise UserError(
            f"bench_config.base_url: {endpoint.url} says nothing for {PROBE_S:g} s; is it the address of a server?"
        ) from None
    except OSError as error:
        raise UserError(
            f"bench_config.base_url: {endpoint.url} cannot be reached ({reason_of(error)}); start the server, or leave "
            "base_url out: the recipe's own is started then"
        ) from error
    finally:
        client.close()
    if status in (401, 403):
        raise UserError(
            f"{endpoint.url} refuses the key (HTTP {status}: {words_of(content)}); set server_config.api_key to the "
            "server's"
        )
    names = _names(content) if status == 200 else []
    if wanted is not None and (not names or wanted in names):
        return wanted
    if wanted is not None:
        raise UserError(f"server_config.served_model_name: {endpoint.url} has no model {wanted!r}; {', '.join(names)}")
    if not names:
        raise UserError(
            f"{endpoint.url} does not say at {MODELS} what it serves (HTTP {status}: {words_of(content)}); set "
            f"server_config.served_model_name, if it has {CHAT} at all"
        )
    return names[0]


def _names(content: bytes) -> list[str]:
    try:
        names = [model["id"] for model in json.loads(content)["data"]]
        return [name for name in names if isinstance(name, str) and name]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
