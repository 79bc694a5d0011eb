# /// script
# requires-python = ">=3.11"
# dependencies = ["guidellm[vision]==0.8.1", "torch", "transformers"]
# ///
"""guidellm: synthetic text and pictures, chat and completions, concurrent and one by one; tokens and times counted."""

import json
import sys
import tempfile
from pathlib import Path

from commands import run

url, folder = sys.argv[1:3]
NUM_REQUESTS, NUM_TOKENS = 12, 8
PICTURE_TOKENS = 160 * 128 // 32**2
TEXT = f"kind=synthetic_text,prompt_tokens=24,output_tokens={NUM_TOKENS}"
PICTURE = f"kind=synthetic_image,width=160,height=128,output_tokens={NUM_TOKENS}"
CHAT, COMPLETIONS = "request_format=/v1/chat/completions", "request_format=/v1/completions"
RUNS = {  # name: (backend, profile, data)
    "text, 4 at once": (CHAT, "kind=concurrent,streams=4", (TEXT,)),
    "a picture alone, 4 at once": (CHAT, "kind=concurrent,streams=4", (PICTURE,)),
    "text and a picture, one by one": (CHAT, "kind=synchronous", (TEXT, PICTURE)),
    "completions, at a rate": (COMPLETIONS, "kind=constant,rate=10", (TEXT,)),
    "not streamed": (f"{CHAT},stream=false", "kind=throughput,max_concurrency=4", (TEXT,)),
}  # fmt: skip

for name, (backend, profile, data) in RUNS.items():
    with tempfile.TemporaryDirectory() as home:
        words = [word for each in data for word in ("--data", each)]
        run(
            "guidellm", "run", "--backend", f"kind=openai_http,target={url},model=qwen3_vl,{backend}",
            "--profile", profile, *words, "--tokenizer", f"kind=huggingface_auto,model={folder}", "--constraint",
            f"kind=max_requests,count={NUM_REQUESTS}", "--output", "kind=json,path=out.json", "--disable-console",
            folder=Path(home),
        )  # fmt: skip
        (benchmark,) = json.loads((Path(home) / "out.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0), (name, totals)
    for request in benchmark["requests"]["successful"]:
        assert request["output_tokens"] == NUM_TOKENS, (name, request["output_tokens"])
        least = 24 * (TEXT in data) + PICTURE_TOKENS * (PICTURE in data)
        assert least <= request["prompt_tokens"] < least + 40, (name, request["prompt_tokens"])
        assert ("data:image/jpeg;base64," in request["request_args"]) == (PICTURE in data), request["request_args"]
        if "stream=false" not in backend:
            # Its ITL ends with the last chunk that has text: tokens without text behind it are not in the time.
            ttft_ms, rest_ms = request["time_to_first_token_ms"], request["inter_token_latency_ms"] * (NUM_TOKENS - 1)
            assert ttft_ms > 0 and ttft_ms + rest_ms < 1e3 * request["request_latency"], (name, ttft_ms, rest_ms)
    print(f"{name}: {totals['successful']} of {NUM_REQUESTS}")
