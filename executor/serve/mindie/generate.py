"""POST /generate: MindIE's form of vLLM's simple endpoint.

`prompt` is a text, answered as it stands without a template, or a list of parts (text, image_url, video_url), which
become a user's message. As in MindIE (its vLLM interface, read in MindIE-LLM's endpoint sources), a whole reply's texts
begin with the prompt's text and a space; a stream gives the answers alone, in JSON objects that each end with a zero
byte, every object with one text for each of the `n` answers.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from executor.serve.answers import gather
from executor.serve.asks import Ask, ChatPrompt, Done, Failure, TextPrompt
from executor.serve.bodies import JsonRoute
from executor.serve.errors import ApiError, of_answer, of_failure
from executor.serve.feed import Feed
from executor.serve.jsontext import dumps
from executor.serve.openai.chat import answer_id
from executor.serve.openai.sampling import FormFields, Text, Whole, form_fields, params_of
from executor.serve.service import Service
from executor.serve.streams import EventStream, answered
from executor.serve.structured import grammar_of

router = APIRouter(route_class=JsonRoute)

NO_MODEL = "None"  # MindIE's word for a request that names no adapter
END = "\0"


class GenerateRequest(FormFields):
    prompt: Text | dict[str, Any] | list[Text | dict[str, Any]]
    best_of: Whole | None = None


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(None if body.model == NO_MODEL else body.model)
    if body.best_of not in (None, 1, body.n or 1):
        raise ApiError(
            400, f"best_of is {body.best_of}; allowed: n ({body.n or 1}), all answers are given", param="best_of"
        )
    params = params_of(service, body, more={"grammar": grammar_of(form_fields(body))})
    if not body.prompt:
        raise ApiError(400, "prompt is empty; give a text or a list of parts", param="prompt")
    prompt = TextPrompt(body.prompt)
    if not isinstance(body.prompt, str):
        prompt = ChatPrompt([{"role": "user", "content": body.prompt}])
    ask = Ask(
        answer_id(request, "generate-"), prompt, params, service.recipe.server.request_timeout_s,
        fits_exactly=body.max_tokens is not None, prompt_field="prompt",
    )  # fmt: skip
    feed = service.ask(ask)
    if body.stream:
        return await EventStream.start(request, feed, objects(feed, params.n), write_error=_error)
    answers = await answered(request, feed, gather(feed, params.n))
    question = _question(body.prompt)
    return JSONResponse({"text": [f"{question} {answer.text}" for answer in answers.answers]})


def _question(prompt: str | Mapping[str, Any] | list[str | Mapping[str, Any]]) -> str:
    """The prompt's text: of a list the first part that has one."""
    for part in prompt if isinstance(prompt, list) else [prompt]:
        if isinstance(part, str):
            return part
        if isinstance(part.get("text"), str):
            return part["text"]
    return ""


async def objects(feed: Feed, n: int) -> AsyncIterator[str]:
    """The stream's JSON objects; at least one, so that an empty answer is one too."""
    is_begun = False
    async for item in feed:
        if isinstance(item, Failure):
            raise of_failure(item)
        if isinstance(item, Done):
            break
        if item.error is not None:
            raise of_answer(item)
        if item.text:
            is_begun = True
            yield _object([item.text if index == item.index else "" for index in range(n)])
    if not is_begun:
        yield _object([""] * n)


def _object(texts: list[str]) -> str:
    return dumps({"text": texts}) + END


def _error(error: ApiError) -> str:
    return dumps(error.body) + END
