"""Tokens with their logprobs as chats have them: OpenAI's list for an answer, vLLM's for a prompt."""

from collections.abc import Callable, Iterable
from typing import Any

from executor.engine.detokenize import token_bytes
from executor.serve.asks import TokenInfo

LEAST = -9999.0  # JSON has no infinity

BytesOf = Callable[[int], bytes]
"""Token id -> the bytes that it stands for."""


def bytes_by(tokenizer: Any) -> BytesOf:
    return lambda token_id: token_bytes(tokenizer, token_id)


def token_text(data: bytes) -> str:
    """A token's text. Bytes that are no whole characters are named, so that two tokens never look alike."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def answer_logprobs(infos: Iterable[TokenInfo], bytes_of: BytesOf) -> dict[str, Any]:
    """`logprobs` of a choice: each token with the best candidates in its place."""
    content = [
        {
            **_entry(info.token_id, info.logprob, bytes_of),
            "top_logprobs": [_entry(token_id, logprob, bytes_of) for token_id, logprob in info.top],
        }
        for info in infos
    ]
    return {"content": content, "refusal": None}


def _entry(token_id: int, logprob: float, bytes_of: BytesOf) -> dict[str, Any]:
    data = bytes_of(token_id)
    return {"token": token_text(data), "logprob": max(logprob, LEAST), "bytes": list(data)}


def prompt_logprobs(infos: Iterable[TokenInfo | None] | None, bytes_of: BytesOf) -> list[dict[str, Any] | None] | None:
    """`prompt_logprobs`: for each token of the prompt the best candidates and itself, by their ids; none for the first.

    `rank` counts from 1.
    """
    if infos is None:
        return None
    return [None if info is None else _candidates(info, bytes_of) for info in infos]


def _candidates(info: TokenInfo, bytes_of: BytesOf) -> dict[str, Any]:
    ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(info.top, 1)}
    ranked.setdefault(info.token_id, (info.logprob, info.rank))
    return {
        str(token_id): {"logprob": max(logprob, LEAST), "rank": rank, "decoded_token": token_text(bytes_of(token_id))}
        for token_id, (logprob, rank) in ranked.items()
    }
