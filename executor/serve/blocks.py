"""An answer as a row of blocks: thoughts, texts and calls, one after the other, while it is written.

Protocols that answer in items (/v1/responses, /v1/messages) write these; each has its own names for them.
Invariant: a block's parts joined are its text; one block is open at a time, and the last one ends with the answer.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from executor.serve.asks import Delta, Done, Failure, TokenInfo
from executor.serve.errors import of_answer, of_failure
from executor.serve.feed import Feed
from executor.serve.parser import AnswerParser, Piece


@dataclass
class Block:
    """What is said, thought, or the arguments of one call."""

    index: int  # its place in the answer
    kind: Literal["content", "reasoning", "tool_call"]
    text: str = ""
    call_index: int = 0
    call_id: str | None = None
    name: str | None = None
    logprobs: list[TokenInfo] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Change:
    """`begun`: the block is new. `more`: its text goes on with `text`. `ended`: it is whole."""

    kind: Literal["begun", "more", "ended"]
    block: Block
    text: str = ""
    logprobs: tuple[TokenInfo, ...] = ()


@dataclass
class BlockAnswer:
    """One answer, and what it cost."""

    parser: AnswerParser
    blocks: list[Block] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_reasoning_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    _held: list[TokenInfo] = field(default_factory=list)  # logprobs of tokens whose text is not certain yet

    def take(self, delta: Delta) -> list[Change]:
        """What a step adds. Raises ApiError for an answer that failed."""
        if delta.error is not None:
            raise of_answer(delta)
        self.num_prompt_tokens, self.num_cached_tokens = delta.num_prompt_tokens, delta.num_cached_tokens
        self.num_output_tokens += len(delta.token_ids)
        self._held += delta.logprobs
        pieces = self.parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            pieces += self.parser.finish()
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        changes = [change for piece in pieces for change in self._add(piece)]
        if self.blocks and self.blocks[-1].kind == "reasoning":
            self.num_reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            if not self.blocks:
                changes += self._begin(Piece("content", ""))
            changes.append(Change("ended", self.blocks[-1]))
        return changes

    def _add(self, piece: Piece) -> Iterator[Change]:
        last = self.blocks[-1] if self.blocks else None
        if last is None or (last.kind, last.call_index) != (piece.kind, piece.call_index):
            if last is not None:
                yield Change("ended", last)
            yield from self._begin(piece)
        block = self.blocks[-1]
        if piece.text:
            logprobs, self._held = tuple(self._held), []
            block.text += piece.text
            block.logprobs += logprobs
            yield Change("more", block, piece.text, logprobs)

    def _begin(self, piece: Piece) -> Sequence[Change]:
        call = {"call_index": piece.call_index, "call_id": piece.call_id, "name": piece.name}
        self.blocks.append(Block(len(self.blocks), piece.kind, **call))
        return [Change("begun", self.blocks[-1])]


async def changes(feed: Feed, answer: BlockAnswer) -> AsyncIterator[list[Change]]:
    """A request's steps as changes of its one answer, none of them empty. Raises ApiError where it is not answered."""
    async for item in feed:
        if isinstance(item, Failure):
            raise of_failure(item)
        if isinstance(item, Done):
            break
        step = answer.take(item)
        if step:
            yield step


async def drained(feed: Feed, answer: BlockAnswer) -> BlockAnswer:
    """The answer when it is whole."""
    async for _ in changes(feed, answer):
        pass
    return answer
