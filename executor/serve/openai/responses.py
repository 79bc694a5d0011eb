"""POST /v1/responses: OpenAI's newer endpoint, over the same prompts and answers as chats."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from executor.prompt.chat import tool_names
from executor.schedule.request import SamplingParams
from executor.serve.asks import Ask, ChatPrompt
from executor.serve.blocks import BlockAnswer, changes, drained
from executor.serve.bodies import JsonRoute
from executor.serve.errors import ApiError
from executor.serve.feed import Feed
from executor.serve.openai.chat import answer_id, media_options
from executor.serve.openai.logprobs import bytes_by
from executor.serve.openai.response_input import (
    messages_of,
    response_format_of,
    tool_choice_of_response,
    tools_of_response,
)
from executor.serve.openai.response_output import ResponseWriter
from executor.serve.openai.response_store import ResponseStore
from executor.serve.openai.sampling import Flag, FormFields, Text, Whole, form_fields, params_of
from executor.serve.parser import AnswerParser
from executor.serve.service import Service
from executor.serve.streams import EventStream, answered, event
from executor.serve.structured import grammar_under, takes_tools, thinks, tools_of

router = APIRouter(route_class=JsonRoute)

LOGPROBS = "message.output_text.logprobs"  # of `include`


class ResponseRequest(FormFields):
    """null: not said. What items, tools and formats hold is checked where they are read."""

    input: Text | list[Any]
    instructions: Text | None = None
    max_output_tokens: Whole | None = None
    previous_response_id: Text | None = None
    store: Flag | None = None
    metadata: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Text | dict[str, Any] | None = None
    parallel_tool_calls: Flag | None = None
    include: list[Text] | None = None
    top_logprobs: Whole | None = None
    background: Flag | None = None
    conversation: Any = None
    prompt: Any = None
    max_tool_calls: Whole | None = None
    stream_options: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Job:
    """A request that has been understood."""

    ask: Ask
    items: list[Any]  # of this request alone
    writer: ResponseWriter
    answer: BlockAnswer


@router.post("/v1/responses")
async def responses(body: ResponseRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    store: ResponseStore = request.app.state.responses
    service.check_model(body.model)
    job = job_of(service, store, body, answer_id(request, "resp_"))
    feed = service.ask(job.ask)
    if body.stream:
        return await EventStream.start(request, feed, events(feed, job, store, body), write_error=_error_of(job.writer))
    await answered(request, feed, drained(feed, job.answer))
    _keep(store, job, body)
    return JSONResponse(job.writer.response)


@router.get("/v1/responses/{name}")
async def kept_response(name: str, request: Request) -> dict[str, Any]:
    return request.app.state.responses.get(name).response


@router.get("/v1/responses/{name}/input_items")
async def kept_input(name: str, request: Request) -> dict[str, Any]:
    """Newest first, as the protocol has it."""
    items = request.app.state.responses.get(name).input[::-1]
    return {"object": "list", "data": items, "first_id": None, "last_id": None, "has_more": False}


@router.delete("/v1/responses/{name}")
async def forget_response(name: str, request: Request) -> dict[str, Any]:
    store: ResponseStore = request.app.state.responses
    store.get(name)
    store.remove(name)
    return {"id": name, "object": "response", "deleted": True}


def job_of(service: Service, store: ResponseStore, body: ResponseRequest, name: str) -> Job:
    """Raises ApiError 400, and 404 for a response before it that is not kept."""
    _refuse(body)
    items = [{"type": "message", "role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    items = store.resolved(items)
    before = store.conversation(body.previous_response_id) if body.previous_response_id else []
    messages = messages_of([*before, *items], body.instructions)
    if not messages:
        raise ApiError(400, "input is empty; give a text or a list of items", param="input")
    form = _form_of(body)
    prompt = ChatPrompt(
        messages,
        tools=tools_of(form),
        template_kwargs=dict(body.chat_template_kwargs or {}),
        media_options=media_options(body.mm_processor_kwargs, body.media_io_kwargs),
    )
    begins_thinking = thinks(service.processor, prompt)
    params = _params_of(service, body, form, begins_thinking=begins_thinking)
    is_bounded = body.max_output_tokens is not None or body.max_tokens is not None
    ask = Ask(
        name, prompt, params, service.recipe.server.request_timeout_s, fits_exactly=is_bounded, prompt_field="input",
        limit_field="max_tokens" if body.max_output_tokens is None else "max_output_tokens",
    )  # fmt: skip
    finds_calls = takes_tools(form)
    names = tool_names(tools_of(form)) if finds_calls else None
    answer = BlockAnswer(AnswerParser(takes_tools=finds_calls, thinks=begins_thinking, tool_names=names))
    frame = frame_of(service, body, params, name)
    return Job(ask, items, ResponseWriter(frame, answer, bytes_by(service.processor.tokenizer)), answer)


def _form_of(body: ResponseRequest) -> dict[str, Any]:
    """The fields that say how the answer is written, in chat's form."""
    form = {
        "tools": tools_of_response(body.tools),
        "tool_choice": tool_choice_of_response(body.tool_choice),
        "response_format": response_format_of(body.text) or body.response_format,
    }
    return {**form_fields(body), **form}


def _refuse(body: ResponseRequest) -> None:
    """Raises ApiError 400 for what is not served and would change the answer, or what the client gets of it."""
    for name, words in (
        ("background", "answers are not written in the background; ask with stream true"),
        ("conversation", "conversations are not kept; use previous_response_id"),
        ("prompt", "no prompts are kept here; write it into instructions and input"),
    ):
        if getattr(body, name):
            raise ApiError(400, f"{name} is not supported: {words}", param=name, code="unsupported_parameter")
    if body.n not in (None, 1):
        raise ApiError(400, f"n is {body.n}; allowed: 1, a response is one answer", param="n")
    for place, value, neutral in (
        ("reasoning.effort", (body.reasoning or {}).get("effort"), (None,)),
        ("text.verbosity", (body.text or {}).get("verbosity"), (None, "medium")),
    ):
        if value not in neutral:
            raise ApiError(
                400, f"{place} is {str(value)[:80]!r}, which is not supported; allowed: "
                f"{' or '.join('null' if each is None else repr(each) for each in neutral)}", param=place,
                code="unsupported_parameter",
            )  # fmt: skip


def _params_of(
    service: Service, body: ResponseRequest, form: dict[str, Any], *, begins_thinking: bool
) -> SamplingParams:
    has_logprobs = bool(body.top_logprobs) or LOGPROBS in (body.include or ())
    more = {
        "max_new_tokens": body.max_output_tokens,
        "logprobs": (body.top_logprobs or 0) if has_logprobs else None,
        "grammar": grammar_under(form, "text.format", thinks=begins_thinking),
    }
    names = {"logprobs": "top_logprobs"}
    if body.max_output_tokens is not None:
        names["max_new_tokens"] = "max_output_tokens"
    return params_of(service, body, more=more, names=names)


def frame_of(service: Service, body: ResponseRequest, params: SamplingParams, name: str) -> dict[str, Any]:
    """The response's fields that the answer does not change: what was asked, with its defaults."""
    return {
        "id": name,
        "object": "response",
        "created_at": int(time.time()),
        "model": service.model_name,
        "error": None,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"}, **{k: v for k, v in (body.text or {}).items() if v is not None}},
        "tool_choice": body.tool_choice if body.tool_choice is not None else "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


async def events(feed: Feed, job: Job, store: ResponseStore, body: ResponseRequest) -> AsyncIterator[str]:
    """What tells the response from its creation, which goes out together with its first text, to its end."""
    told = job.writer.begin()
    async for step in changes(feed, job.answer):
        told += job.writer.write(step)
        if job.answer.finish_reason is not None:
            told += job.writer.end()
            _keep(store, job, body)
        yield _lines(told)
        told = []


def _lines(told: Sequence[dict[str, Any]]) -> str:
    return "".join(event(each, each["type"]) for each in told)


def _error_of(writer: ResponseWriter) -> Any:
    def write_error(error: ApiError) -> str:
        return _lines([writer.error(error.message, error.code, error.param)])

    return write_error


def _keep(store: ResponseStore, job: Job, body: ResponseRequest) -> None:
    if body.store is not False:
        store.add(job.writer.response, job.items, body.previous_response_id)
