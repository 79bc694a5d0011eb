# /// script
# requires-python = ">=3.11"
# dependencies = ["openai==3.57.0", "pydantic>=2", "pillow"]
# ///
"""The openai SDK: chat, streams, pictures by data URL and by path, structured output, tools, responses, errors."""

import base64
import io
import json
import sys
from pathlib import Path

import openai
from PIL import Image
from pydantic import BaseModel

url, folder = sys.argv[1:3]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
picture = io.BytesIO()
Image.new("RGB", (160, 128), "red").save(picture, "PNG")
data_url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
path = Path(".cache/clients/media/red.png").resolve()
path.write_bytes(picture.getvalue())


def about(address: str) -> list:
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "Which colour is it?"}]
    return [{"role": "user", "content": parts}]


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


class Shape(BaseModel):
    colour: str
    count: int


whole = client.chat.completions.create(model=model, messages=about(data_url), max_tokens=12, temperature=0)
assert whole.choices[0].message.content and whole.usage.completion_tokens, whole
by_path = client.chat.completions.create(
    model=model, messages=about(f"file://{path}"), max_completion_tokens=12, temperature=0
)
assert by_path.choices[0].message.content == whole.choices[0].message.content, by_path
print("chat, picture by data URL and by path:", whole.choices[0].message.content)

stream = client.chat.completions.create(
    model=model, messages=about(data_url), max_tokens=12, temperature=0, stream=True,
    stream_options={"include_usage": True},
)  # fmt: skip
chunks = list(stream)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
    whole.choices[0].message.content
)
assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage, chunks[-1]
print("stream:", len(chunks), "chunks")

with client.chat.completions.stream(model=model, messages=about(data_url), max_tokens=64, temperature=0) as helper:
    final = helper.get_final_completion() if whole.choices[0].finish_reason == "stop" else None
print("stream helper:", final and final.choices[0].message.content)

scored = client.chat.completions.create(
    model=model, messages=about(data_url), max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
)
assert all(len(one.top_logprobs) == 2 for one in scored.choices[0].logprobs.content), scored
two = client.chat.completions.create(model=model, messages=about(data_url), max_tokens=4, n=2, temperature=1, seed=3)
assert len(two.choices) == 2

SHORT = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
shaped = client.chat.completions.create(
    model=model, messages=about(data_url), temperature=0, max_tokens=64,
    response_format={"type": "json_schema", "json_schema": {"name": "shape", "strict": True, "schema": SHORT}},
)  # fmt: skip
assert Shape.model_validate_json(shaped.choices[0].message.content).colour in ("red", "blue"), shaped
print("json_schema:", shaped.choices[0].message.content)

called = client.chat.completions.create(
    model=model, messages=about(data_url), tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=200
)
call = called.choices[0].message.tool_calls[0]
assert called.choices[0].finish_reason == "tool_calls" and set(json.loads(call.function.arguments)) == {"city", "unit"}
print("tool call:", call.function.name, call.function.arguments)
parts = client.chat.completions.create(
    model=model, messages=about(data_url), tools=[WEATHER], temperature=0, max_tokens=200, stream=True,
    tool_choice={"type": "function", "function": {"name": "get_weather"}},
)  # fmt: skip
pieces = [
    chunk.choices[0].delta.tool_calls[0] for chunk in parts if chunk.choices and chunk.choices[0].delta.tool_calls
]
assert pieces[0].function.name == "get_weather" and pieces[0].id
assert "".join(piece.function.arguments or "" for piece in pieces) == call.function.arguments
answered = client.chat.completions.create(
    model=model, temperature=0, max_tokens=8, tools=[WEATHER],
    messages=[*about(data_url), called.choices[0].message,
              {"role": "tool", "tool_call_id": call.id, "content": "12 C"}],
)  # fmt: skip
assert answered.choices[0].message.role == "assistant"

reply = client.responses.create(
    model=model, temperature=0, max_output_tokens=12,
    input=[{"role": "user", "content": [{"type": "input_image", "image_url": data_url},
                                        {"type": "input_text", "text": "Which colour is it?"}]}],
)  # fmt: skip
assert reply.output_text == whole.choices[0].message.content, reply
events = list(client.responses.create(model=model, input="hi", max_output_tokens=8, temperature=0, stream=True))
assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete"), events
print("responses:", reply.output_text, "|", len(events), "events")

text = client.completions.create(model=model, prompt="a", max_tokens=4, temperature=0)
assert text.choices[0].finish_reason in ("stop", "length")
for mistake, kind in (
    ({"temperature": -1}, openai.BadRequestError),
    ({"messages": []}, openai.BadRequestError),
    ({"model": "another"}, openai.NotFoundError),
    ({"max_tokens": 10**6}, openai.BadRequestError),
):
    try:
        client.chat.completions.create(**{"model": model, "messages": about(data_url), **mistake})
    except kind as error:
        print("refused:", error.message[:120])
    else:
        raise AssertionError(mistake)
