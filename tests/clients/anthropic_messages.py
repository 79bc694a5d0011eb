# /// script
# requires-python = ">=3.11"
# dependencies = ["anthropic==2.14.0", "pydantic>=2", "pillow"]
# ///
"""The anthropic SDK: messages, streams, pictures, tools, structured output, counting, errors."""

import base64
import io
import sys

import anthropic
from PIL import Image

url, folder = sys.argv[1:3]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
model = folder.rstrip("/").rpartition("/")[2]
picture = io.BytesIO()
Image.new("RGB", (160, 128), "red").save(picture, "PNG")
source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture.getvalue()).decode()}
parts = [{"type": "image", "source": source}, {"type": "text", "text": "What do you see?"}]
question = [{"role": "user", "content": parts}]
greedy = {"model": model, "max_tokens": 48, "extra_body": {"temperature": 0}}  # no keyword of this version

whole = client.messages.create(**greedy, messages=question, system="Answer.")
assert whole.content[0].text and whole.stop_reason == "end_turn" and whole.usage.output_tokens, whole
print("create:", whole.content[0].text)

with client.messages.stream(**greedy, messages=question, system="Answer.") as helper:
    text = "".join(helper.text_stream)
    final = helper.get_final_message()
assert text == whole.content[0].text == final.content[0].text and final.stop_reason == "end_turn", final
assert final.usage.output_tokens == whole.usage.output_tokens, final
print("stream:", text)

count = client.messages.count_tokens(model=model, messages=question, system="Answer.").input_tokens
assert count == whole.usage.input_tokens + whole.usage.cache_read_input_tokens, (count, whole.usage)

cut = client.messages.create(**{**greedy, "max_tokens": 1}, messages=question)
assert cut.stop_reason == "max_tokens"
letter = whole.content[0].text[-1]
stopped = client.messages.create(**greedy, messages=question, system="Answer.", stop_sequences=[letter])
assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", letter), stopped

begun = [*question, {"role": "assistant", "content": whole.content[0].text[:3]}]
rest = client.messages.create(**greedy, messages=begun, system="Answer.")
print("continued:", repr(whole.content[0].text[:3]), "+", repr(rest.content[0].text))

SCHEMA = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"],
          "additionalProperties": False}  # fmt: skip
tool = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}
called = client.messages.create(**greedy, messages=question, tools=[tool], tool_choice={"type": "any"})
use = next(block for block in called.content if block.type == "tool_use")
assert called.stop_reason == "tool_use" and use.input["unit"] in "CF", called
with client.messages.stream(
    **greedy, messages=question, tools=[tool], tool_choice={"type": "tool", "name": "get_weather"}
) as helper:
    final = helper.get_final_message()
assert next(block for block in final.content if block.type == "tool_use").input == use.input, final
result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "12"}]}
turns = [*question, {"role": "assistant", "content": called.content}, result]
answer = client.messages.create(**greedy, messages=turns, tools=[tool])
assert answer.role == "assistant" and answer.content
print("tools:", use.name, use.input, "then", answer.content[0])

shaped = client.messages.create(
    **greedy, messages=question, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}
)
assert shaped.content[0].text.replace(" ", "") in ('{"unit":"C"}', '{"unit":"F"}'), shaped
print("structured:", shaped.content[0].text)

for fields, kind in (
    ({"messages": []}, anthropic.BadRequestError),
    ({"messages": question, "model": "another"}, anthropic.NotFoundError),
    ({"messages": question, "max_tokens": 20_000}, anthropic.BadRequestError),
):
    try:
        client.messages.create(**{**greedy, **fields})
    except kind as error:
        print("refused:", error.body["error"]["message"][:100])
    else:
        raise AssertionError(fields)
