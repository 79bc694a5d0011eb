"""GET /metrics: vLLM's names, and numbers that are what was asked and answered."""

import base64
import io
import json
import re

from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from executor.engine.stages import STAGES
from tests.engines import engine_over
from tests.reference import REPO
from tests.serve.conftest import TINY, Running, start

NAMES = {
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"),
    *("vllm:mm_cache_queries_total", "vllm:mm_cache_hits_total", "vllm:prompt_tokens_total"),
    *("vllm:generation_tokens_total", "vllm:request_success_total", "vllm:time_to_first_token_seconds_count"),
    *("vllm:inter_token_latency_seconds_count", "vllm:e2e_request_latency_seconds_count"),
    *("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total"),
    *("vllm:spec_decode_num_accepted_tokens_total", "qwenvl:spec_decode_verify_seconds_total"),
    *("vllm:num_preemptions_total", "vllm:request_prompt_tokens_sum", "vllm:request_generation_tokens_sum"),
    *("qwenvl:prepare_seconds_count", "qwenvl:stage_seconds_total", "process_resident_memory_bytes"),
}
LABELS = ("finished_reason", "stage", "position")


def samples(server: Running) -> dict[str, float]:
    """Name (and what tells its reason, stage or position) -> value."""
    reply = server.http.get("/metrics")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            label = next((sample.labels[name] for name in LABELS if name in sample.labels), None)
            if "le" not in sample.labels:
                found[f"{sample.name} {label}" if label else sample.name] = sample.value
    return found


def ask(server: Running, before: str = "") -> dict:
    picture = io.BytesIO()
    Image.new("RGB", (160, 128), "red").save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    parts = [
        {"type": "text", "text": before},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["usage"]


def test_the_numbers_are_those_of_the_requests(server: Running) -> None:
    first = samples(server)
    assert {name.partition(" ")[0] for name in first} >= NAMES
    usages = [ask(server), ask(server), ask(server, "Look:")]  # known blocks, then a known picture
    after = samples(server)

    def grown(name: str) -> float:
        return after[name] - first.get(name, 0.0)

    assert grown("vllm:prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert grown("vllm:generation_tokens_total") == sum(usage["completion_tokens"] for usage in usages)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert cached > 0 and grown("vllm:prefix_cache_hits_total") == cached
    assert grown("vllm:time_to_first_token_seconds_count") == grown("vllm:e2e_request_latency_seconds_count") == 3
    tokens = sum(usage["completion_tokens"] for usage in usages)
    assert grown("vllm:inter_token_latency_seconds_count") == tokens - 3
    assert grown("vllm:request_success_total length") + grown("vllm:request_success_total stop") == 3
    assert grown("vllm:mm_cache_queries_total") == 2 and grown("vllm:mm_cache_hits_total") == 1
    stages = {stage: grown(f"qwenvl:stage_seconds_total {stage}") for stage in STAGES}
    assert stages.pop("draft") == 0 and all(seconds > 0 for seconds in stages.values())
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0


def test_a_refused_request_counts_as_an_error(server: Running) -> None:
    before = samples(server)["vllm:request_success_total error"]
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    reply = server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert reply.status_code == 400
    assert samples(server)["vllm:request_success_total error"] == before + 1


def test_the_dashboard_asks_for_metrics_that_are_there(server: Running) -> None:
    dashboard = json.loads((REPO / "docs/serving/dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"(?:vllm:|qwenvl:|process_)\w+", query)}
    given = {line.split("{")[0].split(" ")[0] for line in server.http.get("/metrics").text.splitlines()}
    assert len(asked) > 12 and asked <= given


def test_drafts_are_counted_as_vllm_counts_them() -> None:
    engine = engine_over(TINY, speculative={"method": "ngram", "ngram_min": 1, "adaptive": False})
    with start(engine) as server:
        body = {"prompt": "one two three one two four one two", "max_tokens": 32, "ignore_eos": True}
        assert server.http.post("/v1/completions", json=body).status_code == 200
        found, counts = samples(server), engine.speculation
        assert 0 < counts.num_accepted_tokens < counts.num_draft_tokens
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            assert found[f"vllm:spec_decode_{name}_total"] == getattr(counts, name)
        by_position = [found[f"vllm:spec_decode_num_accepted_tokens_per_pos_total {place}"] for place in range(7)]
        assert tuple(by_position) == counts.num_accepted_per_pos
        assert found["qwenvl:decode_steps_total"] <= 32 - counts.num_accepted_tokens
