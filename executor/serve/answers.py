"""A request's events gathered into whole answers, for replies that are not streamed."""

from dataclasses import dataclass, field

from executor.serve.asks import Delta, Done, Event, Failure, TokenInfo
from executor.serve.errors import of_answer, of_failure
from executor.serve.feed import Feed, Joined


@dataclass
class Answer:
    """One of a request's `n` answers."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenInfo] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class Answers:
    """All of them, and what they cost."""

    answers: list[Answer]
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenInfo | None, ...] | None = None
    done: Done | None = None

    @property
    def num_output_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    def take(self, event: Event) -> None:
        """Raises ApiError for a request or an answer that failed."""
        if isinstance(event, Failure):
            raise of_failure(event)
        if isinstance(event, Done):
            self.done = event
        else:
            self.add(event)

    def add(self, delta: Delta) -> None:
        """Raises ApiError for an answer that failed."""
        if delta.error is not None:
            raise of_answer(delta)
        answer = self.answers[delta.index]
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        answer.logprobs += delta.logprobs
        answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
        self.num_prompt_tokens, self.num_cached_tokens = delta.num_prompt_tokens, delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs


async def gather(feed: Feed, n: int) -> Answers:
    """Raises ApiError for a request that is not answered."""
    answers = Answers([Answer() for _ in range(n)])
    async for event in feed:
        answers.take(event)
    return answers


async def gather_all(feeds: Joined, n: int, num_requests: int) -> list[Answers]:
    """Of several requests, in their order. Raises ApiError for the first that is not answered."""
    answers = [Answers([Answer() for _ in range(n)]) for _ in range(num_requests)]
    async for index, event in feeds:
        answers[index].take(event)
    return answers
