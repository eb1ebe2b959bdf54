"""One turn of a conversation over a batching engine: messages and settings in, typed events out.

All of harmony that serving needs is here: rendering, the grammar, the tolerant parser, stop strings
and log probabilities of what the user sees, usage. Refuses to know HTTP and the shapes of APIs.

    running = await begin(engine, turn)
    async for completion, event in running: ...      # leaving the loop cancels what still runs

The model's messages become items, numbered from 0 in each completion: reasoning (analysis), text
(final), preamble (commentary), calls of offered functions. What else the model writes: a call of a
function that is not offered is text, a call of a built-in tool is reasoning, since nobody will
answer either; the rest is as the table in chat/parse.py says. Nothing that a model writes raises.
"""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence

from gptoss_jax.batching.requests import (
    BatchingEngine,
    Closing,
    Failure,
    Request,
    TokenMask,
)
from gptoss_jax.chat.grammar import Choice, Lark, Regex, completion_grammar
from gptoss_jax.chat.messages import ChatSettings, Message
from gptoss_jax.chat.parse import Delta, MessageEnd, MessageStart, Parser
from gptoss_jax.chat.render import render
from gptoss_jax.chat.reply import with_stops
from gptoss_jax.completions import Piece, TokenLogprob
from gptoss_jax.errors import GptOssError
from gptoss_jax.sampling import Sampling
from gptoss_jax.server.visible import Visible, VisibleText
from gptoss_jax.tokenizer import Tokenizer


class ContextTooLong(GptOssError):
    """The conversation does not fit into the context."""


class TimedOut(GptOssError):
    """The request took longer than the server allows."""


class EngineFailed(Exception):
    """The engine broke; what happened is its __cause__ and not for the client."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """What to answer, and how.

    Attributes:
      messages: The conversation (chat/messages.py's from_openai makes them of OpenAI's).
      settings: Effort, date, tools, JSON schema of the answer (response_format).
      tool_choice: "auto", "none" (the model does not see the tools), "required", or
        "functions.NAME" for that one.
      parallel_tool_calls: False ends the answer after its first call.
      guide: What the answer must match, where that is no JSON schema.
      sampling: n completions; logprobs are reported for what the user sees.
      stop: Strings that end the visible text (final and preambles) and are not part of it.
      max_new_tokens: Most tokens of each completion, reasoning included.
      adapter: Name of one of the engine's adapters.
      priority: Lower first.
      timeout: Seconds until TimedOut is raised.
    """

    messages: Sequence[Message]
    settings: ChatSettings = dataclasses.field(default_factory=ChatSettings)
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    guide: Regex | Choice | Lark | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: Sequence[str] = ()
    max_new_tokens: int | None = None
    adapter: str | None = None
    priority: int = 0
    timeout: float | None = None

    def __post_init__(self):
        names = [tool.name for tool in self.settings.tools]
        choice = self.tool_choice
        if choice not in ("auto", "none", "required") and not choice.startswith("functions."):
            raise GptOssError(f"tool choice {choice!r}: use auto, none, required or functions.NAME")
        if choice.startswith("functions.") and choice.removeprefix("functions.") not in names:
            raise GptOssError(
                f"tool_choice names {choice.removeprefix('functions.')!r}, which is none of the "
                f"tools ({', '.join(names) or 'there are none'}): name one of them"
            )
        if choice == "required" and not names:
            raise GptOssError("tool_choice is required, but there are no tools: give tools")
        if self.guide is not None and self.settings.response_format is not None:
            raise GptOssError("give a response format or a regex, choice or grammar, not both")

    @property
    def functions(self) -> frozenset[str]:
        """Names of the tools on offer."""
        offered = () if self.tool_choice == "none" else self.settings.tools
        return frozenset(tool.name for tool in offered)


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
    """New text of the analysis channel."""

    item: int
    text: str


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """New text of the answer; `logprobs` of the tokens that end in it, if wanted."""

    item: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class PreambleDelta:
    """New text for the user before a call."""

    item: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class ItemEnd:
    """A reasoning, text or preamble item ends; `complete` is False when the generation ended before
    the message did."""

    item: int
    complete: bool


@dataclasses.dataclass(frozen=True)
class CallStart:
    """A call of an offered function begins; `index` counts the calls of the completion."""

    item: int
    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True)
class CallDelta:
    """New text of a call's arguments (JSON, if the model keeps to it)."""

    item: int
    index: int
    text: str


@dataclasses.dataclass(frozen=True)
class CallEnd:
    """A call ends with all its arguments. `complete` is False when the generation was cut: then it
    is no call, and must not be answered."""

    item: int
    index: int
    id: str
    name: str
    arguments: str
    complete: bool


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of one completion: the prompt's, how many of these were cached, the completion's (stop
    token included), and those of it on the analysis channel."""

    prompt: int
    cached: int
    completion: int
    reasoning: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """The completion is over: `reason` is "stop", "length" or "tool_calls"; `stop` the stop string
    that was found, if any; `repairs` what was malformed and mended."""

    reason: str
    usage: Usage
    stop: str | None = None
    repairs: tuple[str, ...] = ()


Event = (
    ReasoningDelta
    | TextDelta
    | PreambleDelta
    | ItemEnd
    | CallStart
    | CallDelta
    | CallEnd
    | Finished
)


async def begin(
    engine: BatchingEngine, turn: Turn, observe: Callable[[int, Piece], None] | None = None
) -> "Running":
    """Renders the turn, compiles its grammar and hands it to the engine; returns before the first
    token.

    Args:
      engine: Makes the tokens.
      turn: What to answer.
      observe: Called with every piece as it is read, and its completion's number.

    Raises:
      ContextTooLong: The conversation leaves no room for an answer.
      GptOssError: A message or schema is not as it must be.
      Busy, Closing: As BatchingEngine.submit.
    """
    request = await asyncio.to_thread(_request, engine, turn)
    return Running(engine, turn, request, observe)


class Running:
    """A turn at work: iterate over it for (completion, event), from 0 to n - 1, in the order in
    which they come; each completion's last event is Finished.

    Raises TimedOut, Closing (the server's end cut it), or EngineFailed from the iteration.
    """

    def __init__(
        self,
        engine: BatchingEngine,
        turn: Turn,
        request: Request,
        observe: Callable[[int, Piece], None] | None = None,
    ):
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def listen(completion: int, came: Piece | Failure) -> None:
            with contextlib.suppress(RuntimeError):  # a closed loop has nobody left to tell
                loop.call_soon_threadsafe(queue.put_nowait, (completion, came))

        self._queue: asyncio.Queue[tuple[int, Piece | Failure]] = queue
        self._ends = None if turn.timeout is None else time.monotonic() + turn.timeout
        self.prompt_tokens = len(request.prompt)
        self._readings = [
            _Reading(engine.tokenizer, turn, self.prompt_tokens) for _ in range(turn.sampling.n)
        ]
        self._observe = observe or (lambda completion, piece: None)
        self._closed = False
        self._generation = engine.submit(request, listen)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not read again; known from the first event on."""
        return self._generation.cached_tokens

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        return self._events()

    def close(self) -> None:
        """Cancels what still runs; may be called at any time and more than once."""
        if not self._closed:
            self._closed = True
            if not all(reading.finished for reading in self._readings):
                self._generation.cancel()

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        try:
            while not all(reading.finished for reading in self._readings):
                number, came = await self._next()
                reading = self._readings[number]
                if reading.finished:
                    continue
                if isinstance(came, Failure):
                    if isinstance(came.error, GptOssError):
                        raise came.error
                    raise EngineFailed(f"the engine failed: {came.error}") from came.error
                self._observe(number, came)
                events = reading.feed(came, self._generation.cached_tokens)
                if reading.finished and came.finish_reason is None:
                    self._generation.cancel(number)
                for event in events:
                    yield number, event
        finally:
            self.close()

    async def _next(self) -> tuple[int, Piece | Failure]:
        try:
            async with asyncio.timeout(
                None if self._ends is None else max(self._ends - time.monotonic(), 0)
            ):
                return await self._queue.get()
        except TimeoutError:
            raise TimedOut(
                "the request took longer than this server allows: ask for fewer tokens"
            ) from None


def prompt_of(turn: Turn, tokenizer: Tokenizer) -> list[int]:
    """The token ids that the model continues."""
    settings = turn.settings
    if turn.tool_choice == "none" and settings.tools:
        settings = dataclasses.replace(settings, tools=())
    return render(turn.messages, tokenizer, settings)


def _request(engine: BatchingEngine, turn: Turn) -> Request:
    prompt = prompt_of(turn, engine.tokenizer)
    room = engine.max_context - len(prompt)
    if room < 1:
        raise ContextTooLong(
            f"the conversation has {len(prompt)} tokens, but the context is {engine.max_context}: "
            "shorten it"
        )
    return Request(
        prompt,
        with_stops(turn.sampling, engine.tokenizer),
        # an upper bound, as clients mean it: where the context ends first, it says "length"
        None if turn.max_new_tokens is None else min(turn.max_new_tokens, room),
        adapter=turn.adapter,
        priority=turn.priority,
        masks=_masks(engine.tokenizer, turn),
    )


def _masks(tokenizer: Tokenizer, turn: Turn) -> Sequence[TokenMask]:
    """One constraint for each completion, or none where nothing is asked for."""
    named = turn.tool_choice.startswith("functions.")
    grammar = completion_grammar(
        tokenizer,
        turn.settings.tools,
        turn.tool_choice,
        turn.guide or turn.settings.response_format,
        parallel=turn.parallel_tool_calls and not named,
    )
    return () if grammar is None else [grammar.mask() for _ in range(turn.sampling.n)]


class _Reading:
    """What one completion has been so far: pieces in, events out."""

    def __init__(self, tokenizer: Tokenizer, turn: Turn, prompt_tokens: int):
        self.finished = False
        self._turn, self._functions, self._prompt = turn, turn.functions, prompt_tokens
        self._parser, self._stop_ids = Parser(tokenizer, self._functions), tokenizer.stop_ids
        self._visible = VisibleText(tokenizer, turn.stop)
        self._completion = self._reasoning = self._items = self._calls = 0
        self._whole_calls = 0
        self._kind: str | None = None  # of the open item
        self._item: int | None = None  # its number, once it has begun
        self._call = ("", "")  # id and name of the open call
        self._arguments: list[str] = []  # of the open call
        self._stop: str | None = None  # the stop string that was found

    def feed(self, piece: Piece, cached: int) -> list[Event]:
        """The events that a piece makes; the last one ends with Finished."""
        out: list[Event] = []
        logprobs = piece.logprobs or ()
        for place, token in enumerate(piece.tokens):
            self._token(token, logprobs[place] if place < len(logprobs) else None, out)
            if self._over():
                break
        if piece.finish_reason is not None and not self._over():
            if piece.finish_reason == "cancelled":
                raise Closing("the server shut down before the answer was complete: ask again")
            if piece.stop in self._stop_ids:
                assert isinstance(piece.stop, int)
                self._token(piece.stop, None, out)
            else:
                self._completion += isinstance(piece.stop, int)
            for event in self._parser.close():
                self._event(event, out)
        if piece.finish_reason is None and not self._over():
            return out
        self._end_item(False, out)
        usage = Usage(self._prompt, cached, self._completion, self._reasoning)
        repairs = tuple(self._parser.repairs)
        out.append(Finished(self._reason(piece), usage, self._stop, repairs))
        self.finished = True
        return out

    def _reason(self, piece: Piece) -> str:
        if piece.finish_reason == "length" and not self._over():
            return "length"
        return "tool_calls" if self._whole_calls else "stop"

    def _over(self) -> bool:
        """Ended by itself, whatever the engine still makes: a stop token, a stop string, or the one
        call."""
        one = self._whole_calls > 0 and not self._turn.parallel_tool_calls
        return one or self._stop is not None or self._parser.stop is not None

    def _token(self, token: int, logprob: TokenLogprob | None, out: list[Event]) -> None:
        self._completion += 1
        self._reasoning += self._parser.channel == "analysis"
        events = self._parser.feed(token)
        if logprob is not None:
            self._visible.token(token, logprob)
        for event in events:
            if self._stop is None:
                self._event(event, out)
        kinds = {type(event) for event in events}
        if self._parser.channel is not None and MessageStart in kinds and Delta not in kinds:
            self._visible.forget()  # the header's tokens

    def _event(self, event: object, out: list[Event]) -> None:
        if isinstance(event, MessageStart):
            self._start(event, out)
        elif isinstance(event, Delta):
            self._delta(event.text, out)
        elif isinstance(event, MessageEnd):
            self._end_item(event.complete, out)

    def _start(self, start: MessageStart, out: list[Event]) -> None:
        self._item, self._arguments = None, []
        name = (start.recipient or "").removeprefix("functions.")
        function = start.recipient is not None and start.recipient != name
        if function and name in self._functions:
            self._kind, self._item = "call", self._items
            self._call = (f"call_{secrets.token_hex(12)}", name)
            self._items, self._calls = self._items + 1, self._calls + 1
            out.append(CallStart(self._item, self._calls - 1, *self._call))
        elif start.channel == "analysis" or (start.recipient is not None and not function):
            self._kind = "reasoning"
        elif start.channel == "commentary" and not function:
            self._kind = "preamble"
        else:
            self._kind = "text"

    def _delta(self, text: str, out: list[Event]) -> None:
        if self._kind == "call":
            assert self._item is not None
            self._arguments.append(text)
            out.append(CallDelta(self._item, self._calls - 1, text))
        elif self._kind == "reasoning":
            out.append(ReasoningDelta(self._number(), text))
        else:
            self._show(self._visible.feed(text), out)

    def _show(self, visible: Visible, out: list[Event]) -> None:
        kind = PreambleDelta if self._kind == "preamble" else TextDelta
        if visible.text or visible.logprobs:
            out.append(kind(self._number(), visible.text, visible.logprobs))
        self._stop = visible.stop

    def _number(self) -> int:
        """The open item's, which begins with its first text: empty messages are no items."""
        if self._item is None:
            self._item, self._items = self._items, self._items + 1
        return self._item

    def _end_item(self, complete: bool, out: list[Event]) -> None:
        if self._kind is None:
            return
        if self._kind == "call":
            self._end_call(complete, out)
        else:
            if self._kind != "reasoning" and self._stop is None:
                self._show(self._visible.flush(), out)
            if self._item is not None:
                out.append(ItemEnd(self._item, complete or self._stop is not None))
        self._kind = None

    def _end_call(self, complete: bool, out: list[Event]) -> None:
        assert self._item is not None
        index = self._calls - 1
        text = "".join(self._arguments)
        if complete and not text.strip():  # no arguments are an empty object
            text += "{}"
            out.append(CallDelta(self._item, index, "{}"))
        out.append(CallEnd(self._item, index, *self._call, text, complete))
        self._whole_calls += complete
