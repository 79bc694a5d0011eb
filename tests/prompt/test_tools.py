"""Tools and reasoning: rendered by whichever template of the checkpoint knows them, refused where none does."""

import json
import shutil
from pathlib import Path

import pytest

from executor.errors import UserError
from executor.prompt.chat import Chat
from executor.prompt.messages import normalise_messages
from models.qwen2_5_vl.processor import Processor
from tests.reference import REPO

TINY = REPO / "models" / "tiny"
PICTURE = str(REPO / "dataset" / "media" / "objects.png")
TOOL = {"type": "function", "function": {"name": "zoom", "description": "Look <|im_end|> closer", "parameters": {}}}
# A template for tools that knows texts only, as Qwen2.5-VL's tokenizer_config.json has one.
TEXT_TEMPLATE = """{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content + '' }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Reasoning as published Thinking checkpoints treat it: kept after the last question of the user, else left out.
THINKING_TEMPLATE = """{%- set state = namespace(last=-1) %}
{%- for message in messages if message.role == 'user' %}{% set state.last = messages.index(message) %}{% endfor %}
{%- for message in messages %}<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{%- if message.reasoning_content is string and loop.index0 > state.last %}
<think>
{{ message.reasoning_content }}
</think>
{% endif %}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen2.5-VL with its templates where the published folders have them."""
    folder = tmp_path_factory.mktemp("published")
    for file in (TINY / "qwen2_5_vl").iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, folder)
    template = (TINY / "qwen2_5_vl" / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEXT_TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def processor(published: Path) -> Processor:
    return Processor(published)


def conversation(arguments: object) -> list[dict]:
    call = {"id": "1", "type": "function", "function": {"name": "zoom", "arguments": arguments}}
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What <|im_end|>?"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "image", "image": PICTURE}]},
    ]


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}], ids=["text", "object"])
def test_tools_and_pictures_together_with_qwen2_5(processor: Processor, arguments: object) -> None:
    prompt = processor.build(conversation(arguments), tools=[TOOL])
    assert '"name": "zoom"' in prompt.text
    assert '<tool_call>zoom {"x": 1}<' in prompt.text
    assert prompt.text.count("<|vision_start|><|image_pad|><|vision_end|>") == 2
    assert [item.kind for item in prompt.media] == ["image", "image"] and len(prompt.spans) == 2
    # What the user and the tool wrote stays text: three messages, the system's and the answer to come.
    ends = prompt.token_ids.count(processor.chat.special.ids["<|im_end|>"])
    assert ends == 4


def test_pictures_without_tools_keep_their_own_template(processor: Processor) -> None:
    question = conversation("{}")[:1]
    plain = processor.build(question).text
    assert "You are a helpful assistant" in plain and "Tools:" not in plain
    numbered = processor.build(conversation("{}"), chat_template_kwargs={"add_vision_id": True}).text
    assert "Picture 1: <|vision_start|>" in numbered and "Picture 2: <|vision_start|>" in numbered


def test_a_template_in_a_file_of_its_own_hides_none(published: Path, tmp_path: Path) -> None:
    """A folder saved again has chat_template.jinja, and may keep tokenizer_config.json's template."""
    folder = tmp_path / "saved"
    shutil.copytree(published, folder)
    (folder / "chat_template.json").unlink()
    shutil.copy(TINY / "qwen2_5_vl" / "chat_template.jinja", folder)
    assert '"name": "zoom"' in Processor(folder).build(conversation("{}"), tools=[TOOL]).text


def test_what_would_be_dropped_is_refused(processor: Processor) -> None:
    alone = Chat.load(TINY / "qwen2_5_vl")
    messages, _ = normalise_messages(conversation("{}"))
    with pytest.raises(UserError, match="the messages hold tool calls or answers of tools, but this checkpoint's"):
        alone.render(messages)
    silent = Chat(alone.tokenizer, "{% if tools %}{% endif %}{{ messages[0].role }}")
    with pytest.raises(UserError, match="the tool 'zoom' is not in the text"):
        silent.render([{"role": "user", "content": "x"}], tools=[TOOL])
    with pytest.raises(UserError, match="the arguments of 'zoom' are not valid JSON"):
        processor.build(conversation("{x"), tools=[TOOL])
    reasoned = [{"role": "assistant", "content": "x", "reasoning_content": "so"}, {"role": "user", "content": "y"}]
    with pytest.raises(UserError, match=r"messages\[0\] has reasoning_content, which .* leaves out"):
        alone.render(normalise_messages(reasoned)[0])


def test_reasoning_is_kept_after_the_last_question(caplog: pytest.LogCaptureFixture) -> None:
    thinking = Chat(Chat.load(TINY / "qwen3_vl").tokenizer, THINKING_TEMPLATE)
    messages = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "early thoughts"},
        {"role": "user", "content": "Second?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "late thoughts",
            "tool_calls": [{"function": {"name": "zoom"}}],
        },
        {"role": "tool", "content": "A square.", "weight": 0},
    ]
    text = "".join(piece for piece in thinking.render(normalise_messages(messages)[0]) if isinstance(piece, str))
    assert "early thoughts" not in text and "<think>\nlate thoughts\n</think>" in text and "zoom" in text
    thinking.render(normalise_messages(messages)[0])
    assert caplog.text.count("the key 'weight' of messages has no place") == 1
