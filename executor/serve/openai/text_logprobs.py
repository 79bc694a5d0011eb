"""The logprobs of /v1/completions: parallel lists of tokens, their logprobs, the best candidates, and text offsets."""

import codecs
from collections.abc import Iterable
from typing import Any

from executor.serve.asks import TokenInfo
from executor.serve.openai.logprobs import LEAST, BytesOf, token_text


class TextLogprobs:
    """One choice's, written as its tokens come: offsets go on from call to call."""

    def __init__(self, bytes_of: BytesOf, num_top: int) -> None:
        """`num_top`: candidates of each place, besides the token itself."""
        self._bytes_of = bytes_of
        self._num_top = num_top
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters before the next token

    def of(self, infos: Iterable[TokenInfo | int]) -> dict[str, list[Any]]:
        """Of the next tokens. A prompt's first token is its id alone: nothing foretells it."""
        tree: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for info in infos:
            token_id = info if isinstance(info, int) else info.token_id
            data = self._bytes_of(token_id)
            tree["tokens"].append(token_text(data))
            tree["text_offset"].append(self._offset)
            self._offset += len(self._characters.decode(data))
            if isinstance(info, int):
                tree["token_logprobs"].append(None)
                tree["top_logprobs"].append(None)
            else:
                best = {
                    token_text(self._bytes_of(other)): max(logprob, LEAST)
                    for other, logprob in info.top[: self._num_top]
                }
                best.setdefault(tree["tokens"][-1], max(info.logprob, LEAST))
                tree["token_logprobs"].append(max(info.logprob, LEAST))
                tree["top_logprobs"].append(best)
        return tree
