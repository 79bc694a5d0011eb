"""POST /v1/chat/completions: OpenAI's fields, and vLLM's and MindIE's beside them."""

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from executor.errors import UserError
from executor.prompt.chat import tool_names
from executor.prompt.request_options import IO_KEY, read_request_options
from executor.schedule.request import SamplingParams
from executor.serve.answers import gather
from executor.serve.asks import Ask, ChatPrompt
from executor.serve.bodies import JsonRoute
from executor.serve.errors import ApiError, in_words
from executor.serve.middleware import EXCHANGE
from executor.serve.openai.chat_reply import ReplyStyle, chunks, whole_reply
from executor.serve.openai.logprobs import bytes_by
from executor.serve.openai.sampling import MAX_TEXTS, Flag, FormFields, Text, Whole, form_fields, params_of
from executor.serve.parser import AnswerParser
from executor.serve.service import Service
from executor.serve.streams import EventStream, answered
from executor.serve.structured import grammar_of, takes_tools, thinks, tools_of

router = APIRouter(route_class=JsonRoute)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None


class ChatRequest(FormFields):
    """null: not said. What messages, tools and formats hold is checked where they are read."""

    messages: list[Any]
    max_completion_tokens: Whole | None = None
    logprobs: Flag | None = None
    top_logprobs: Whole | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Any], Field(max_length=MAX_TEXTS)] | None = None
    tool_choice: Text | dict[str, Any] | None = None
    parallel_tool_calls: Flag | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: Flag | None = None
    include_reasoning: Flag | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(body.model)
    prompt = prompt_of(body)
    begins_thinking = thinks(service.processor, prompt)
    params = chat_params(service, body, begins_thinking=begins_thinking)
    is_bounded = body.max_completion_tokens is not None or body.max_tokens is not None
    ask = Ask(
        answer_id(request, "chatcmpl-"),
        prompt,
        params,
        service.recipe.server.request_timeout_s,
        fits_exactly=is_bounded,
        limit_field="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    )
    style = style_of(service, body, params, begins_thinking=begins_thinking)
    frame = {"id": ask.id, "created": int(time.time()), "model": service.model_name}
    feed = service.ask(ask)
    if body.stream:
        return await EventStream.start(request, feed, chunks(feed, frame, style))
    return JSONResponse(whole_reply(frame, await answered(request, feed, gather(feed, params.n)), style))


def answer_id(request: Request, prefix: str) -> str:
    """A new id ("chatcmpl-" and digits), which the access log has too."""
    name = request.scope[EXCHANGE].answer_id = f"{prefix}{uuid.uuid4().hex}"
    return name


def prompt_of(body: ChatRequest) -> ChatPrompt:
    """Raises ApiError 400."""
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise ApiError(
            400, "continue_final_message and add_generation_prompt are both true; allowed: one of them, as an answer "
            "is either continued or begun", param="continue_final_message",
        )  # fmt: skip
    template_kwargs = dict(body.chat_template_kwargs or {})
    if body.enable_thinking is not None:
        template_kwargs.setdefault("enable_thinking", body.enable_thinking)
    return ChatPrompt(
        messages=body.messages,
        tools=tools_of(form_fields(body)),
        add_generation_prompt=not continues and body.add_generation_prompt is not False,
        continue_final_message=continues,
        template_kwargs=template_kwargs,
        media_options=media_options(body.mm_processor_kwargs, body.media_io_kwargs),
    )


def media_options(processor: Mapping[str, Any] | None, reading: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `mm_processor_kwargs` and `media_io_kwargs` say of all media. Raises ApiError 400."""
    options = {**(processor or {}), **({IO_KEY: reading} if reading else {})}
    try:
        read_request_options(options)
    except UserError as error:
        raise in_words(400, str(error)) from error
    return options


def chat_params(service: Service, body: ChatRequest, *, begins_thinking: bool) -> SamplingParams:
    """Raises ApiError 400."""
    asked = body.max_completion_tokens
    names = {"logprobs": "top_logprobs"}
    if asked is not None:
        names["max_new_tokens"] = "max_completion_tokens"
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400, f"top_logprobs is {body.top_logprobs} without logprobs; allowed: together with logprobs true",
            param="top_logprobs",
        )  # fmt: skip
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(
            400, "prompt_logprobs cannot be streamed; ask with stream false, or without it", param="prompt_logprobs"
        )
    more = {
        "max_new_tokens": asked,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "grammar": grammar_of(form_fields(body), thinks=begins_thinking),
    }
    return params_of(service, body, more=more, names=names)


def style_of(service: Service, body: ChatRequest, params: SamplingParams, *, begins_thinking: bool) -> ReplyStyle:
    options = body.stream_options or StreamOptions()
    fields = form_fields(body)
    finds_calls = takes_tools(fields)
    names = tool_names(tools_of(fields)) if finds_calls else None

    def new_parser() -> AnswerParser:
        return AnswerParser(takes_tools=finds_calls, thinks=begins_thinking, tool_names=names)

    return ReplyStyle(
        n=params.n,
        new_parser=new_parser,
        bytes_of=bytes_by(service.processor.tokenizer),
        has_logprobs=params.logprobs is not None and bool(body.logprobs),
        has_reasoning=body.include_reasoning is not False,
        includes_usage=bool(options.include_usage),
        counts_on=bool(options.continuous_usage_stats),
    )
