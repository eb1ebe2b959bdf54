"""Answers that end when their client goes: server-sent events, and work that is worth nothing
without a reader.

Knows HTTP's sending and disconnecting. Refuses to know what is sent.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptoss_jax.server.errors import ApiError, of_exception
from gptoss_jax.server.json_response import event

T = TypeVar("T")
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class ClientGone(Exception):
    """The client has closed its connection."""


def failed(error: ApiError) -> bytes:
    """How Chat Completions ends a stream that cannot go on."""
    return event(error.body()) + event("[DONE]")


class EventStream(Response):
    """Server-sent events, each sent as it comes.

    Args:
      events: Bytes of whole events. It is closed when the client goes; what it raises becomes the
        last event.
      last: Bytes that tell of an error.
      silence: Seconds after which a comment is sent, so that proxies do not hang up.
      report: Called with what was raised.
      close: Called at the end, also if the events were never begun.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        last: Callable[[ApiError], bytes] = failed,
        silence: float = 15.0,
        report: Callable[[BaseException], None] | None = None,
        close: Callable[[], None] | None = None,
    ):
        self.status_code, self.background = 200, None
        self.events, self.last, self.silence = events, last, silence
        self.report, self.close = report or (lambda error: None), close or (lambda: None)
        self.body = b""
        self.init_headers(HEADERS)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(receive, send)
        finally:
            self.close()

    async def _answer(self, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            while not sending.done() and not gone.done():
                self._spoke = False
                await asyncio.wait(
                    (sending, gone), timeout=self.silence, return_when=asyncio.FIRST_COMPLETED
                )
                if not self._spoke and not sending.done() and not gone.done():
                    await _send(send, b": still working\n\n")
            if sending.done():
                sending.result()
            else:
                self.report(ClientGone())
        finally:
            await _end(sending, gone)
            close = getattr(self.events, "aclose", None)
            if close is not None:
                await close()

    async def _send(self, send: Send) -> None:
        try:
            async for chunk in self.events:
                await _send(send, chunk)
                self._spoke = True
        except OSError:
            raise ClientGone from None
        except Exception as error:
            self.report(error)
            await _send(send, self.last(of_exception(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; cancels it and raises ClientGone when the client goes before."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_until_gone(request.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        await _end(working, gone)


async def _send(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
