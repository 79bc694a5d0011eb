"""Load on a server: requests sent at random moments of a given rate, so many at once at most, and what came of them.

The arrivals are those of `vllm bench serve` (vllm/benchmarks/serve.py, get_request): gaps of a gamma distribution,
whose shape is the burstiness, stretched so that the whole run has exactly the rate. A request that waits for one of the
`concurrency` places is not sent, and its time to the first token has not begun. Knows no recipe and no data set.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

import numpy as np

from executor.bench.client import Client, Reply
from executor.bench.results import Load, RequestResult
from executor.errors import UserError

Body = bytes | Callable[[], bytes]
"""A request's JSON, or what makes it when it is its turn; a UserError fails that request."""


def arrival_times_s(num_requests: int, rate: float | None, burstiness: float, seed: int) -> list[float]:
    """When each request is sent, in seconds after the begin; all at once for rate None.

    The last one comes after num_requests / rate seconds.
    """
    if rate is None or not num_requests:
        return [0.0] * num_requests
    gaps_s = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), num_requests)
    times_s = np.cumsum(gaps_s)
    if not times_s[-1]:  # a burstiness near 0: all of them are one burst
        return [num_requests / rate] * num_requests
    return (times_s * (num_requests / rate / times_s[-1])).tolist()


def loads_of(request_rates: Sequence[float], concurrencies: Sequence[int]) -> list[Load]:
    """What is varied: every rate with every number of requests at once; one of all at once where neither is given."""
    rates, numbers = dict.fromkeys(request_rates) or [None], dict.fromkeys(concurrencies) or [None]
    return [Load(request_rate=rate, concurrency=number) for rate in rates for number in numbers]


async def send_all(
    client: Client, bodies: Sequence[Body], arrivals_s: Sequence[float], concurrency: int | None = None
) -> tuple[list[Reply], float, float]:
    """Send every body at its time, at most `concurrency` under way; the replies in the order of the bodies, when the
    first could be sent (time.perf_counter()), and the seconds until the last one had ended.

    Nothing is sent again: a server that refuses has failed that request.
    """
    places = asyncio.Semaphore(concurrency or max(1, len(bodies)))

    async def send(body: Body) -> Reply:
        async with places:
            if isinstance(body, bytes):
                return await client.chat(body)
            try:
                content = await asyncio.to_thread(body)
            except UserError as error:
                return Reply(now_s := time.perf_counter(), now_s, error=str(error), is_mistake=True, is_sent=False)
            return await client.chat(content)

    begun_s = time.perf_counter()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for body, arrival_s in zip(bodies, arrivals_s, strict=True):
            wait_s = begun_s + arrival_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(send(body)))
    return [task.result() for task in tasks], begun_s, time.perf_counter() - begun_s


def results_of(replies: Sequence[Reply], begun_s: float) -> tuple[RequestResult, ...]:
    """Replies as a benchmark keeps them: times in seconds after `begun_s`."""
    return tuple(
        RequestResult(
            sent_s=reply.sent_s - begun_s,
            ended_s=reply.ended_s - begun_s,
            token_times_s=tuple(piece_s - begun_s for piece_s in reply.piece_times_s),
            prompt_tokens=reply.prompt_tokens,
            output_tokens=reply.output_tokens,
            cached_tokens=reply.cached_tokens,
            error=reply.error,
        )
        for reply in replies
    )


def num_tokens_per_piece(replies: Sequence[Reply]) -> float | None:
    """How many tokens a piece of an answer holds on average: above 1, inter-token latencies are those of pieces. None
    where nothing was answered, or tokens were not counted."""
    answered = [reply for reply in replies if reply.error is None and reply.has_usage]
    pieces = sum(len(reply.piece_times_s) for reply in answered)
    return sum(reply.output_tokens for reply in answered) / pieces if pieces else None
