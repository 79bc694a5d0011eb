"""POST /v1/chat/completions: OpenAI's fields, and vLLM's and MindIE's beside them."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response

from executor.serve.answers import gather
from executor.serve.asks import Ask, ChatPrompt, Done, Failure
from executor.serve.errors import of_failure
from executor.serve.feed import Feed
from executor.serve.openai.sampling import SamplingFields, Whole, params_of
from executor.serve.parser import AnswerParser
from executor.serve.service import Service
from executor.serve.streams import DONE, EventStream, answered, event

router = APIRouter()


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatRequest(SamplingFields):
    messages: list[Any]
    max_completion_tokens: Whole | None = None
    stream_options: StreamOptions | None = None


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(body.model)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = params_of(service, body, more={"max_new_tokens": asked})
    ask = Ask(
        f"chatcmpl-{uuid.uuid4().hex}", ChatPrompt(body.messages), params, service.recipe.server.request_timeout_s,
        fits_exactly=asked is not None,
    )  # fmt: skip
    feed = service.ask(ask)
    frame = {"id": ask.id, "created": int(time.time()), "model": service.model_name}
    if body.stream:
        return await EventStream.start(request, feed, chunks(feed, frame, body))
    answers = await answered(request, feed, gather(feed, params.n))
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        for index, answer in enumerate(answers.answers)
    ]
    usage = usage_of(answers.num_prompt_tokens, answers.num_output_tokens, answers.num_cached_tokens)
    return JSONResponse({**frame, "object": "chat.completion", "choices": choices, "usage": usage})


def usage_of(num_prompt: int, num_output: int, num_cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


async def chunks(feed: Feed, frame: dict[str, Any], body: ChatRequest) -> AsyncIterator[str]:
    """Events of a streamed answer: role with the first token, finish_reason with the last."""
    frame = {**frame, "object": "chat.completion.chunk"}
    n = body.n or 1
    parsers, begun, num_output, last = [AnswerParser() for _ in range(n)], [False] * n, 0, None
    async for item in feed:
        if isinstance(item, Failure):
            raise of_failure(item)
        if isinstance(item, Done):
            break
        last, num_output = item, num_output + len(item.token_ids)
        pieces = parsers[item.index].push(item.text)
        if item.finish_reason:
            pieces += parsers[item.index].finish()
        if not pieces and not item.finish_reason:
            continue
        delta: dict[str, Any] = {} if begun[item.index] else {"role": "assistant"}
        begun[item.index] = True
        delta["content"] = "".join(piece.text for piece in pieces)
        choice = {"index": item.index, "delta": delta, "logprobs": None, "finish_reason": item.finish_reason}
        yield event({**frame, "choices": [choice]})
    if body.stream_options and body.stream_options.include_usage and last:
        usage = usage_of(last.num_prompt_tokens, num_output, last.num_cached_tokens)
        yield event({**frame, "choices": [], "usage": usage})
    yield DONE
