"""A backend that answers what a test wrote, piece by piece: an answer can be held, looked at and stopped."""

import asyncio
from collections.abc import Sequence

from executor.serve.asks import Ask, Delta, Done, Failure
from executor.serve.feed import Feed


class ScriptedBackend:
    """Gives the `pieces` of a text as deltas of one token each; `hold` stops before a piece until the request ends.

    `failure`: what the request ends with after its pieces, in place of its Done.
    """

    fault = None
    num_unfinished = 0

    def __init__(
        self, pieces: Sequence[str], *, hold: int | None = None, failure: str | None = None, finish: str = "stop"
    ) -> None:
        self.pieces, self.hold, self.failure, self.finish = pieces, hold, failure, finish
        self.asks: list[Ask] = []
        self.num_aborted = 0
        self._tasks: list[asyncio.Task] = []

    def ask(self, ask: Ask) -> Feed:
        self.asks.append(ask)
        feed = Feed()
        task = asyncio.ensure_future(self._answer(feed))
        self._tasks.append(task)

        def abort() -> None:
            self.num_aborted += not task.done()
            task.cancel()

        feed.abort = abort
        return feed

    async def _answer(self, feed: Feed) -> None:
        for number, piece in enumerate(self.pieces):
            if number == self.hold:
                await asyncio.Event().wait()  # until it is aborted
            is_last = number == len(self.pieces) - 1 and not self.failure
            feed.push(Delta(0, piece, (1,), 7, finish_reason=self.finish if is_last else None))
            await asyncio.sleep(0)
        if self.failure:
            feed.push(Failure("fault", self.failure))
        else:
            feed.push(Done(7, 0, 0, len(self.pieces), 0.0, 0.0, 0.0, 0.0, (self.finish,)))
