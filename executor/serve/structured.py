"""What a request says about the form of its answer, as one Grammar: response_format, structured_outputs, tools.

Knows the fields' meaning in the protocols of OpenAI and vLLM; whether a schema can be enforced is found where the
grammar is compiled, in the thread that prepares the request.
"""

from collections.abc import Mapping
from typing import Any

from executor.schedule.request import Grammar
from executor.serve.asks import ChatPrompt


def grammar_of(fields: Mapping[str, Any], *, thinks: bool = False) -> Grammar | None:
    """The grammar of a request's answer; None where nothing is said about it.

    `fields`: the request's body. Read are response_format, structured_outputs, guided_json, guided_regex,
    guided_choice, guided_grammar, tools, tool_choice and parallel_tool_calls. `thinks`: the answer begins inside its
    reasoning, which no grammar binds. Raises ApiError 400 with the field's name.
    """
    return None


def takes_tools(fields: Mapping[str, Any]) -> bool:
    """Whether calls are looked for in the answer: there are tools, and tool_choice is not none."""
    return bool(fields.get("tools")) and fields.get("tool_choice") != "none"


def tools_of(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools that the template shows: all of them, none with tool_choice none. Raises ApiError 400."""
    return tuple(fields.get("tools") or ()) if takes_tools(fields) else ()


def thinks(processor: Any, prompt: ChatPrompt) -> bool:
    """Whether the answer to a conversation begins inside its reasoning.

    So it is where the chat template ends its generation prompt with an open `<think>` (Qwen3-VL-Thinking); the
    template is asked with the request's chat_template_kwargs, which may switch it.
    """
    return False
