"""Requests of a file to the server's own application, in this process and without a socket.

Knows the application, how to ask it, and OpenAI's form of a batch's answers. Refuses to know files:
what is asked comes in, what is answered goes out.
"""

import asyncio
import concurrent.futures
import dataclasses
import itertools
import json
import secrets
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from fastapi import FastAPI

from gptoss_jax.batching.requests import BatchingEngine
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings

DAYS = 7 * 86_400.0  # nobody waits in front of a request of a batch
AGAIN = 2  # how often a request is asked again that failed by no fault of its own
WAIT = 0.2  # seconds until a request is sent again that found the queue full


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request: what its answer is called, and what the endpoint gets."""

    custom_id: str
    url: str
    body: bytes


def settings_of(date: str, allow_control_tokens: bool = False) -> ServerSettings:
    """The server's settings for a batch: a fixed date, no hurry."""
    return ServerSettings(
        date=date, request_seconds=DAYS, allow_control_tokens=allow_control_tokens, max_stored=1
    )


def start_engine(model: Model, slots: int) -> BatchingEngine:
    """An engine with every program compiled, whose queue is never full."""
    from gptoss_jax.batching import Engine, EngineSettings
    from gptoss_jax.chat.render import harmony

    engine = Engine(model, EngineSettings(slots=slots, max_queue=2**20))
    engine.warm_up()
    harmony()
    return engine


class Requests:
    """An application at work in a thread of its own; `close` it.

    Args:
      engine: Makes the tokens; is not closed.
      settings: The server's.
      at_once: Requests that are asked side by side, however many threads ask.
    """

    def __init__(self, engine: BatchingEngine, settings: ServerSettings, at_once: int):
        self.at_once = at_once
        self._app = create_app(engine, settings)
        self._loop = asyncio.new_event_loop()
        self._free = asyncio.Semaphore(at_once)
        self._ready: Future[None] = Future()
        self._over: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="gptoss-batch", daemon=True)
        self._thread.start()
        self._ready.result()

    def answers(self, asked: Iterable[Asked]) -> Iterator[list[dict[str, Any]]]:
        """The answers in OpenAI's form, as they come, several at a time. What is still being asked
        when the iterator is closed is cancelled.
        """
        waiting = iter(asked)
        running: set[Future[dict[str, Any]]] = set()
        try:
            while True:
                for one in itertools.islice(waiting, self.at_once - len(running)):
                    running.add(asyncio.run_coroutine_threadsafe(self._answer(one), self._loop))
                if not running:
                    return
                first = concurrent.futures.FIRST_COMPLETED
                done, running = concurrent.futures.wait(running, return_when=first)
                yield [future.result() for future in done]
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """Cancels what is being asked, and ends the application."""
        over = self._over
        if over is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(over.set)
            self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._live())

    async def _live(self) -> None:
        try:
            self._over = asyncio.Event()
            async with self._app.router.lifespan_context(self._app):
                self._ready.set_result(None)
                await self._over.wait()
                mine = asyncio.current_task()
                left = [task for task in asyncio.all_tasks() if task is not mine]
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)
        except Exception as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _answer(self, asked: Asked) -> dict[str, Any]:
        async with self._free:
            failures = 0
            while True:
                status, id, data = await _call(self._app, asked.url, asked.body)
                if status == 503:
                    raise GptOssError("the engine takes no more requests: run the command again")
                failures += status == 500
                if status == 429:
                    await asyncio.sleep(WAIT)
                elif status != 500 or failures > AGAIN:
                    break
        return {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": asked.custom_id,
            "response": {"status_code": status, "request_id": id, "body": json.loads(data)},
            "error": None,
        }


async def _call(app: FastAPI, path: str, body: bytes) -> tuple[int, str, bytes]:
    """Posts a body to the application: status, request id, the answer's body."""
    sent: list[dict[str, Any]] = []
    read = False

    async def receive() -> dict[str, Any]:
        nonlocal read
        if read:  # the client stays until it has its answer
            await asyncio.Event().wait()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    headers = dict(sent[0]["headers"])
    data = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], headers[b"x-request-id"].decode(), data


def tokens_of(row: dict[str, Any]) -> dict[str, int]:
    """Tokens of the prompt and of the completion that an answer has cost."""
    usage = row["response"]["body"].get("usage") or {}
    return {
        "prompt_tokens": usage.get("prompt_tokens", usage.get("input_tokens", 0)),
        "completion_tokens": usage.get("completion_tokens", usage.get("output_tokens", 0)),
    }


def failed(row: dict[str, Any]) -> bool:
    """Does an answer belong into the file of errors?"""
    return row["error"] is not None or row["response"]["status_code"] >= 400
