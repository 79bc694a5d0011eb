"""Token ids of one answer to text, piece by piece, up to the first stop string.

Invariants: the deltas joined are what decoding all tokens at once gives, cut before the first stop string (behind it
with `include_stop_str_in_output`); no delta ends inside a character, and none holds a beginning of a stop string that
the next token may complete. A stop string counts that is complete behind the first `min_new_tokens` tokens (as in
vLLM). Each token is looked at once. Only byte-level tokenizers are known (all of Qwen's are): a token is bytes,
whatever stands beside it.
"""

import codecs
from collections.abc import Iterable
from typing import Any

from tokenizers import decoders

from executor.errors import UserError
from executor.schedule.request import SamplingParams


class Detokenizer:
    """The text of one request's answer.

    `stopped` says that a stop string was found, `stop_string` which one; tokens after it are not taken.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams, *, known_bytes: dict[int, bytes] | None = None):
        """tokenizer: a fast tokenizer of transformers; UserError when it is not byte-level. `known_bytes`: of tokens
        that were seen, for all detokenizers of one tokenizer."""
        decoder = tokenizer.backend_tokenizer.decoder
        if not isinstance(decoder, decoders.ByteLevel):
            raise UserError(
                f"tokenizer.json has the decoder {type(decoder).__name__}; only ByteLevel is supported, "
                "which the tokenizers of Qwen2.5-VL and Qwen3-VL have"
            )
        self.stop_string: str | None = None
        self._tokenizer = tokenizer
        self._known_bytes = {} if known_bytes is None else known_bytes
        self._stops = params.stop
        self._keeps_stop = params.include_stop_str_in_output
        self._num_exempt_tokens = params.min_new_tokens if self._stops else 0
        self._exempt = 0  # characters of what is held that belong to these: no stop string ends among them
        self._skipped: frozenset[int] = frozenset()
        if params.skip_special_tokens:
            added = tokenizer.added_tokens_decoder
            self._skipped = frozenset(token_id for token_id, token in added.items() if token.special)
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # complete characters that may be the beginning of a stop string
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        return self.stop_string is not None

    @property
    def text(self) -> str:
        """All deltas so far."""
        return "".join(self._pieces)

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that is now certain."""
        if not self._num_exempt_tokens:
            return self._advance(b"".join(map(self._bytes_of, token_ids)), final=False)
        return "".join(self._push_one(token_id) for token_id in token_ids)

    def finish(self) -> str:
        """The answer is over: returns the text that was held back. An incomplete character becomes U+FFFD."""
        return self._advance(b"", final=True)

    def _push_one(self, token_id: int) -> str:
        is_exempt = self._num_exempt_tokens > 0
        self._num_exempt_tokens -= is_exempt
        return self._advance(self._bytes_of(token_id), final=False, is_exempt=is_exempt)

    def _advance(self, data: bytes, final: bool, is_exempt: bool = False) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            delta = self._characters.decode(data, final)
            self._pieces.append(delta)
            return delta
        pending = self._held + self._characters.decode(data, final)
        if is_exempt:
            self._exempt = len(pending)
        end = self._find_stop(pending)
        if end is None:
            end = len(pending) if final else len(pending) - self._overlap(pending)
        delta, self._held = pending[:end], "" if self.stopped else pending[end:]
        self._exempt = max(0, self._exempt - end)
        self._pieces.append(delta)
        return delta

    def _find_stop(self, text: str) -> int | None:
        """Where the text ends when it holds a stop string: before, or behind, the one that is complete first.

        Not the one that begins first: that could change with the number of characters a token brings.
        """
        found = []
        for stop in self._stops:
            start = text.find(stop, max(0, self._exempt - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        end, start, self.stop_string = min(found)
        return end if self._keeps_stop else start

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stops), default=0)
        for length in range(min(len(text), longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            return b""
        known = self._known_bytes.get(token_id)
        if known is None:
            known = self._known_bytes[token_id] = token_bytes(self._tokenizer, token_id)
        return known


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """What a token of a byte-level tokenizer stands for; nothing for an id beyond its vocabulary."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return b"" if token is None else word_bytes(token)  # logits are often wider than the vocabulary


def word_bytes(token: str) -> bytes:
    """What a token stands for, as the vocabulary writes it."""
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()  # an added token, kept as plain text


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest for 256, 257, ... in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
