"""Responses that are made while nobody waits: their events, for whoever comes to read them.

Knows one task and its readers. Refuses to know the store and HTTP.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from gptoss_jax.server.responses_events import Writer


class Background:
    """A response under way. `task` makes it; `events` are all so far."""

    def __init__(self, writer: Writer):
        self.writer = writer
        self.events: list[dict[str, Any]] = []
        self.over = False
        self.ending = False  # the outcome is settled, and being stored
        self.dropped = False  # deleted: nothing is stored any more
        self.task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def publish(self, events: Sequence[dict[str, Any]], over: bool = False) -> None:
        """Hands events to all readers; `over` says that they are the last."""
        self.events += events
        self.over = self.over or over
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def follow(self, after: int = -1) -> AsyncGenerator[dict[str, Any]]:
        """The events with a sequence_number above `after`, to the last, as they come."""
        place = 0
        while True:
            news = self._news
            while place < len(self.events):
                event = self.events[place]
                place += 1
                if event["sequence_number"] > after:
                    yield event
            if self.over:
                return
            await news.wait()

    async def cancel(self) -> None:
        """Ends it, unless it is ending already; returns when the outcome is stored."""
        if self.task is None:
            return
        if not self.ending:
            self.task.cancel()
        await asyncio.wait([self.task])
