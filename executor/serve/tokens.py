"""POST /tokenize and /detokenize, as vLLM has them: the checkpoint's tokens of a text or of messages, and back."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, Strict

from executor.prompt.expand import encode_pieces
from executor.serve.asks import Ask, ChatPrompt
from executor.serve.backends import build_prompt
from executor.serve.bodies import JsonRoute
from executor.serve.errors import ApiError
from executor.serve.openai.sampling import Flag, Text, refuse_unserved
from executor.serve.service import Service

router = APIRouter(route_class=JsonRoute)

TokenId = Annotated[int, Strict(), Field(ge=0)]


class TokenizeRequest(BaseModel):
    """`prompt`, whose special tokens count as such, or `messages`, in which they are text."""

    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    prompt: Text | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: Flag | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    return_token_strs: Flag | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: Text | None = None
    tokens: list[TokenId]


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.check_model(body.model)
    refuse_unserved(body)
    token_ids = await asyncio.to_thread(_token_ids, service, body)
    strings = service.processor.tokenizer.convert_ids_to_tokens(token_ids) if body.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": service.max_model_len,
        "tokens": token_ids,
        "token_strs": strings,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.check_model(body.model)
    refuse_unserved(body)
    for token_id in body.tokens:
        if token_id >= service.vocab_size:
            raise ApiError(
                400, f"tokens holds {token_id}; allowed: token ids from 0 to {service.vocab_size - 1}", param="tokens"
            )
    return {"prompt": await asyncio.to_thread(service.processor.tokenizer.decode, body.tokens)}


def _token_ids(service: Service, body: TokenizeRequest) -> list[int]:
    """Of messages: with the tokens of their pictures and videos, as a chat is charged. Runs beside the event loop."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt, a text, or messages, a conversation", param="prompt")
    if body.prompt is not None:
        return raw_token_ids(service.processor, body.prompt)
    prompt = ChatPrompt(
        body.messages,
        tools=body.tools or (),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs or {},
        media_options=body.mm_processor_kwargs or {},
    )
    return list(build_prompt(service.processor, Ask("tokenize", prompt, None)).token_ids)


def raw_token_ids(processor: Any, text: str) -> list[int]:
    """What the checkpoint's tokenizer makes of `text`.

    Qwen's tokenizers write nothing around a text, whatever add_special_tokens says. Special tokens are taken out here
    and not by the tokenizer: that is a setting of it, and other threads use it meanwhile with the other value.
    """
    return encode_pieces(processor.tokenizer, processor.chat.special.split(text))[0]
