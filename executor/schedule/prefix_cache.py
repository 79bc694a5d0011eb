"""Names for what a full KV block holds, so that equal prefixes are computed once.

The digest of a block is a hash over the digest of the block before it and everything its keys and values are made of:
token ids, M-RoPE positions, and for every vision span in it the media's digest and which of its embeddings stand where.
Placeholder ids are equal for all pictures and positions depend on more than the ids (a video's frame rate), so ids
alone would share what must not be shared.

Knows nothing of blocks' places or holders: that is the pool's.
"""

import array
import bisect
import hashlib
import struct
from collections.abc import Collection
from typing import Protocol

import numpy as np

from executor.schedule.request import Prompt, Request, Span

_DIGEST_BYTES = 16
_INT_BYTES = 8


class BlockStore(Protocol):
    """What the scheduler asks of a cache behind the pool of blocks. No answer takes time."""

    def staged(self, prompt: Prompt) -> Collection[bytes]:
        """Digests of blocks that a plan may load for a prompt's requests, until `release`."""

    def release(self, prompt: Prompt) -> None:
        """What is staged for the prompt is in the pool, or not needed."""

    def drop(self, prompt: Prompt) -> None:
        """No request has this prompt any more: as `release`, of its media too."""

    def wants(self, digest: bytes) -> bool:
        """Whether a block of this name is worth keeping."""


class BlockDigests:
    """The digests of one request's full blocks, from its first token on, computed once each and only when asked for."""

    def __init__(self, request: Request, block_size: int) -> None:
        self.digests: list[bytes] = []
        self._request = request
        self._block_size = block_size
        self._span_ends = [span.start + span.num_tokens for span in request.prompt.spans]

    def extend(self, num_tokens: int) -> list[bytes]:
        """Digests of all full blocks among the first `num_tokens` tokens (and of those asked for before)."""
        size = self._block_size
        first, last = len(self.digests), num_tokens // size
        if last <= first:
            return self.digests
        tokens = array.array("q", self._request.token_ids(first * size, last * size)).tobytes()
        positions = _positions(self._request, first * size, last * size).tobytes()
        previous = self.digests[-1] if self.digests else b""
        for index in range(last - first):
            state = hashlib.blake2b(previous, digest_size=_DIGEST_BYTES)
            state.update(tokens[index * size * _INT_BYTES : (index + 1) * size * _INT_BYTES])
            state.update(positions[index * size * 3 * _INT_BYTES : (index + 1) * size * 3 * _INT_BYTES])
            self._add_media(state, (first + index) * size)
            previous = state.digest()
            self.digests.append(previous)
        return self.digests

    def _add_media(self, state: "hashlib._Hash", start: int) -> None:
        """Hash which embeddings of which media stand in the block that begins at token `start`."""
        prompt = self._request.prompt
        end = start + self._block_size
        index = bisect.bisect_right(self._span_ends, start)
        while index < len(prompt.spans) and prompt.spans[index].start < end:
            span: Span = prompt.spans[index]
            begin = max(span.start, start)
            num_tokens = min(self._span_ends[index], end) - begin
            digest = prompt.media[span.media_index].digest
            state.update(struct.pack("<4q", begin - start, num_tokens, span.offset + begin - span.start, len(digest)))
            state.update(digest)
            index += 1


def _positions(request: Request, start: int, end: int) -> np.ndarray:
    """M-RoPE positions of tokens [start, end) of prompt and output: int64 [tokens, 3], contiguous."""
    num_prompt = len(request.prompt.token_ids)
    output = np.arange(max(start, num_prompt), max(end, num_prompt), dtype=np.int64) + request.prompt.position_delta
    parts = (request.prompt.positions[:, start:end].T, np.repeat(output[:, None], 3, axis=1))
    return np.concatenate(parts).astype(np.int64, copy=False)
