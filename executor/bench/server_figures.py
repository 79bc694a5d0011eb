"""What a server tells of itself at /metrics, before and after a run: stage times, cached tokens, use of the KV cache,
drafts.

The names are those of this project's server and of vLLM's, which has most of them too. A server without /metrics has no
such figures, and nothing is made of that.
"""

import asyncio
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from executor.bench.client import METRICS, Client
from executor.engine.speculation.counts import SpeculationCounts

LOOK_S = 5.0
"""In which /metrics must answer: a run does not wait for a server that never does."""
FIRST_SAMPLE_S, SAMPLE_S = 0.1, 1.0
"""When gauges are looked at during a run, and how often then: a look costs the server about a millisecond."""
STAGE_SECONDS = "qwenvl:stage_seconds_total"
DECODE_STEPS = "qwenvl:decode_steps_total"
TOKENS, FIRST_TOKENS = "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count"
RIGHT_DRAFTS = "vllm:spec_decode_num_accepted_tokens_total"
COUNTERS = {  # counter -> its growth in a run
    "vllm:prefix_cache_hits_total": "prefix_cache_hit_tokens",
    "vllm:prefix_cache_queries_total": "prefix_cache_query_tokens",
    "vllm:mm_cache_hits_total": "encoder_cache_hits",
    "vllm:num_preemptions_total": "preemptions",
}
DRAFTS = {  # counter -> its field of SpeculationCounts
    "vllm:spec_decode_num_drafts_total": "num_drafts",
    "vllm:spec_decode_num_draft_tokens_total": "num_draft_tokens",
    RIGHT_DRAFTS: "num_accepted_tokens",
    "qwenvl:spec_decode_verify_seconds_total": "verify_s",
    "qwenvl:spec_decode_plain_seconds_total": "plain_s",
}
GAUGES = {  # gauge -> its greatest value in a run
    "vllm:kv_cache_usage_perc": "most_kv_cache_usage",
    "vllm:num_requests_running": "most_running",
    "vllm:num_requests_waiting": "most_waiting",
}
_LINE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_STAGE = re.compile(r'stage="(\w+)"')


@dataclass
class ServerFigures:
    """Of one run. Empty where the server says nothing."""

    stages_s: dict[str, float] = field(default_factory=dict)
    model_tpot_s: float | None = None  # of a token of a decode step in the text model, on average
    others: dict[str, float] = field(default_factory=dict)  # named by COUNTERS, GAUGES and SpeculationCounts.figures


def parse(text: str) -> dict[str, float]:
    """Prometheus' text -> values by name; several engines' are added up, and stages are NAME/STAGE."""
    values: dict[str, float] = {}
    for name, labels, value in _LINE.findall(text):
        stage = _STAGE.search(labels) if name == STAGE_SECONDS else None
        key = f"{name}/{stage[1]}" if stage else name
        values[key] = values.get(key, 0.0) + float(value)
    return {name: value for name, value in values.items() if math.isfinite(value)}


@asynccontextmanager
async def watched(client: Client) -> Iterator[ServerFigures]:
    """A run's figures: asked for at its begin and its end, the gauges also in between. Filled when it is left."""
    found = ServerFigures()
    before = await _read(client)
    most = {name: before[name] for name in GAUGES if name in before}
    looking = asyncio.create_task(_look(client, most)) if before else None
    try:
        yield found
    finally:
        if looking is not None:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
    if before:
        _fill(found, before, await _read(client), most)


def _fill(
    found: ServerFigures, before: Mapping[str, float], after: Mapping[str, float], most: dict[str, float]
) -> None:
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    grown = {name: value for name, value in grown.items() if value >= 0}  # a server that was started again counts anew
    prefix = f"{STAGE_SECONDS}/"
    found.stages_s = {name.removeprefix(prefix): value for name, value in grown.items() if name.startswith(prefix)}
    found.model_tpot_s = _model_tpot_s(found.stages_s, grown)
    found.others = {told: grown[name] for name, told in COUNTERS.items() if name in grown}
    drafts = {told: _whole(told, grown[name]) for name, told in DRAFTS.items() if name in grown}
    found.others |= SpeculationCounts(**drafts).figures()
    found.others |= {GAUGES[name]: value for name, value in most.items()}


def _whole(told: str, value: float) -> float:
    """/metrics writes counts as floats."""
    return round(value) if told.startswith("num_") else value


def _model_tpot_s(stages_s: Mapping[str, float], grown: Mapping[str, float]) -> float | None:
    """A decode step's time, shared by the tokens that a row got of it: one, and the drafts that were right.

    Answers' tokens but their first are those that rows got. None where it is not known.
    """
    if "decode" not in stages_s or not grown.get(DECODE_STEPS):
        return None
    step_s, num_right = stages_s["decode"] / grown[DECODE_STEPS], grown.get(RIGHT_DRAFTS, 0)
    if not num_right:
        return step_s
    num_tokens = grown.get(TOKENS, 0) - grown.get(FIRST_TOKENS, 0)
    return step_s * (num_tokens - num_right) / num_tokens if num_tokens > num_right else None


async def _look(client: Client, most: dict[str, float]) -> None:
    wait_s = FIRST_SAMPLE_S
    while True:
        await asyncio.sleep(wait_s)
        wait_s, values = SAMPLE_S, await _read(client)
        most.update({name: max(value, values.get(name, value)) for name, value in most.items()})


async def _read(client: Client) -> dict[str, float]:
    """{} where nothing can be read."""
    try:
        async with asyncio.timeout(LOOK_S):
            status, content = await client.get(METRICS)
        return parse(content.decode()) if status == 200 else {}
    except (OSError, TimeoutError, ValueError):
        return {}
