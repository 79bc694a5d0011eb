"""A backend that answers when a test says so."""

from executor.schedule.request import SamplingParams
from executor.serve.asks import Ask, ChatPrompt, Delta, Done, EngineStats, Event, Failure
from executor.serve.feed import Feed

DONE = Done(3, 0, 0, 1, 0.0, 0.1, 0.0, 0.2, ("stop",))


class FakeBackend:
    """Keeps what it was asked; `answer` and `lose` end it."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.fault: str | None = None
        self.asked: list[Ask] = []
        self.feeds: dict[str, Feed] = {}
        self.aborted: list[str] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.feeds)

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.feeds), num_blocks=10)

    def ask(self, ask: Ask) -> Feed:
        if self.fault:
            raise RuntimeError(self.fault)
        self.asked.append(ask)
        self.feeds[ask.id] = Feed(lambda: self.aborted.append(ask.id))
        return self.feeds[ask.id]

    def say(self, request_id: str, text: str) -> None:
        self.feeds[request_id].push(Delta(0, text, (1,), 3))

    def end(self, request_id: str, event: Event = DONE) -> None:
        self.feeds.pop(request_id).push(event)

    def lose(self) -> None:
        self.fault = f"{self.name} is lost"
        for request_id in list(self.feeds):
            self.end(request_id, Failure("lost", self.fault))


def ask_of(request_id: str, *texts: str, picture: str = "", **params: object) -> Ask:
    """A conversation: the user's and the assistant's texts by turns."""
    messages = []
    for number, text in enumerate(texts or ("hello",)):
        content: object = text
        if picture and not number:
            content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return Ask(request_id, ChatPrompt(messages, []), SamplingParams(**params))


def taken(feed: Feed) -> list[Event]:
    """What has come so far."""
    events: list[Event] = []
    feed.divert(events.append)
    return events
