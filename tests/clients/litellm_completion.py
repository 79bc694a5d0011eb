# /// script
# requires-python = ">=3.11"
# dependencies = ["litellm==1.110.2", "pillow"]
# ///
"""litellm, by its providers `openai/` and `hosted_vllm/`: chat with a picture, streams with usage, tools, errors."""

import base64
import io
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no price list from the web

import litellm
from PIL import Image

url, folder = sys.argv[1:3]
picture = io.BytesIO()
Image.new("RGB", (160, 128), "red").save(picture, "PNG")
data_url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
parts = [{"type": "image_url", "image_url": {"url": data_url}}, {"type": "text", "text": "Which colour is it?"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"where": {"enum": ["left", "right"]}}, "required": ["where"],
    "additionalProperties": False}}}  # fmt: skip

for provider in ("openai", "hosted_vllm"):
    asked = {"model": f"{provider}/qwen3_vl", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0,
             "messages": [{"role": "user", "content": parts}], "max_tokens": 12, "temperature": 0}  # fmt: skip
    whole = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    usage = next(chunk.usage for chunk in reversed(chunks) if getattr(chunk, "usage", None))
    assert usage.prompt_tokens == whole.usage.prompt_tokens > 16, usage
    assert usage.completion_tokens == whole.usage.completion_tokens, usage
    called = litellm.completion(**{**asked, "max_tokens": 100}, tools=[TOOL], tool_choice="required")
    assert called.choices[0].message.tool_calls[0].function.name == "look", called
    assert litellm.completion(**asked, top_k=1, repetition_penalty=1.0).choices[0].message.content == text
    try:
        litellm.completion(**{**asked, "temperature": -1})
    except litellm.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("a temperature of -1 was taken")
    print(provider, repr(text), usage.prompt_tokens, usage.completion_tokens)
