"""The responses of a server: begun, made, stored, continued, cancelled.

Knows when what is stored. A response is acknowledged (its answer, or the last event of its stream,
is sent) only after it is stored; a background one is stored before its id is told, and failed if
the server finds it unfinished at its start. Foreground responses that fail, or whose client goes,
are not stored. Refuses to know routes.
"""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request

from gptoss_jax.batching.requests import Closing
from gptoss_jax.server.conversation import ContextTooLong, Finished, Running, Turn
from gptoss_jax.server.errors import ApiError, bad, of_exception
from gptoss_jax.server.json_response import JSONResponse, event
from gptoss_jax.server.responses_background import Background
from gptoss_jax.server.responses_events import OVER, Writer, failure
from gptoss_jax.server.responses_items import new_id, read_input, resolve, to_messages
from gptoss_jax.server.responses_models import CreateResponse
from gptoss_jax.server.responses_turn import check_together, response_of, turn_of
from gptoss_jax.server.service import Service, report
from gptoss_jax.server.store import RUNNING, NotStored, Store, Stored

Json = dict[str, Any]
INTERRUPTED = "the server ended before the response was complete: ask again"
UNSTORED = "the response could not be stored: ask again"


class Responses:
    """The responses of one server: those in the store, and those that are being made."""

    def __init__(self, service: Service):
        self.service = service
        self.background: dict[str, Background] = {}
        self.closing = False
        self.store = self._open()

    def _open(self) -> Store:
        """The store, in which nothing runs any more."""
        settings = self.service.settings
        store = Store(
            settings.store,
            max_responses=settings.max_stored,
            max_bytes=settings.max_stored_bytes,
            max_age=settings.stored_seconds,
        )
        for stored in store.running():
            failed = {"status": "failed", "error": failure(INTERRUPTED)}
            store.put(dataclasses.replace(stored, response={**stored.response, **failed}))
        return store

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Ends what runs in the background, and the store, after the application; one that starts
        again opens it again."""
        if self.closing:
            self.store, self.closing = self._open(), False
        try:
            yield
        finally:
            self.closing = True
            for made in list(self.background.values()):
                await made.cancel()
            self.store.close()

    async def create(self, request: Request, body: CreateResponse) -> Any:
        """The answer of POST /v1/responses."""
        service, id, now = self.service, new_id("resp"), time.time()
        turn, items = await self.turn(request, body)
        try:
            running = await service.begin(turn, request)
        except ContextTooLong as error:
            raise bad(str(error), "input", "context_length_exceeded") from None
        response = response_of(body, turn, id, turn.adapter or service.engine.name, now)
        sealed = "reasoning.encrypted_content" in (body.include or ())
        writer = Writer(response, service.engine.tokenizer, sealed)
        obfuscate = body.stream_options is not None and bool(
            body.stream_options.include_obfuscation
        )
        try:
            if body.background:
                made = await self._start(request, running, writer, items)
                if body.stream:
                    return service.stream(
                        request, event_lines(made.follow(), obfuscate), last=error_line
                    )
                return JSONResponse(response)
            events = self._foreground(request, running, writer, items)
            if body.stream:

                def last(error: ApiError) -> bytes:
                    return b"".join(
                        map(event_line, writer.end("failed", error=failure(error.message)))
                    )

                return service.stream(request, event_lines(events, obfuscate), last)
        except BaseException:
            running.close()
            raise
        async with contextlib.aclosing(events):
            async for _ in events:
                pass
        return JSONResponse(writer.response)

    async def turn(self, request: Request, body: CreateResponse) -> tuple[Turn, list[Json]]:
        """What a request asks for, and its own input items; ApiError if it cannot be."""
        check_together(body)
        adapter = self.service.adapter(body.model, request)
        items, history = await asyncio.to_thread(self._conversation, body)
        messages = to_messages([*history, *items], len(history))
        vocab_size = self.service.engine.tokenizer.vocab_size
        return turn_of(body, messages, self.service.settings, vocab_size, adapter), items

    def _conversation(self, body: CreateResponse) -> tuple[list[Json], list[Json]]:
        """The request's own items, and those of the responses that it continues."""
        history: list[Json] = []
        if body.previous_response_id is not None:
            try:
                chain = self.store.chain(body.previous_response_id)
            except NotStored as error:
                raise bad(
                    str(error), "previous_response_id", "previous_response_not_found"
                ) from None
            if chain[-1].response["status"] in RUNNING:
                raise bad(
                    f"response {body.previous_response_id!r} is not complete yet: wait, or cancel "
                    "it",
                    "previous_response_id",
                )
            for stored in chain:
                history += [*stored.input, *stored.response["output"]]
        given = read_input(body.input)
        if not given and not history:
            raise bad("parameter 'input' is empty: write something", "input")
        most = self.service.settings.max_messages
        if len(history) + len(given) > most:
            raise bad(
                f"the conversation has {len(history) + len(given)} items: at most {most} are "
                "allowed",
                "input",
            )
        return resolve(given, [item["id"] for item in history], self.store.item), history

    async def _foreground(
        self, request: Request, running: Running, writer: Writer, items: Sequence[Json]
    ) -> AsyncGenerator[Json]:
        """The events of a response that somebody waits for; stored before the last one."""
        try:
            for made in writer.start():
                yield made
            async for _, given in running:
                events = writer.feed(given, time.time())
                if isinstance(given, Finished):
                    self.service.account(request, given.reason, given.usage.cached)
                    if writer.response["store"]:
                        await self._keep(Stored(writer.response, items), writer, events)
                for made in events:
                    yield made
        finally:
            running.close()

    async def _keep(self, stored: Stored, writer: Writer, last: Sequence[Json]) -> None:
        """Stores a response before its last events are told; if it cannot be, they never are."""
        try:
            await asyncio.to_thread(self.store.put, stored)
        except Exception:  # a full disk
            writer.retract(last)
            raise

    async def _start(
        self, request: Request, running: Running, writer: Writer, items: Sequence[Json]
    ) -> Background:
        """Begins a response in the background; it is stored when this returns."""
        made = Background(writer)
        made.publish(writer.start())
        await asyncio.to_thread(self.store.put, Stored(writer.response, items))
        self.background[writer.response["id"]] = made
        made.task = asyncio.create_task(self._make(request, running, made, items))
        await asyncio.sleep(0)  # a task that is cancelled before its first step would do nothing
        return made

    async def _make(
        self, request: Request, running: Running, made: Background, items: Sequence[Json]
    ) -> None:
        """Runs a background response to its end, whatever that is, and stores it."""
        writer, last = made.writer, []
        self.service.running += 1  # the server's end waits for it
        try:
            try:
                async for _, given in running:
                    last = writer.feed(given, time.time())
                    if isinstance(given, Finished):
                        self.service.account(request, given.reason, given.usage.cached)
                    else:
                        made.publish(last)
            except asyncio.CancelledError:
                closing = {"error": failure(INTERRUPTED)}
                last = writer.end("failed", **closing) if self.closing else writer.end("cancelled")
            except Exception as error:
                told = of_exception(error)
                if told.status_code == 500:
                    report(error, self.service.record(request))
                message = INTERRUPTED if isinstance(error, Closing) else told.message
                last = writer.end("failed", error=failure(message))
            made.ending = True
            if not made.dropped:
                stored = Stored(writer.response, items, [*made.events, *last])
                try:
                    await self._keep(stored, writer, last)
                except Exception as error:
                    report(error, self.service.record(request))
                    last = writer.end("failed", error=failure(UNSTORED))
                    return
            self.background.pop(writer.response["id"], None)
        finally:
            running.close()
            self.service.running -= 1
            made.publish(last, over=True)

    async def find(self, id: str) -> Stored:
        """The response as it is now; ApiError 404 if there is none."""
        made = self.background.get(id)  # before the store is asked: it may end meanwhile
        try:
            stored = await asyncio.to_thread(self.store.get, id)
        except NotStored:
            raise ApiError(
                404,
                f"there is no response {id[:100]!r}: it was not stored, or is gone",
                "response_id",
                "response_not_found",
            ) from None
        if made is None:
            return stored
        task = made.task
        if made.writer.response["status"] in OVER and task is not None and not task.done():
            # what is told must be stored
            await asyncio.wait([task])
            return await self.find(id)
        return dataclasses.replace(stored, response=made.writer.response)

    async def replay(self, id: str, after: int) -> AsyncGenerator[Json]:
        """The events of a background response after a sequence number, to the last."""
        made = self.background.get(id)
        if made is not None:
            return made.follow(after)
        stored = await self.find(id)
        response, events = stored.response, stored.events
        if events is None:
            if not response["background"]:
                raise bad("only responses made in the background can be streamed again", "stream")
            # interrupted by the server's end: what was streamed before is lost
            kind = f"response.{response['status']}"
            events = [{"type": kind, "sequence_number": after + 1, "response": response}]
        return _each([event for event in events if event["sequence_number"] > after])

    async def cancel(self, id: str) -> Json:
        """The response after it was cancelled, or as it had ended."""
        stored = await self.find(id)
        if not stored.response["background"]:
            raise bad(
                "only responses made in the background can be cancelled: close the connection of "
                "others",
                "response_id",
            )
        made = self.background.get(id)
        if made is not None:
            await made.cancel()
            return made.writer.response
        return (await self.find(id)).response

    async def delete(self, id: str) -> None:
        """Forgets a response; ApiError 404 if there is none."""
        await self.find(id)
        made = self.background.get(id)
        if made is not None:
            made.dropped = True
            await made.cancel()
            self.background.pop(id, None)
        await asyncio.to_thread(self.store.delete, id)


async def _each(events: Sequence[Json]) -> AsyncGenerator[Json]:
    for made in events:
        yield made


def event_line(given: Json) -> bytes:
    """An event of a response as a server-sent one."""
    return event(given, given["type"])


def error_line(error: ApiError) -> bytes:
    """How a stream ends that cannot go on and has no response to tell of it."""
    told = error.body()["error"]
    body = {"type": "error", "sequence_number": 0, "message": told["message"], "param": None}
    return event_line({**body, "code": told["code"]})


async def event_lines(events: AsyncGenerator[Json], obfuscate: bool) -> AsyncGenerator[bytes]:
    """Events as bytes; obfuscated deltas are filled up, so that their lengths tell less."""
    async with contextlib.aclosing(events):
        async for made in events:
            if obfuscate and made["type"].endswith(".delta"):
                missing = -len(made["delta"].encode("utf-8", "replace")) % 16
                made = {**made, "obfuscation": secrets.token_hex(8)[:missing]}
            yield event_line(made)
