# /// script
# requires-python = ">=3.11"
# dependencies = ["ais-bench-benchmark==3.1.20260630", "torch", "pyarrow==19.0.1", "setuptools<81"]
# ///
"""AISBench: accuracy on a small TextVQA (base64) and mm_custom's paths; performance of streams by paths and base64.

The first runs have the form of its own vllm_api_general_chat and vllm_api_stream_chat with this server's address.
"""

import csv
import json
import sys
import tempfile
from pathlib import Path

from commands import run

url, folder = sys.argv[1:3]
PORT = int(url.rpartition(":")[2])
MEDIA = Path(".cache/clients/media").resolve()  # what the server may read
QUESTIONS = json.loads(Path("dataset/media/questions.json").read_text())
NUM_TOKENS = 8
CONFIG = """
from ais_bench.benchmark.datasets import {kind}Dataset, {kind_evaluator}
from ais_bench.benchmark.calculators import DefaultPerfMetricCalculator
from ais_bench.benchmark.models import VLLMCustomAPIChat
from ais_bench.benchmark.openicl.icl_inferencer import GenInferencer
from ais_bench.benchmark.openicl.icl_prompt_template.icl_prompt_template_mm import MMPromptTemplate
from ais_bench.benchmark.openicl.icl_retriever import ZeroRetriever
from ais_bench.benchmark.summarizers import DefaultPerfSummarizer

summarizer = {summarizer}
models = [dict(
    attr="service", type=VLLMCustomAPIChat, abbr="here", path={folder!r}, model={model!r}, stream={stream},
    request_rate=0, use_timestamp=False, retry=2, api_key="", host_ip="127.0.0.1", host_port={port}, url="",
    max_out_len={max_tokens}, batch_size=4, trust_remote_code=False,
    generation_kwargs=dict({generation}),
)]
datasets = [dict(
    abbr="small", type={kind}Dataset, path={data!r}, {options},
    reader_cfg=dict(input_columns=["question", "image", "video", "audio"], output_column="answer"),
    infer_cfg=dict(
        prompt_template=dict(type=MMPromptTemplate, template=dict(round=[dict(role="HUMAN", prompt_mm={{
            "text": {{"type": "text", "text": "{{question}}"}},
            "image": {{"type": "image_url", "image_url": {{"url": {image!r}}}}},
            "video": {{"type": "video_url", "video_url": {{"url": "file://{{video}}"}}}},
        }})])),
        retriever=dict(type=ZeroRetriever), inferencer=dict(type=GenInferencer),
    ),
    eval_cfg=dict(evaluator=dict(type={kind_evaluator})),
)]
"""
SUMMARIZERS = {
    "all": 'dict(attr="accuracy", summary_groups=[])',
    "perf": """dict(attr="performance", type=DefaultPerfSummarizer, calculator=dict(
        type=DefaultPerfMetricCalculator, stats_list=["Average", "Min", "Max"],
    ))""",
}
BY_PATH, BY_BASE64 = "file://{image}", "data:image/jpeg;base64,{image}"  # a PNG as well is called jpeg
EXACT = f"temperature=0.01, ignore_eos=True, min_tokens={NUM_TOKENS}"
GREEDY = "temperature=0.0, ignore_eos=False"


def rows() -> list[dict]:
    """Questions about the pictures, and their answers."""
    found = []
    for name in ("objects.png", "number.jpg", "word.png"):
        for entry in QUESTIONS[name][:4]:
            found.append({"name": name, "question": entry["question"], "answer": entry["qwen3"]})
    return found


def write_mm_custom(home: Path) -> Path:
    lines = [
        {"type": "image", "path": [str(MEDIA / row["name"])], "question": row["question"], "answer": row["answer"]}
        for row in rows()
    ]
    clip = {"type": "video", "path": [str(MEDIA / "clip.mp4")], "question": "What is seen?", "answer": "a video"}
    path = home / "mm_custom.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, clip]))
    return path


def write_textvqa(home: Path) -> Path:
    lines, answers = [], []
    for number, row in enumerate(rows()):
        lines.append({"image": str(MEDIA / row["name"]), "question": row["question"], "question_id": number})
        answers.append(
            {"question_id": number, "answers": [{"answer": row["answer"], "answer_id": each} for each in range(10)]}
        )
    path = home / "small.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "small_annotations.json").write_text(json.dumps({"annotations": answers}))
    return path


def bench(home: Path, mode: str, data: Path, image: str, *, model: str, stream: bool, generation: str) -> Path:
    """Where a run of `mode` (all or perf) has left its files."""
    kind = "TEXTVQA" if data.name == "small.jsonl" else "MMCustom"
    options = (
        'image_type="image_base64"' if kind == "TEXTVQA" else f'mm_type="{"path" if image == BY_PATH else "base64"}"'
    )
    config = home / "config.py"
    config.write_text(CONFIG.format(
        kind=kind, kind_evaluator="TEXTEvaluator" if kind == "TEXTVQA" else "MMCustomEvaluator", folder=folder,
        model=model, stream=stream, port=PORT, max_tokens=NUM_TOKENS if generation == EXACT else 32,
        generation=generation, data=str(data), options=options, image=image,
        summarizer=SUMMARIZERS[mode],
    ))  # fmt: skip
    run("ais_bench", config, "--mode", mode, "--debug", "-w", home / "out", folder=home)
    return max((home / "out").iterdir())


with tempfile.TemporaryDirectory() as name:
    home = Path(name)
    output = bench(home, "all", write_textvqa(home), BY_BASE64, model="qwen3_vl", stream=False, generation=GREEDY)
    (result,) = output.glob("results/*/*.json")
    accuracy = json.loads(result.read_text())["accuracy"]
    assert accuracy == 100, (accuracy, result.read_text()[:1000])
    print(f"accuracy on {len(rows())} questions, base64: {accuracy}")

for stream, image, model in ((False, BY_PATH, ""), (True, BY_PATH, "qwen3_vl")):
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        output = bench(home, "all", write_mm_custom(home), image, model=model, stream=stream, generation=GREEDY)
        (answers,) = output.glob("predictions/*/*.jsonl")
        said = [json.loads(line) for line in answers.read_text().splitlines()]
        expected = {row["answer"] for row in rows()}
        assert len(said) == len(rows()) + 1, said
        assert all(each["success"] for each in said), said
        assert sum(each["prediction"] in expected for each in said) >= len(rows()), said
    print(f"mm_custom by path, stream {stream}: {len(said)} answers")

for image in (BY_PATH, BY_BASE64):
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        output = bench(home, "perf", write_mm_custom(home), image, model="qwen3_vl", stream=True, generation=EXACT)
        (table,) = output.glob("performances/*/*.csv")
        with table.open() as lines:
            figures = {row["Performance Parameters"]: row for row in csv.DictReader(lines)}
        (totals,) = [json.loads(path.read_text()) for path in output.glob("performances/*/small.json")]
    assert totals["Failed Requests"]["total"] == 0, totals
    assert totals["Success Requests"]["total"] == len(rows()) + 1, totals
    assert {figures["OutputTokens"][key] for key in ("Min", "Max")} == {f"{NUM_TOKENS}.0"}, figures
    print(f"perf, {image[:15]}: TTFT {figures['TTFT']['Average']}, E2EL {figures['E2EL']['Average']}")
