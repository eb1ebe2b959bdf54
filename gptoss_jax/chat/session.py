"""Chat: a conversation with a model, its history, and the loop that runs tools.

Knows when to render, generate, parse, call a function and go on. Refuses to know arrays, HTTP and
how tokens are made: a model is anything that has a tokenizer and streams token ids.
"""

import dataclasses
import datetime
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from gptoss_jax.chat.functions import call_function, tool_from_function
from gptoss_jax.chat.messages import (
    IDENTITY,
    ChatSettings,
    Message,
    ResponseFormat,
    Tool,
    from_openai,
    response_format_from,
    tool_from_openai,
    user,
)
from gptoss_jax.chat.parse import Delta, MessageEnd, MessageStart, Parser, Stop
from gptoss_jax.chat.render import render
from gptoss_jax.chat.reply import Reply, ToolCall, with_stops
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import Tokenizer


class Generates(Protocol):
    """What a Chat needs of a model. Pieces have `.tokens` (list of ids) and `.stop` (what ended
    them, an id if a token)."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    def stream(
        self, prompt: Sequence[int], sampling: Any = None, max_new_tokens: int | None = None
    ) -> Iterator[Any]: ...


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """Event of a stream: a tool was run and answered."""

    call: ToolCall
    text: str


ChatEvent = MessageStart | Delta | MessageEnd | Stop | ToolResult | Reply
ToolLike = Callable[..., Any] | Mapping[str, Any] | Tool


class Chat:
    """A conversation.

    Args:
      model: What `gptoss_jax.load` returns, or anything like it (`Generates`). reasoning_effort:
      low, medium or high; may be changed between messages. tools: Python functions (run here when
      the model calls them), and OpenAI tool dicts or `Tool`s (handed back as
        `reply.tool_calls`). No other tool ever runs.
      response_format: JSON schema of the answer, OpenAI's response_format dict, or a pydantic
      class. date: "YYYY-MM-DD"; today, fixed when the chat begins, if None. instructions: The
      developer's instructions. sampling: gptoss_jax.Sampling; the model's default if None.
      max_new_tokens: Limit of one generation; None for the rest of the context. max_tool_rounds:
      How often a reply may come back to the model after tool calls. adapter: Name of one of the
      model's adapters; may be changed between messages.

    `history` is the list of messages so far (developer messages in it are allowed). Raises
    GptOssError for an unknown effort, a malformed date, tool or response format.
    """

    def __init__(
        self,
        model: Generates,
        reasoning_effort: str = "medium",
        tools: Sequence[ToolLike] = (),
        response_format: ResponseFormat | Mapping[str, Any] | type | None = None,
        date: str | datetime.date | None = None,
        instructions: str | None = None,
        sampling: Any = None,
        max_new_tokens: int | None = None,
        max_tool_rounds: int = 16,
        identity: str = IDENTITY,
        adapter: str | None = None,
    ):
        self.model = model
        self.adapter = adapter
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.max_tool_rounds = max_tool_rounds
        self.history: list[Message] = []
        self._pending: list[ToolCall] = []
        self._calls = 0
        self._functions: dict[str, Callable[..., Any]] = {}
        described = []
        for tool in tools:
            if isinstance(tool, Tool):
                described.append(tool)
            elif callable(tool):
                described.append(tool_from_function(tool))
                self._functions[described[-1].name] = tool
            else:
                described.append(tool_from_openai(tool))
        self.settings = ChatSettings(
            reasoning_effort=reasoning_effort,
            date=date if date is not None else _today(),
            instructions=instructions,
            tools=tuple(described),
            response_format=response_format_from(response_format),
            identity=identity,
        )

    @property
    def reasoning_effort(self) -> str:
        return self.settings.reasoning_effort

    @reasoning_effort.setter
    def reasoning_effort(self, effort: str) -> None:
        self.settings = dataclasses.replace(self.settings, reasoning_effort=effort)

    def reset(self) -> None:
        """Forgets the history and calls that wait for results."""
        self.history.clear()
        self._pending.clear()

    def prompt(self) -> list[int]:
        """The token ids that the model would continue now."""
        return render(self.history, self.model.tokenizer, self.settings)

    def send(self, message: str | Sequence[Message | Mapping[str, Any]]) -> Reply:
        """Adds the user's message (text, or messages of any role) and returns the model's reply.

        Raises GptOssError when the message is empty or malformed, tool calls wait for results, or
        the conversation no longer fits into the context; the history is then as before.
        """
        return _last(self.stream(message))

    def stream(self, message: str | Sequence[Message | Mapping[str, Any]]) -> Iterator[ChatEvent]:
        """Like `send`, as events while they happen; the last one is the Reply.

        When the caller stops early (break, Ctrl-C), the history keeps the answer as far as it came;
        if none had begun, it is as before.
        """
        if self._pending:
            names = ", ".join(call.name for call in self._pending)
            raise GptOssError(
                f"calls of {names} wait for results: use send_tool_results, or reset the chat"
            )
        if isinstance(message, str):
            if not message:
                raise GptOssError("the message is empty: write something")
            return self._run([user(message)])
        new = [
            m
            for raw in message
            for m in ([raw] if isinstance(raw, Message) else from_openai([raw]))
        ]
        if not new:
            raise GptOssError("the message is empty: write something")
        return self._run(new)

    def send_tool_results(self, results: Sequence[Any] | Mapping[str, Any]) -> Reply:
        """Answers the calls of the last reply, in their order or by id, and returns what the model
        says next."""
        return _last(self.stream_tool_results(results))

    def stream_tool_results(
        self, results: Sequence[Any] | Mapping[str, Any]
    ) -> Iterator[ChatEvent]:
        """Like `send_tool_results`, as events."""
        ids = [call.id for call in self._pending]
        if not ids:
            raise GptOssError("no tool call waits for a result: use send")
        if isinstance(results, str):
            raise GptOssError(
                f"expected a list of {len(ids)} results, or a dict by call id, got a string"
            )
        given = (
            dict(results) if isinstance(results, Mapping) else dict(zip(ids, results, strict=False))
        )
        if set(given) != set(ids) or len(results) != len(ids):
            raise GptOssError(
                f"expected results for the calls {ids}, got {len(results)} for {list(given)}"
            )
        texts = [
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in given.values()
        ]
        by_id = dict(zip(given, texts, strict=True))
        return self._run(
            [_answer(f"functions.{call.name}", by_id[call.id]) for call in self._pending]
        )

    def _run(self, new: Iterable[Message]) -> Iterator[ChatEvent]:
        before, pending = list(self.history), self._pending
        self._pending = []
        self.history.extend(new)
        start = len(self.history)
        count = _Count()
        parser, reason = None, "stop"
        try:
            for rounds in itertools.count():
                parser = Parser(self.model.tokenizer, [tool.name for tool in self.settings.tools])
                calls: list[Message] = []
                for event in self._generate(parser, count):
                    if isinstance(event, MessageEnd):
                        called = event.message.recipient is not None
                        if event.complete or not called:  # half a call is no call
                            self.history.append(event.message)
                        if event.complete and called:
                            calls.append(event.message)
                    yield event
                if (settled := self._settled(parser, calls, rounds)) is not None:
                    reason = settled
                    break
                for call in calls:
                    yield from self._answer_call(call)
                if self._pending:
                    reason = "tool_calls"
                    break
        except (GeneratorExit, KeyboardInterrupt):
            self._keep_answer(before, start, parser)
            self._pending = pending if len(self.history) == len(before) else []
            raise
        except BaseException:
            self.history[:], self._pending = before, pending
            raise
        yield Reply(
            self.history[start:],
            list(self._pending),
            reason,
            count.prompt,
            count.completion,
            count.repairs,
        )

    def _settled(self, parser: Parser, calls: list[Message], rounds: int) -> str | None:
        """Why the reply is over after a generation; None while there are calls to answer."""
        if parser.stop is None:
            return "length"
        if not calls:
            return "stop"
        if rounds < self.max_tool_rounds:
            return None
        self._pending = [self._tool_call(call) for call in calls]
        return "tool_limit"

    def _generate(
        self, parser: Parser, count: "_Count"
    ) -> Iterator[MessageStart | Delta | MessageEnd | Stop]:
        """One generation, parsed as it comes."""
        prompt = self.prompt()
        count.prompt += len(prompt)
        sampling = with_stops(self.sampling, self.model.tokenizer)
        own: Any = {} if self.adapter is None else {"adapter": self.adapter}
        stream = self.model.stream(
            prompt, sampling=sampling, max_new_tokens=self.max_new_tokens, **own
        )
        for piece in stream:
            stop = getattr(piece, "stop", None)
            tokens = [*piece.tokens, *([stop] if isinstance(stop, int) else [])]
            for token in tokens:
                count.completion += not parser.done
                yield from parser.feed(token)
            if parser.done:
                break
        yield from parser.close()
        count.repairs += parser.repairs

    def _tool_call(self, call: Message) -> ToolCall:
        self._calls += 1
        return ToolCall(f"call_{self._calls}", call.function or "", call.content)

    def _answer_call(self, message: Message) -> Iterator[ToolResult]:
        """Runs a function of ours, leaves an enabled tool to the caller, and tells the model when
        there is no such tool."""
        call = self._tool_call(message)
        name = (message.recipient or "").removeprefix("functions.")
        known = [tool.name for tool in self.settings.tools]
        if message.recipient == f"functions.{name}" and name in self._functions:
            text = call_function(self._functions[name], message.content)
        elif message.recipient == f"functions.{name}" and name in known:
            self._pending.append(call)
            return
        else:
            text = f"error: there is no tool {message.recipient}"
            text += (
                f"; the tools are {', '.join(known)}"
                if known
                else "; there are no tools, answer without"
            )
        self.history.append(_answer(message.recipient or "", text, message.channel))
        yield ToolResult(call, text)

    def _keep_answer(self, before: list[Message], start: int, parser: Parser | None) -> None:
        """After an interruption: the answer as far as it came, or nothing."""
        if parser is not None and not parser.done:
            ended = [event.message for event in parser.close() if isinstance(event, MessageEnd)]
            self.history += [
                message for message in ended if message.recipient is None and message.content
            ]
        answered = any(m.channel == "final" and m.role == "assistant" for m in self.history[start:])
        if not answered:
            self.history[:] = before


@dataclasses.dataclass
class _Count:
    prompt: int = 0
    completion: int = 0
    repairs: list[str] = dataclasses.field(default_factory=list)


def _answer(name: str, text: str, channel: str | None = "commentary") -> Message:
    return Message("tool", text, channel=channel, recipient="assistant", name=name)


def _today() -> str:
    """Today, by the clock of process 0 if there are several."""
    from gptoss_jax import hosts

    return hosts.same(datetime.date.today().isoformat())


def _last(events: Iterator[ChatEvent]) -> Reply:
    *_, reply = events
    assert isinstance(reply, Reply)
    return reply
