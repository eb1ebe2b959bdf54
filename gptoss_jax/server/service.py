"""What the routes share: the engine, the settings, model names, and the account of each request.

Knows who asked for what and how long it took, never what was said.
"""

import dataclasses
import datetime
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence

from fastapi import Request

from gptoss_jax.batching.requests import BatchingEngine
from gptoss_jax.completions import Piece
from gptoss_jax.errors import GptOssError
from gptoss_jax.server.conversation import Running, Turn, begin
from gptoss_jax.server.errors import ApiError, of_exception
from gptoss_jax.server.metrics import Metrics
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.server.stream import ClientGone, EventStream, failed


@dataclasses.dataclass
class Record:
    """The account of one request, which --log prints."""

    route: str
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    started: float = dataclasses.field(default_factory=time.perf_counter)
    model: str = "-"
    status: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    first: float | None = None  # seconds to the first token
    last: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    finish: list[str] = dataclasses.field(default_factory=list)

    def line(self) -> str:
        """One line, without what was said."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        seconds = time.perf_counter() - self.started
        out = [now, self.id, self.route, self.model, str(self.status)]
        if self.prompt:
            out.append(f"prompt={self.prompt} cached={self.cached} completion={self.completion}")
        if self.first is not None:
            out.append(f"ttft={self.first:.3f}s")
            if self.completion > 1 and seconds > self.first:
                out.append(f"{(self.completion - 1) / (seconds - self.first):.1f}tok/s")
        if self.finish:
            out.append("finish=" + ",".join(sorted(set(self.finish))))
        return " ".join([*out, f"{seconds:.3f}s"])


class Service:
    """One server: what its routes need.

    Args:
      engine: Makes the tokens.
      settings: The owner's.

    Raises:
      GptOssError: An adapter has the model's name.
    """

    def __init__(self, engine: BatchingEngine, settings: ServerSettings | None = None):
        self.engine, self.settings = engine, settings or ServerSettings()
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        self.draining = False
        self.running = 0  # requests that are being answered
        self._turns = 0
        if engine.name in engine.adapters:
            raise GptOssError(
                f"an adapter is called {engine.name!r} like the model: give it another name"
            )

    @property
    def models(self) -> Sequence[str]:
        """Names that requests may give as `model`: the model's own, then its adapters'."""
        return [self.engine.name, *self.engine.adapters]

    def adapter(self, model: str | None, request: Request) -> str | None:
        """The adapter that a request's `model` means; None for the base, which is also the default.

        Raises ApiError 404 (model_not_found) for a name that is not in `models`.
        """
        name = self.check_model(self.engine.name if model is None else model)
        self.record(request).model = name
        return None if name == self.engine.name else name

    def check_model(self, model: str) -> str:
        """The name if it is in `models`; else ApiError 404."""
        if model in self.models:
            return model
        raise ApiError(
            404,
            f"the model {model[:100]!r} does not exist here: use one of {', '.join(self.models)}",
            "model",
            "model_not_found",
        )

    def record(self, request: Request) -> Record:
        """The request's account."""
        record = request.scope.get("gptoss.record")
        if record is None:
            record = request.scope["gptoss.record"] = Record(request.url.path)
        return record

    async def begin(self, turn: Turn, request: Request) -> Running:
        """Begins a turn within the server's time limit and keeps its account; see
        conversation.begin for what it raises."""
        if turn.timeout is None:
            turn = dataclasses.replace(turn, timeout=self.settings.request_seconds)
        record = self.record(request)
        observe = self.observer(record)
        running = await begin(self.engine, turn, observe)
        record.prompt += running.prompt_tokens
        return running

    def stream(
        self,
        request: Request,
        events: AsyncIterator[bytes],
        last: Callable[[ApiError], bytes] = failed,
        close: Callable[[], None] | None = None,
    ) -> EventStream:
        """A stream of events whose end is in the account, however it comes; `close` is called then,
        also if nothing was sent."""
        record = self.record(request)

        def ended(error: BaseException) -> None:
            record.finish.append("disconnected" if isinstance(error, ClientGone) else "error")
            if of_exception(error).status_code == 500 and not isinstance(error, ClientGone):
                report(error, record)

        return EventStream(events, last, self.settings.keepalive_seconds, ended, close)

    def observer(self, record: Record):
        """What is to be called with (completion, piece) for every piece of one generation."""
        self._turns += 1
        turn = self._turns

        def observe(completion: int, piece: Piece) -> None:
            now = time.perf_counter()
            tokens = len(piece.tokens) + isinstance(piece.stop, int)
            if tokens and record.first is None:
                record.first = now - record.started
                self.metrics.first_token.observe(record.first)
            key = (turn, completion)
            if tokens and key in record.last:
                for _ in range(tokens):
                    self.metrics.between_tokens.observe((now - record.last[key]) / tokens)
            if tokens:
                record.last[key] = now
            record.completion += tokens

        return observe

    def account(self, request: Request, reason: str, cached: int) -> None:
        """Notes why a completion ended and how much of its prompt was cached; every route calls it
        for every completion that it has finished."""
        record = self.record(request)
        record.finish.append(reason)
        record.cached = max(record.cached, cached)
        self.metrics.finished.labels(reason).inc()


def report(error: BaseException, record: Record) -> None:
    """Says where something broke, on stderr and for the owner: places, no values and no messages,
    which could hold what was said."""
    cause = error.__cause__ or error
    places = "".join(traceback.format_tb(cause.__traceback__))
    print(f"request {record.id}: {type(cause).__name__}\n{places}", file=sys.stderr, flush=True)
