"""GET /metrics: Prometheus text under the names that dashboards for vLLM read, and stage times under our own.

Counters and histograms of requests are written when a feed gets an event; what the engine holds is asked for when
somebody looks. Everything is in the event loop's thread. docs/serving.md lists the names.
"""

import time
from collections.abc import Callable, Iterator

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from executor.serve.asks import Ask, Delta, Done, Event
from executor.serve.backends import Backend

router = APIRouter()

# Upper bounds of histograms, in seconds and in tokens.
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
             960.0, 1920.0, 7680.0)  # fmt: skip
STAGE_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
FINISHED = ("stop", "length", "abort", "error")


def token_bounds(max_model_len: int) -> tuple[int, ...]:
    """1, 2, 5, 10, ... up to the context's length."""
    bounds = [digit * 10**power for power in range(8) for digit in (1, 2, 5)]
    return tuple(bound for bound in bounds if bound <= max_model_len)


class Metrics:
    """The counters of one server."""

    def __init__(self, model_name: str, max_model_len: int, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._backend = backend
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(self)
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of answered requests.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens of answers.")
        self._prefix_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked for in the cache.")
        self._prefix_hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        success = Counter(
            "vllm:request_success", "Requests that have ended, by reason.",
            (*self._labels, "finished_reason"), registry=self.registry,
        )  # fmt: skip
        self._finished = {reason: success.labels(**self._labels, finished_reason=reason) for reason in FINISHED}
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to first token.", FIRST_TOKEN_S)
        self._itl = self._histogram(
            "vllm:inter_token_latency_seconds", "From token to token; those of one step come together.", TOKEN_S
        )
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Of each request: mean time of a token after the first.",
            TOKEN_S,
        )  # fmt: skip
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the answer's end.", REQUEST_S)
        tokens = token_bounds(max_model_len)
        self._request_prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self._request_output = self._histogram("vllm:request_generation_tokens", "Tokens of its answers.", tokens)
        self._media = self._histogram(
            "qwenvl:prepare_seconds",
            "Fetching, decoding and resizing media, template and tokens of a request.",
            STAGE_S,
        )
        self._answer = self._histogram("qwenvl:decode_seconds", "From a request's first token to its last.", REQUEST_S)

    def watch(self, ask: Ask) -> Callable[[Event], None]:
        """What a request's feed tells its events to."""
        started = last = time.monotonic()
        is_first = True

        def observe(event: Event) -> None:
            nonlocal last, is_first
            if isinstance(event, Delta):
                now, num_tokens = time.monotonic(), len(event.token_ids)
                gaps_s = [now - last] + [0.0] * (num_tokens - 1) if num_tokens else []
                if is_first and gaps_s:
                    is_first = False
                    self._ttft.observe(now - started)
                    del gaps_s[0]
                for gap_s in gaps_s:
                    self._itl.observe(gap_s)
                last = now
                self._generation_tokens.inc(num_tokens)
            elif isinstance(event, Done):
                self._request_ended(event, time.monotonic() - started)
            else:
                self._finished["abort" if event.kind in ("aborted", "late") else "error"].inc()

        return observe

    def _request_ended(self, done: Done, seconds: float) -> None:
        self._prompt_tokens.inc(done.num_prompt_tokens)
        self._prefix_queries.inc(done.num_prompt_tokens)
        self._prefix_hits.inc(done.num_cached_tokens)
        self._finished[done.finish_reasons[0]].inc()
        self._e2e.observe(seconds)
        self._request_prompt.observe(done.num_prompt_tokens)
        self._request_output.observe(done.num_output_tokens)
        self._media.observe(done.prepare_s)
        self._answer.observe(done.e2e_s - done.ttft_s)
        if done.tpot_s:
            self._tpot.observe(done.tpot_s)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What the engines hold, for prometheus_client."""
        stats = self._backend.stats()
        disk, drafts = stats.disk_cache, stats.speculation
        names, values = tuple(self._labels), tuple(self._labels.values())
        for name, words, value in (
            ("vllm:num_requests_running", "Requests that are being computed.", stats.num_running),
            ("vllm:num_requests_waiting", "Requests that wait.", stats.num_waiting),
            (
                "vllm:kv_cache_usage_perc", "Share of the KV cache that is in use; 1 is all.",
                stats.num_used_blocks / max(1, stats.num_blocks),
            ),
            ("qwenvl:disk_cache_bytes", "Prefix cache on disk, of all that share its folder.", disk.stored_bytes),
        ):  # fmt: skip
            gauge = GaugeMetricFamily(name, words, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        for name, words, value in (
            ("vllm:num_preemptions", "Requests that gave their blocks back.", stats.num_preemptions),
            (
                "vllm:mm_cache_queries",
                "Pictures and videos looked for in the encoder cache.",
                stats.num_encoder_queries,
            ),
            ("vllm:mm_cache_hits", "Pictures and videos found there.", stats.num_encoder_hits),
            (
                "vllm:external_prefix_cache_queries",
                "Prompt tokens that no block in memory held, where there is a prefix cache on disk.",
                stats.num_store_queries,
            ),
            ("vllm:external_prefix_cache_hits", "Those that it held.", stats.num_store_hits),
            (
                "qwenvl:disk_cache_media_queries",
                "Pictures and videos of prompts that were looked for on disk.",
                disk.num_media_queries,
            ),
            ("qwenvl:disk_cache_media_hits", "Those that were found there.", disk.num_media_hits),
            ("qwenvl:disk_cache_read_bytes", "Read from disk and checked.", disk.read_bytes),
            ("qwenvl:disk_cache_written_bytes", "Written to disk.", disk.written_bytes),
            ("qwenvl:disk_cache_damaged", "Entries that were wrong, and dropped.", disk.num_damaged),
            (
                "qwenvl:disk_cache_dropped",
                "Entries that were not written, for lack of time or room.",
                disk.num_dropped,
            ),
            ("vllm:spec_decode_num_drafts", "Times that a request had drafts in a step.", drafts.num_drafts),
            ("vllm:spec_decode_num_draft_tokens", "Drafted tokens.", drafts.num_draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were right.", drafts.num_accepted_tokens),
            ("qwenvl:spec_decode_verify_seconds", "Time of steps with drafts.", drafts.verify_s),
            ("qwenvl:spec_decode_plain_seconds", "What their tokens would take without drafts.", drafts.plain_s),
            ("qwenvl:prefill_steps", "Steps with a prompt in them.", stats.stages.num_prefill_steps),
            ("qwenvl:decode_steps", "Steps of one token a request.", stats.stages.num_decode_steps),
        ):
            counter = CounterMetricFamily(name, words, labels=names)
            counter.add_metric(values, value)
            yield counter
        accepted = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were right, by their place in the draft.",
            labels=(*names, "position"),
        )
        for position, count in enumerate(drafts.num_accepted_per_pos):
            accepted.add_metric((*values, str(position)), count)
        yield accepted
        stages = CounterMetricFamily(
            "qwenvl:stage_seconds", "Time of the engine's stages on the host.", labels=(*names, "stage")
        )
        for stage, seconds in stats.stages.by_stage().items():
            stages.add_metric((*values, stage), seconds)
        yield stages

    def _counter(self, name: str, words: str) -> Counter:
        return Counter(name, words, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, words: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, words, tuple(self._labels), buckets=bounds, registry=self.registry)
        return histogram.labels(**self._labels)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(request.app.state.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
