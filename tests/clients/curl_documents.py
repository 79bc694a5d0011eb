# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""curl, as the documents of vLLM, vLLM-Ascend and MindIE call it: their requests with other words and pictures.

Among them what is wrong in print: a full-width comma in JSON, a picture's address that the server may not fetch.
"""

import base64
import json
import subprocess
import sys
from pathlib import Path

url = sys.argv[1]
MEDIA = Path(".cache/clients/media").resolve()
PICTURE, CLIP = MEDIA / "objects.png", MEDIA / "clip.mp4"
DATA_URL = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
ADDRESSES = (DATA_URL, f"file://{PICTURE}", str(PICTURE))
JSON_HEADER = ("-H", "Content-Type: application/json")


def curl(path: str, body: str, *options: str) -> tuple[int, str]:
    """Status and body of the answer. Without a header curl says that the body is a form's, as MindIE's lines do."""
    words = ["curl", "-sS", "-m", "60", "-w", "\n%{http_code}", f"{url}{path}", *options, "-d", "@-"]
    done = subprocess.run(words, input=body, capture_output=True, text=True, check=True)
    answer, _, status = done.stdout.rpartition("\n")
    return int(status), answer


def chat(messages: list[dict], *options: str, **fields: object) -> str:
    status, answer = curl(
        "/v1/chat/completions", json.dumps({"model": "qwen3_vl", "messages": messages, **fields}), *options
    )
    assert status == 200, answer
    return json.loads(answer)["choices"][0]["message"]["content"]


def refusal(path: str, body: str, *options: str) -> str:
    status, answer = curl(path, body, *options)
    assert status == 400, (status, answer)
    return json.loads(answer)["error"]["message"]


# vLLM-Ascend: a system message, picture before text, no limit on the answer.
question = {"type": "text", "text": "What color is the square?"}
system = {"role": "system", "content": "You are a helpful assistant."}
for address in ADDRESSES:
    picture = {"type": "image_url", "image_url": {"url": address}}
    said = chat([system, {"role": "user", "content": [picture, question]}], *JSON_HEADER)
    assert said == "blue", (address[:20], said)
remote = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
body = {"model": "qwen3_vl", "messages": [system, {"role": "user", "content": [remote, question]}]}
assert "allowed_media_domains" in refusal("/v1/chat/completions", json.dumps(body), *JSON_HEADER)
print("chat as vLLM-Ascend's document has it:", said)

# MindIE: /generate with text first and an address that is a string; the header is curl's own.
for kind, address in (*(("image_url", each) for each in ADDRESSES), ("video_url", str(CLIP))):
    words = "What color is the square?" if kind == "image_url" else "What is seen?"
    prompt = [{"type": "text", "text": words}, {"type": kind, kind: address}]
    body = json.dumps({"prompt": prompt, "max_tokens": 128, "model": "qwen3_vl"})
    status, answer = curl("/generate", body)
    assert status == 200, answer
    (text,) = json.loads(answer)["text"]
    assert kind == "video_url" or text == f"{words} blue", text
    broken = body.replace("}, {", "}，{")
    assert broken != body
    message = refusal("/generate", broken)
    assert "JSON" in message and "，" in message, message
print("/generate as MindIE's document has it:", text, "| with its full-width comma:", message)

# MindIE's chat: do_sample false beside a temperature, so the likeliest tokens all the same.
sampling = {"temperature": 1.0, "top_p": 0.5, "top_k": 10, "repetition_penalty": 1.0, "do_sample": False}
for address in ADDRESSES:
    picture = {"type": "image_url", "image_url": address}
    said = chat([{"role": "user", "content": [picture, question]}], max_tokens=128, stream=False, **sampling)
    assert said == "blue", said
print("chat as MindIE's document has it:", said)
