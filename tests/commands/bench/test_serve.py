"""`bench serve` as it is typed: against a server that answers by a script, and against the real one."""

import io
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from executor.bench.results import load
from executor.bench.statistics import summarize
from executor.commands.bench.run import run
from executor.errors import UserError
from executor.recipe.schema import Recipe, load_recipe
from tests.bench.scripted import MODEL, Answer, Scripted, even
from tests.engines import engine_over
from tests.reference import REPO
from tests.serve.conftest import TINY, Running, start

QUICK = REPO / "config/quickstart.yaml"


@pytest.fixture
def recipe_of(tmp_path):
    def of(url: str | None, *overrides: str) -> Recipe:
        base = [] if url is None else [f"bench_config.base_url={url}"]
        own = ["bench_config.mode=serve", "data_config.dataset=random", "data_config.random_tokens=60",
               "data_config.limit=6", "bench_config.repetitions=2", f"model_config.output_path={tmp_path}"]  # fmt: skip
        return load_recipe(QUICK, [*own, *base, *overrides])

    return of


def measured(recipe: Recipe) -> tuple[dict, int, str]:
    out = io.StringIO()
    document, status = run(recipe, out)
    return document, status, out.getvalue()


def test_the_figures_are_those_that_were_scripted(recipe_of):
    """Ten requests one at a time, each with 0.1 s to the first token and 19 gaps of 20 ms."""
    scripted = Scripted(lambda number, body: even(20, ttft_s=0.1, gap_s=0.02, prompt_tokens=50))
    with scripted.in_thread() as server:
        recipe = recipe_of(server.url, "bench_config.concurrencies=1", "data_config.limit=5")
        document, status, table = measured(recipe)
    assert (status, document["failed"], document["requests"]) == (0, 0, 5)
    assert (document["input_tokens"], document["output_tokens"]) == (250, 100)
    answers_s = [asked.sent_s for asked in server.asked]
    assert len(answers_s) == 1 + 2 * 5  # a warm-up, and two repetitions
    report = load(Path(document["results_path"]))
    for number, repetition in enumerate(report.points[0].runs):
        scripted_s = answers_s[1 + 5 * number : 6 + 5 * number]
        summary = summarize(repetition)
        # What the server sent, by its own clock. Wide bounds: the machine may be busy with something else.
        tpot_ms = 1000 * sum((sent[-1] - sent[0]) / 19 for sent in scripted_s) / 5
        assert summary.tpot_ms.mean == pytest.approx(tpot_ms, rel=0.5)
        assert summary.itl_ms.mean == pytest.approx(tpot_ms, rel=0.5)
        assert 100 <= summary.ttft_ms.mean < 400
        whole_s = sum(sent[-1] - sent[0] + 0.1 for sent in scripted_s)
        assert whole_s <= summary.duration_s < 3 * whole_s
        assert summary.output_tokens_per_s == pytest.approx(100 / summary.duration_s)
    assert re.search(r"Successful requests: +5\n", table) and "Mean TTFT (ms)" in table


def test_each_load_is_a_point_and_each_run_has_prompts_of_its_own(recipe_of):
    with Scripted(lambda number, body: even(3, ttft_s=0.02)).in_thread() as server:
        words = ("bench_config.request_rates=[50,100]", "bench_config.concurrencies=[1,3]", "bench_config.warmups=2")
        document, status, table = measured(recipe_of(server.url, *words))
    assert status == 0 and [(point["request_rate"], point["concurrency"]) for point in document["points"]] == [
        (50.0, 1), (50.0, 3), (100.0, 1), (100.0, 3)
    ]  # fmt: skip
    texts = [json.dumps(asked.body["messages"]) for asked in server.asked]
    assert len(set(texts)) == len(texts) == 4 * (2 + 2 * 6)
    assert server.most_under_way <= 3
    assert "50 requests/s, 3 at once" in table
    assert {asked.body["model"] for asked in server.asked} == {MODEL}
    assert all(asked.body["ignore_eos"] is True and asked.body["max_tokens"] == 128 for asked in server.asked)


def test_rows_of_a_file_are_asked_in_every_run(recipe_of, tmp_path):
    rows = tmp_path / "rows.jsonl"
    picture = REPO / "dataset/media/objects.png"
    rows.write_text(json.dumps({"question": "One?", "image": str(picture)}) + '\n{"question": "Two?"}\n{broken\n')
    with Scripted(lambda number, body: even(2)).in_thread() as server:
        words = ("data_config.dataset=jsonl", f"data_config.dataset_path={rows}", "generation_config.max_new_tokens=9")
        document, status, _ = measured(recipe_of(server.url, *words, "data_config.limit=null"))
    assert status == 0 and (document["requests"], document["failed"]) == (3, 1)
    (reason,) = document["errors"]
    assert "rows.jsonl:3: not valid JSON" in reason and document["errors"][reason] == 2
    asked = [asked.body for asked in server.asked]
    assert len(asked) == 1 + 2 * 2 and all(body["max_tokens"] == 9 for body in asked)
    assert asked[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_refusals_are_counted_with_their_words(recipe_of):
    full = Answer(status=429, content=b'{"error": {"message": "the queue is full"}}')
    with Scripted(lambda number, body: full if number % 3 == 2 else even(2)).in_thread() as server:
        document, status, table = measured(recipe_of(server.url, "bench_config.concurrencies=1"))
    assert status == 0 and document["failed"] == 2 and document["errors"] == {"HTTP 429: the queue is full": 4}
    assert re.search(r"Failed requests: +2\n", table)
    assert len(server.asked) == 1 + 2 * 6  # none is sent again


def test_what_the_server_tells_stands_beside(recipe_of):
    scripted = Scripted(lambda number, body: even(4, ttft_s=0.2, tokens=8))

    def metrics() -> bytes:
        number = len(scripted.asked) // 6
        return (
            f'vllm:prefix_cache_hits_total{{engine="0"}} {10 * number}.0\n'
            f'vllm:prefix_cache_hits_total{{engine="1"}} {5 * number}.0\n'
            f'vllm:kv_cache_usage_perc{{engine="0"}} {0.25 if scripted.under_way > 1 else 0.0}\n'
            f'qwenvl:stage_seconds_total{{stage="decode",engine="0"}} {2.0 * number}\n'
            f'qwenvl:stage_seconds_total{{stage="prefill",engine="0"}} {1.0 * number}\n'
            f"qwenvl:decode_steps_total{{}} {100.0 * number}\n# HELP x y\n"
            f"vllm:generation_tokens_total{{}} {46.0 * number}\n"
            f"vllm:time_to_first_token_seconds_count{{}} {6.0 * number}\n"
            f'vllm:spec_decode_num_drafts_total{{engine="0"}} {5.0 + 20 * number}\n'
            f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {7.0 + 40 * number}\n'
            f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {1.0 + 30 * number}\n'
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {10.0 * number}\n'
            f"qwenvl:spec_decode_verify_seconds_total{{}} {2.0 * number}\n"
            f"qwenvl:spec_decode_plain_seconds_total{{}} {5.0 * number}\n"
        ).encode()

    scripted.metrics = metrics
    with scripted.in_thread() as server:
        document, _, table = measured(recipe_of(server.url, "bench_config.repetitions=1", "bench_config.warmups=0"))
    assert document["stages_s"] == {"decode": 2.0, "prefill": 1.0} and document["model_tpot_ms"] == 5.0
    assert document["beside"]["prefix_cache_hit_tokens"] == 15.0
    assert document["beside"]["most_kv_cache_usage"] == 0.25
    assert document["beside"]["tokens_per_piece"] == 2.0 and 0 < document["beside"]["client_cpu"] < 2
    drafts = {"drafts": 20.0, "draft_tokens": 40.0, "accepted_draft_tokens": 30.0, "acceptance_rate": 0.75}
    drafts |= {"acceptance_length": 2.5, "drafting_gain": 2.5}
    assert document["beside"].items() >= drafts.items()
    assert re.search(r"-Speculative Decoding-+\nAcceptance rate \(%\): +75.00\nAcceptance length: +2.50\n", table)
    assert re.search(r"Most of the KV cache in use \(%\): +25.0\n", table)


def nowhere() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_nobody_is_there(recipe_of):
    with pytest.raises(
        UserError, match=r"cannot be reached \(Connection refused\); start the server, or leave base_url"
    ):
        run(recipe_of(nowhere()))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"key": "secret"}, "refuses the key .HTTP 401: the API key is wrong.; set server_config.api_key"),
        ({"models": ("a", "b")}, "has no model 'other'; a, b"),
        (
            {"models": ()},
            "does not say at /v1/models what it serves .HTTP 200: .*; set server_config.served_model_name",
        ),
    ],
)
def test_the_wrong_key_and_the_wrong_model(recipe_of, settings, words):
    scripted = Scripted(lambda number, body: even(2), settings.get("key"))
    scripted.models = settings.get("models", scripted.models)
    named = ["server_config.served_model_name=other"] if settings.get("models") else []
    with scripted.in_thread() as server, pytest.raises(UserError, match=words):
        run(recipe_of(server.url, *named))


def test_a_key_is_sent_and_not_kept(recipe_of):
    with Scripted(lambda number, body: even(2), "secret").in_thread() as server:
        document, status, _ = measured(recipe_of(server.url, "server_config.api_key=secret"))
    assert status == 0 and "secret" not in Path(document["results_path"]).read_text()


@pytest.mark.parametrize("status, kind", [(400, UserError), (429, RuntimeError), (500, RuntimeError)])
def test_a_server_that_answers_none_of_the_warm_ups(recipe_of, status, kind):
    refusal = Answer(status=status, content=b'{"error": {"message": "too long"}}')
    words = f"answers none of the warm-ups: HTTP {status}: too long"
    with Scripted(lambda number, body: refusal).in_thread() as server, pytest.raises(kind, match=words):
        run(recipe_of(server.url))
    assert len(server.asked) == 1


def test_a_server_that_counts_no_tokens(recipe_of, caplog):
    with Scripted(lambda number, body: even(4, has_usage=False)).in_thread() as server:
        document, status, _ = measured(recipe_of(server.url))
    assert status == 0 and (document["input_tokens"], document["output_tokens"]) == (0, 24)
    assert "does not count tokens" in caplog.text and "tokens_per_piece" not in document["beside"]


@pytest.mark.parametrize("status, exit_status", [(404, 2), (429, 1), (500, 1)])
def test_where_all_failed_the_exit_status_says_whose_fault_it_is(recipe_of, status, exit_status):
    refusal = Answer(status=status, content=b"no")
    with Scripted(lambda number, body: refusal).in_thread() as server:
        document, found, _ = measured(recipe_of(server.url, "bench_config.warmups=0"))
    assert found == exit_status and document["failed"] == document["requests"] == 6


def test_a_row_that_cannot_be_sent_is_no_warm_up(recipe_of, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{broken\n{"question": "Two?"}\n')
    with Scripted(lambda number, body: even(2)).in_thread() as server:
        words = ("data_config.dataset=jsonl", f"data_config.dataset_path={rows}")
        document, status, _ = measured(recipe_of(server.url, *words))
    assert status == 0 and (document["requests"], document["failed"]) == (2, 1)


def test_failures_of_one_repetition_are_told(recipe_of):
    """Of three repetitions one has a failure: their median is 0."""
    broken = Answer(status=500, content=b"no")
    with Scripted(lambda number, body: broken if number == 3 else even(2)).in_thread() as server:
        words = ("bench_config.repetitions=3", "data_config.limit=2", "bench_config.warmups=0")
        document, status, table = measured(recipe_of(server.url, *words))
    assert status == 0 and document["failed"] == 1 and re.search(r"Failed requests: +1\n", table)


def test_an_interruption_leaves_what_was_measured(recipe_of, tmp_path, monkeypatch):
    """Every load once before any is measured again; the run that is interrupted is not counted."""
    from executor.commands.bench import serve

    whole, calls = serve.Serving._run, []

    async def interrupted(self, client, load, number):
        calls.append(load)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return await whole(self, client, load, number)

    monkeypatch.setattr(serve.Serving, "_run", interrupted)
    place = tmp_path / "mine.json"
    words = ("bench_config.concurrencies=[1,2]", f"bench_config.results_path={place}")
    scripted = Scripted(lambda number, body: even(2))
    with scripted.in_thread() as server, pytest.raises(KeyboardInterrupt, match="mine.json"):
        measured(recipe_of(server.url, *words))
    assert [(point.load.concurrency, len(point.runs)) for point in load(place).points] == [(1, 2), (2, 1)]


def test_every_figure_is_that_of_the_rows(recipe_of):
    """The table and the JSON line, computed again by hand from the file's requests."""
    script = lambda number, body: even(2 + number % 5, ttft_s=0.01, gap_s=0.002, prompt_tokens=10 + number)  # noqa: E731
    with Scripted(script).in_thread() as server:
        document, _, table = measured(recipe_of(server.url, "bench_config.repetitions=1", "bench_config.warmups=2"))
    (run_,) = json.loads(Path(document["results_path"]).read_text())["points"][0]["runs"]
    rows, duration_s = run_["requests"], run_["duration_s"]
    assert len(rows) == 6 and len(server.asked) == 2 + 6
    tokens, prompts = sum(row["output_tokens"] for row in rows), sum(row["prompt_tokens"] for row in rows)
    assert (tokens, prompts) == (sum(2 + n % 5 for n in range(2, 8)), sum(10 + n for n in range(2, 8)))  # no warm-ups
    ttft = [row["token_times_s"][0] - row["sent_s"] for row in rows]
    times = [row["token_times_s"] for row in rows]
    gaps = [after - before for each in times for before, after in zip(each, each[1:], strict=False)]
    e2e = [row["ended_s"] - row["sent_s"] for row in rows]
    tpot = [(e - t) / (row["output_tokens"] - 1) for e, t, row in zip(e2e, ttft, rows, strict=True)]
    expected = {
        "duration_s": duration_s,
        "request_per_s": 6 / duration_s,
        "output_tokens_per_s": tokens / duration_s,
        "total_tokens_per_s": (tokens + prompts) / duration_s,
    }
    for name, value in expected.items():
        assert document[name] == pytest.approx(value, rel=1e-4)
    lines = dict(re.findall(r"^(.*?): +([\d.]+)$", table, re.MULTILINE))
    assert float(lines["Total input tokens"]) == prompts and float(lines["Total generated tokens"]) == tokens
    assert float(lines["Output token throughput (tok/s)"]) == pytest.approx(tokens / duration_s, abs=0.02)
    for kind, word, values in (("ttft_ms", "TTFT", ttft), ("tpot_ms", "TPOT", tpot), ("itl_ms", "ITL", gaps),
                               ("e2e_ms", "E2EL", e2e)):  # fmt: skip
        ordered = sorted(values)
        place = 0.99 * (len(ordered) - 1)
        below = int(place)
        above = ordered[min(below + 1, len(ordered) - 1)]
        half = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        for part, label, value in (
            ("mean", "Mean", sum(values) / len(values)),
            ("median", "Median", half),
            ("p99", "P99", ordered[below] + (place - below) * (above - ordered[below])),
        ):
            assert document[kind][part] == pytest.approx(1000 * value, abs=0.003)
            assert float(lines[f"{label} {word} (ms)"]) == pytest.approx(1000 * value, abs=0.01)


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    with start(engine_over(TINY)) as running:
        yield running


def test_our_server_counts_what_was_asked_for(recipe_of, real):
    """Random prompts with a picture: sent over HTTP they have exactly the tokens of the recipe; no cache helps."""
    words = ("data_config.random_pictures=1", "data_config.random_picture_size=[96,64]", "bench_config.concurrencies=3")
    document, status, table = measured(recipe_of(real.url, *words, "generation_config.max_new_tokens=12"))
    assert (status, document["failed"]) == (0, 0)
    assert (document["input_tokens"], document["output_tokens"]) == (6 * 60, 6 * 12)
    report = load(Path(document["results_path"]))
    requests = [request for each in report.points[0].runs for request in each.requests]
    assert {(request.prompt_tokens, request.output_tokens) for request in requests} == {(60, 12)}
    assert document["beside"]["encoder_cache_hits"] == 0
    assert document["beside"]["prefix_cache_query_tokens"] == 6 * 60
    assert document["stages_s"]["prefill"] > 0 and document["stages_s"]["vision"] > 0
    assert document["model_tpot_ms"] > 0
    assert document["peak_memory_bytes"] is None and report.machine["is_remote"] is True


def test_the_default_questions_are_asked_too(recipe_of, real):
    words = ("data_config.dataset=default", "data_config.limit=null", "generation_config.max_new_tokens=4")
    document, status, _ = measured(recipe_of(real.url, *words))
    assert (status, document["failed"]) == (0, 0) and document["output_tokens"] == 4 * document["requests"]
    assert document["beside"]["encoder_cache_hits"] > 0  # asked again in each run
