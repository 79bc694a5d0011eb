"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form, over the same prompts and answers as chats."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from executor.prompt.chat import tool_names
from executor.serve.anthropic.message_input import (
    messages_of,
    refusal,
    response_format_of,
    tool_choice_of_messages,
    tools_of_messages,
)
from executor.serve.anthropic.message_output import MessageWriter
from executor.serve.asks import Ask, ChatPrompt
from executor.serve.backends import build_prompt
from executor.serve.blocks import BlockAnswer, changes, drained
from executor.serve.bodies import JsonRoute
from executor.serve.errors import ApiError, anthropic_body
from executor.serve.feed import Feed
from executor.serve.openai.chat import answer_id
from executor.serve.openai.sampling import FormFields, Text, Whole, form_fields, params_of
from executor.serve.parser import AnswerParser
from executor.serve.service import Service
from executor.serve.streams import EventStream, answered, event
from executor.serve.structured import grammar_under, takes_tools, thinks, tools_of

router = APIRouter(route_class=JsonRoute)


class MessageFields(FormFields):
    """null: not said. What blocks and tools hold is checked where they are read."""

    messages: list[Any]
    system: Text | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    stop_sequences: list[Text] | None = None
    container: Any = None
    mcp_servers: list[Any] | None = None
    context_management: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None


class MessageRequest(MessageFields):
    max_tokens: Whole


@dataclass(frozen=True)
class Asked:
    """A conversation, and what the answer may hold."""

    prompt: ChatPrompt
    form: dict[str, Any]  # fields in chat's form
    begins_thinking: bool


@router.post("/v1/messages")
async def messages(body: MessageRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(body.model)
    asked = _asked(service, body)
    stop = [*([body.stop] if isinstance(body.stop, str) else body.stop or ()), *(body.stop_sequences or ())]
    grammar = grammar_under(asked.form, "output_config.format", thinks=asked.begins_thinking)
    more = {"grammar": grammar, "stop": stop or None}
    params = params_of(service, body, more=more, names={"stop": "stop_sequences"})
    if params.n != 1:
        raise refusal("n", f"is {params.n}; allowed: 1, a message is one answer")
    name = answer_id(request, "msg_")
    ask = Ask(name, asked.prompt, params, service.recipe.server.request_timeout_s, fits_exactly=True)
    finds_calls = takes_tools(asked.form)
    names = tool_names(tools_of(asked.form)) if finds_calls else None
    answer = BlockAnswer(AnswerParser(takes_tools=finds_calls, thinks=asked.begins_thinking, tool_names=names))
    writer = MessageWriter({"id": name, "model": service.model_name}, answer)
    feed = service.ask(ask)
    if body.stream:
        return await EventStream.start(request, feed, events(feed, answer, writer), write_error=_error)
    await answered(request, feed, drained(feed, answer))
    return JSONResponse(writer.message)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: MessageFields, request: Request) -> dict[str, int]:
    service: Service = request.app.state.service
    service.check_model(body.model)
    ask = Ask("count", _asked(service, body).prompt, None)
    prompt = await asyncio.to_thread(build_prompt, service.processor, ask)
    return {"input_tokens": len(prompt.token_ids)}


def _asked(service: Service, body: MessageFields) -> Asked:
    """Raises ApiError 400."""
    for name in ("container", "mcp_servers", "context_management"):
        if getattr(body, name):
            raise refusal(name, "is not supported: nothing is run or kept here; leave it out")
    chat = messages_of(body.messages, body.system)
    choice = tool_choice_of_messages(body.tool_choice)
    form = {
        **form_fields(body),
        "tools": tools_of_messages(body.tools),
        "tool_choice": choice.get("tool_choice"),
        "parallel_tool_calls": choice.get("parallel_tool_calls"),
        "response_format": response_format_of(body.output_config) or body.response_format,
    }
    continues = bool(chat) and chat[-1]["role"] == "assistant"
    prompt = ChatPrompt(
        chat,
        tools=tools_of(form),
        add_generation_prompt=not continues,
        continue_final_message=continues,
        template_kwargs=dict(body.chat_template_kwargs or {}),
        media_options=dict(body.mm_processor_kwargs or {}),
    )
    begins_thinking = thinks(service.processor, prompt)
    _check_thinking(body.thinking or {}, begins_thinking)
    return Asked(prompt, form, begins_thinking)


def _check_thinking(thinking: dict[str, Any], begins_thinking: bool) -> None:
    """Whether an answer begins with thoughts is the checkpoint's: what is asked for must be what it does."""
    kind = thinking.get("type")
    if kind not in (None, "adaptive", "disabled", "enabled"):
        raise refusal("thinking.type", f"is {kind!r}; allowed: adaptive, disabled")
    if kind == "enabled" and thinking.get("budget_tokens") is not None:
        raise refusal("thinking.budget_tokens", "is not supported: thoughts have no limit of their own; give adaptive")
    if kind == "disabled" and begins_thinking:
        raise refusal("thinking.type", "is 'disabled', but this checkpoint always thinks; leave it out")
    if kind == "enabled" and not begins_thinking:
        raise refusal("thinking.type", "is 'enabled', but this checkpoint does not think; leave it out")


async def events(feed: Feed, answer: BlockAnswer, writer: MessageWriter) -> AsyncIterator[str]:
    """What tells the message from its start, which goes out together with its first text, to its end."""
    is_begun = False
    async for step in changes(feed, answer):
        told = [] if is_begun else [writer.begin()]
        is_begun = True
        told += writer.write(step)
        if answer.finish_reason is not None:
            told += writer.end()
        yield "".join(event(each, each["type"]) for each in told)


def _error(error: ApiError) -> str:
    return event(anthropic_body(error), "error")
