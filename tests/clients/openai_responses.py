# /// script
# requires-python = ">=3.11"
# dependencies = ["openai==3.57.0", "pydantic>=2", "pillow"]
# ///
"""The openai SDK's responses: whole, streamed, parsed, with tools, going on from one another; and its completions."""

import base64
import io
import json
import sys

import openai
from PIL import Image
from pydantic import BaseModel, Field

url, folder = sys.argv[1:3]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
picture = io.BytesIO()
Image.new("RGB", (160, 128), "red").save(picture, "PNG")
data_url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
parts = [{"type": "input_image", "image_url": data_url}, {"type": "input_text", "text": "What do you see?"}]
question = [{"role": "user", "content": parts}]
greedy = {"model": model, "temperature": 0, "max_output_tokens": 48}

whole = client.responses.create(**greedy, input=question, metadata={"who": "me"})
assert whole.output_text and whole.status == "completed" and whole.usage.output_tokens
assert whole.metadata == {"who": "me"}
print("create:", whole.output_text)

events = list(client.responses.create(**greedy, input=question, stream=True))
assert [event.sequence_number for event in events] == list(range(len(events)))
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
assert events[-1].type == "response.completed" and events[-1].response.output_text == whole.output_text
print("stream:", len(events), "events")

with client.responses.stream(**greedy, input=question) as helper:
    snapshots = [event.snapshot for event in helper if event.type == "response.output_text.delta"]
    final = helper.get_final_response()
assert snapshots[-1] == final.output_text == whole.output_text
print("stream helper:", len(snapshots), "snapshots")

more = client.responses.create(**greedy, input="Count the objects.", previous_response_id=whole.id)
turns = [*question, *whole.output, {"role": "user", "content": "Count the objects."}]
assert more.output_text == client.responses.create(**greedy, input=turns, store=False).output_text
assert client.responses.retrieve(whole.id).output_text == whole.output_text
client.responses.delete(whole.id)
try:
    client.responses.create(**greedy, input="And now?", previous_response_id=more.id)
except openai.NotFoundError as error:
    print("forgotten:", error.message[:90])
else:
    raise AssertionError("a conversation without its beginning was answered")


class Shape(BaseModel):
    colour: str = Field(pattern="^(red|blue)$")
    count: int = Field(ge=0, le=9)


parsed = client.responses.parse(**greedy, input=question, text_format=Shape)
assert isinstance(parsed.output_parsed, Shape), parsed
with client.responses.stream(**greedy, input=question, text_format=Shape) as helper:
    assert helper.get_final_response().output_parsed == parsed.output_parsed
print("parse:", parsed.output_parsed)

SCHEMA = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"],
          "additionalProperties": False}  # fmt: skip
tool = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
called = client.responses.create(**greedy, input=question, tools=[tool], tool_choice="required")
call = next(item for item in called.output if item.type == "function_call")
assert json.loads(call.arguments)["unit"] in "CF" and call.status == "completed", called
with client.responses.stream(**greedy, input=question, tools=[tool], tool_choice="required") as helper:
    told = [event for event in helper if event.type == "response.function_call_arguments.delta"]
    final = helper.get_final_response()
streamed = next(item for item in final.output if item.type == "function_call")
assert streamed.arguments == call.arguments == told[-1].snapshot, final
result = {"type": "function_call_output", "call_id": call.call_id, "output": "12"}
answer = client.responses.create(**greedy, input=[result], previous_response_id=called.id, tools=[tool])
assert answer.status in ("completed", "incomplete") and answer.output
print("tools:", call.name, call.arguments, "then", answer.output_text)

for fields, kind in (
    ({"input": []}, openai.BadRequestError),
    ({"input": "a", "tools": [{"type": "web_search"}]}, openai.BadRequestError),
    ({"input": "a", "model": "another"}, openai.NotFoundError),
    ({"input": "a", "max_output_tokens": 10**6}, openai.BadRequestError),
):
    try:
        client.responses.create(**{**greedy, **fields})
    except kind as error:
        print("refused:", error.message[:100])
    else:
        raise AssertionError(fields)

prompts = ["What is", "Where is"]
plain = client.completions.create(model=model, prompt=prompts, max_tokens=4, temperature=0, logprobs=2, echo=True)
assert [choice.text.startswith(prompt) for choice, prompt in zip(plain.choices, prompts, strict=True)] == [True] * 2
told = list(client.completions.create(model=model, prompt=prompts, max_tokens=4, temperature=0, echo=True, stream=True))
for index, choice in enumerate(plain.choices):
    text = "".join(chunk.choices[0].text for chunk in told if chunk.choices[0].index == index)
    assert text == choice.text and len(choice.logprobs.tokens) == len(choice.logprobs.text_offset)
print("completions:", [choice.text for choice in plain.choices])
