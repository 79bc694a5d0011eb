# /// script
# requires-python = ">=3.11"
# dependencies = ["lmms-eval==0.7.3", "torch", "torchvision"]
# ///
"""lmms-eval by its model `openai`: a small task of its own form about pictures on disk; every answer is right."""

import json
import sys
import tempfile
from pathlib import Path

from commands import run

url, folder = sys.argv[1:3]
MEDIA = Path("dataset/media").resolve()
TASK = """
task: small
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function words.visuals
doc_to_text: !function words.text
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
process_results: !function words.results
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
WORDS = """
from PIL import Image

def visuals(row):
    return [Image.open(row["image"]).convert("RGB")]

def text(row, lmms_eval_specific_kwargs=None):
    return row["question"]

def results(row, answers):
    return {"right": float(answers[0].strip() == row["answer"])}
"""

rows = []
for name in ("objects.png", "number.jpg", "word.png"):
    for entry in json.loads((MEDIA / "questions.json").read_text())[name][:3]:
        rows.append({"image": str(MEDIA / name), "question": entry["question"], "answer": entry["qwen3"]})
with tempfile.TemporaryDirectory() as place:
    home = Path(place)
    (home / "tasks").mkdir()
    data = home / "rows.json"
    data.write_text(json.dumps(rows))
    (home / "tasks/small.yaml").write_text(TASK.format(data=data))
    (home / "tasks/words.py").write_text(WORDS)
    output = run(
        "python", "-m", "lmms_eval", "--model", "openai", "--model_args",
        f"model=qwen3_vl,base_url={url}/v1,api_key=none,timeout=120", "--tasks", "small", "--include_path",
        home / "tasks", "--output_path", home / "out", "--log_samples", folder=home,
        environment={"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(home / "cache")},
    )  # fmt: skip
    found = next((home / "out").rglob("*results.json"), None)
    assert found is not None, output[-4000:]
    figures = json.loads(found.read_text())["results"]["small"]
right = next(value for key, value in figures.items() if key.startswith("right"))
assert right == 1, figures
print(f"{len(rows)} questions about pictures, right: {right:.0%}")
