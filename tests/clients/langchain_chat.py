# /// script
# requires-python = ">=3.11"
# dependencies = ["langchain-openai==1.7.4", "pillow"]
# ///
"""langchain-openai: invoke and stream with a picture, structured output by each of its methods, tools."""

import base64
import io
import sys

from langchain_openai import ChatOpenAI
from PIL import Image
from pydantic import BaseModel, Field

url, folder = sys.argv[1:3]
picture = io.BytesIO()
Image.new("RGB", (160, 128), "red").save(picture, "PNG")
encoded = base64.b64encode(picture.getvalue()).decode()
image = {"type": "image", "source_type": "base64", "mime_type": "image/png", "data": encoded}
message = {"role": "user", "content": [image, {"type": "text", "text": "Which colour is it?"}]}


class Look(BaseModel):
    """What is seen."""

    count: int = Field(ge=0, le=9)
    is_red: bool


def chat(max_tokens: int) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model="qwen3_vl", temperature=0, max_tokens=max_tokens, max_retries=0
    )


whole = chat(12).invoke([message])
chunks = list(chat(12).stream([message], stream_usage=True))
assert "".join(chunk.content for chunk in chunks) == whole.content, chunks
counted = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
assert counted and counted[-1]["output_tokens"] == whole.usage_metadata["output_tokens"], counted
print("invoke and stream:", repr(whole.content), whole.usage_metadata["input_tokens"], "tokens in")
for method in ("json_schema", "function_calling"):
    seen = chat(200).with_structured_output(Look, method=method).invoke([message])
    assert isinstance(seen, Look), seen
    print(method, seen)
called = chat(200).bind_tools([Look], tool_choice="any").invoke([message])
assert called.tool_calls[0]["name"] == "Look" and set(called.tool_calls[0]["args"]) == {"count", "is_red"}, called
print("tools:", called.tool_calls[0]["args"])
