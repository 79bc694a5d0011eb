"""POST /v1/completions: prompts without a template, as texts or as token ids, and the older form of logprobs.

Special tokens in a text count as such. A request may hold several prompts: choice `p * n + i` is answer i of prompt p.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, Strict
from starlette.responses import JSONResponse, Response

from executor.schedule.request import SamplingParams
from executor.serve.answers import Answers, gather_all
from executor.serve.asks import Ask, Delta, Done, Failure, TextPrompt, TokenInfo, TokenPrompt
from executor.serve.backends import build_prompt
from executor.serve.bodies import JsonRoute
from executor.serve.errors import ApiError, of_answer, of_failure
from executor.serve.feed import Joined
from executor.serve.openai.chat import StreamOptions, answer_id
from executor.serve.openai.chat_reply import usage_of
from executor.serve.openai.logprobs import bytes_by, prompt_logprobs
from executor.serve.openai.sampling import Flag, FormFields, Text, Whole, form_fields, params_of
from executor.serve.openai.text_logprobs import TextLogprobs
from executor.serve.service import Service
from executor.serve.streams import DONE, EventStream, answered, event
from executor.serve.structured import grammar_of

router = APIRouter(route_class=JsonRoute)

MAX_TOKENS = 16  # where a request says nothing: the protocol's own default

TokenId = Annotated[int, Strict(), Field(ge=0)]


class CompletionRequest(FormFields):
    prompt: Text | list[TokenId] | list[Text] | list[list[TokenId]]
    echo: Flag | None = None
    logprobs: Whole | None = None
    best_of: Whole | None = None
    suffix: Text | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True)
class Job:
    """What a request came to: its prompts, each with its text and first token where they are given back."""

    body: CompletionRequest
    params: SamplingParams
    prompts: list[TextPrompt | TokenPrompt]
    echoes: list[str]  # what stands before each prompt's answers
    first_token_ids: list[int | None]  # of each prompt, where its logprobs are given back
    frame: dict[str, Any]
    is_prompt_only: bool  # echo without an answer

    def choice(self, number: int, text: str, logprobs: Any, end: Delta | Any) -> dict[str, Any]:
        return {
            "index": number,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": end.finish_reason,
            "stop_reason": end.stop_reason,
        }


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(body.model)
    job = await _job_of(service, body, answer_id(request, "cmpl-"))
    asks = [
        Ask(
            f"{job.frame['id']}-{index}", prompt, job.params, service.recipe.server.request_timeout_s,
            fits_exactly=body.max_tokens is not None, prompt_field="prompt",
        )
        for index, prompt in enumerate(job.prompts)
    ]  # fmt: skip
    feeds = service.ask_all(asks)
    if body.stream:
        return await EventStream.start(request, feeds, chunks(service, feeds, job))
    answers = await answered(request, feeds, gather_all(feeds, job.params.n, len(asks)))
    choices = [choice for index, each in enumerate(answers) for choice in _choices(service, job, index, each)]
    usage = Usage()
    for each in answers:
        usage.num_prompt += each.num_prompt_tokens
        usage.num_cached += each.num_cached_tokens
        usage.num_output += 0 if job.is_prompt_only else each.num_output_tokens
    return JSONResponse({**job.frame, "choices": choices, "usage": usage.tree})


async def _job_of(service: Service, body: CompletionRequest, name: str) -> Job:
    """Raises ApiError 400."""
    if body.suffix:
        raise ApiError(400, "suffix is not supported: these models write on and fill no gaps", param="suffix")
    if body.best_of not in (None, 1, body.n or 1):
        raise ApiError(
            400, f"best_of is {body.best_of}; allowed: n ({body.n or 1}), all answers are given", param="best_of"
        )
    prompts = _prompts_of(body.prompt)
    if not prompts or not all(isinstance(prompt, TextPrompt) or prompt.token_ids for prompt in prompts):
        raise ApiError(400, "prompt is empty; give a text or token ids", param="prompt")
    most = service.recipe.server.max_queued_requests
    if len(prompts) > most:
        raise ApiError(400, f"{len(prompts)} prompts in one request; at most {most} are taken", param="prompt")
    is_prompt_only = bool(body.echo) and body.max_tokens == 0
    more: dict[str, Any] = {"logprobs": body.logprobs, "grammar": grammar_of(form_fields(body))}
    if body.max_tokens is None:
        more["max_new_tokens"] = service.recipe.generation.max_new_tokens or MAX_TOKENS
    if is_prompt_only:
        more["max_new_tokens"] = 1  # the engine answers with one token at least: it is left out
    if body.echo and body.logprobs is not None:
        more["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(
            400, "prompt_logprobs cannot be streamed; ask with stream false, or without it", param="prompt_logprobs"
        )
    params = params_of(service, body, more=more, names={"logprobs": "logprobs"})
    echoes, first = [""] * len(prompts), [None] * len(prompts)
    if body.echo:
        echoes, first = await asyncio.to_thread(_echoes, service.processor, prompts)
    frame = {
        "id": name, "object": "text_completion", "created": int(time.time()),
        "model": service.model_name,
    }  # fmt: skip
    return Job(body, params, prompts, echoes, first, frame, is_prompt_only)


def _prompts_of(prompt: str | list[Any]) -> list[TextPrompt | TokenPrompt]:
    if isinstance(prompt, str):
        return [TextPrompt(prompt)]
    if prompt and isinstance(prompt[0], int):
        return [TokenPrompt(prompt)]
    return [TextPrompt(each) if isinstance(each, str) else TokenPrompt(each) for each in prompt]


def _echoes(processor: Any, prompts: list[TextPrompt | TokenPrompt]) -> tuple[list[str], list[int]]:
    """Each prompt's text and first token. Raises UserError."""
    built = [build_prompt(processor, Ask("echo", prompt, None)) for prompt in prompts]
    return [prompt.text for prompt in built], [prompt.token_ids[0] for prompt in built]


def _choices(service: Service, job: Job, index: int, answers: Answers) -> list[dict[str, Any]]:
    """Of one prompt, not streamed."""
    choices = []
    bytes_of = bytes_by(service.processor.tokenizer)
    for number, answer in enumerate(answers.answers):
        logprobs = None
        if job.body.logprobs is not None:
            writer = TextLogprobs(bytes_of, job.body.logprobs)
            logprobs = writer.of(_logprobs(job, index, answers.prompt_logprobs, tuple(answer.logprobs)))
        text = job.echoes[index] + ("" if job.is_prompt_only else answer.text)
        choice = job.choice(index * job.params.n + number, text, logprobs, answer)
        if job.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(answers.prompt_logprobs, bytes_of)
        choices.append(choice)
    return choices


def _logprobs(
    job: Job, index: int, of_prompt: tuple[TokenInfo | None, ...] | None, of_answer: tuple[TokenInfo, ...]
) -> list[TokenInfo | int]:
    """The prompt's where it is given back, then the answer's; the prompt's first token has an id and no logprob."""
    infos: list[TokenInfo | int] = [] if job.is_prompt_only else list(of_answer)
    if of_prompt and job.body.echo:
        infos[:0] = [job.first_token_ids[index] if info is None else info for info in of_prompt]
    return infos


@dataclass
class Usage:
    """Tokens so far, of all prompts."""

    num_prompt: int = 0
    num_output: int = 0
    num_cached: int = 0
    counted: set[int] = field(default_factory=set)  # prompts

    def take(self, index: int, delta: Delta, job: Job) -> None:
        if index not in self.counted:
            self.counted.add(index)
            self.num_prompt += delta.num_prompt_tokens
            self.num_cached += delta.num_cached_tokens
        self.num_output += 0 if job.is_prompt_only else len(delta.token_ids)

    @property
    def tree(self) -> dict[str, Any]:
        return usage_of(self.num_prompt, self.num_output, self.num_cached)


async def chunks(service: Service, feeds: Joined, job: Job) -> AsyncIterator[str]:
    """Events of streamed answers: an echoed prompt with the first token, finish_reason with the last."""
    options = job.body.stream_options or StreamOptions()
    usage = Usage()
    writers: dict[int, TextLogprobs] = {}  # of the choices that have begun
    held: dict[int, list[TokenInfo | int]] = {}  # logprobs of tokens whose text is not certain yet
    async for index, item in feeds:
        if isinstance(item, Failure):
            raise of_failure(item)
        if isinstance(item, Done):
            continue
        if item.error is not None:
            raise of_answer(item)
        usage.take(index, item, job)
        number = index * job.params.n + item.index
        infos = held.setdefault(number, [])
        text = "" if job.is_prompt_only else item.text
        if number not in writers:
            writers[number] = TextLogprobs(bytes_by(service.processor.tokenizer), job.body.logprobs or 0)
            text = job.echoes[index] + text
            infos += _logprobs(job, index, item.prompt_logprobs, item.logprobs)
        elif not job.is_prompt_only:
            infos += item.logprobs
        if not text and not item.finish_reason:
            continue
        logprobs = writers[number].of(infos) if job.body.logprobs is not None else None
        held[number] = []
        choice = job.choice(number, text, logprobs, item)
        more = {"usage": usage.tree} if options.continuous_usage_stats else {}
        yield event({**job.frame, "choices": [choice], **more})
    if options.include_usage or options.continuous_usage_stats:
        yield event({**job.frame, "choices": [], "usage": usage.tree})
    yield DONE
