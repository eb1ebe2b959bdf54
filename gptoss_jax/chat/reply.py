"""One reply of the assistant: ids of a completion -> its answer, reasoning and tool calls.

What Chat does over several rounds and a batch of prompts once. Knows the parser's messages. Refuses
to know history, running tools and generation.
"""

import dataclasses
import json
from collections.abc import Collection, Iterable
from typing import Any

from gptoss_jax.chat.messages import Message
from gptoss_jax.chat.parse import MessageEnd, Parser
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that the caller must answer: `arguments` is the model's text, meant to be a JSON
    object."""

    id: str
    name: str
    arguments: str

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments as a dict; GptOssError when the model's text is no JSON object."""
        try:
            value = json.loads(self.arguments or "{}")
        except ValueError as error:
            raise GptOssError(
                f"the arguments of {self.name} are not JSON ({error}): {self.arguments!r}"
            ) from None
        if not isinstance(value, dict):
            raise GptOssError(
                f"the arguments of {self.name} are not a JSON object: {self.arguments!r}"
            )
        return value


@dataclasses.dataclass(frozen=True)
class Reply:
    """Everything since the user's message.

    `messages`: the new messages of the history after the user's, tool results included.
    `finish_reason`: "stop"; "tool_calls" when `tool_calls` wait for `Chat.send_tool_results`;
    "length" when max_new_tokens or the context ended it; "tool_limit" when the model went on
    calling tools for more than max_tool_rounds. `repairs`: what was malformed in the model's output
    and mended. `completion_tokens` counts stop tokens too.
    """

    messages: list[Message]
    tool_calls: list[ToolCall]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    repairs: list[str]

    @property
    def final(self) -> str:
        """The answer; "" when there is none (yet)."""
        return self._text("final")

    @property
    def analysis(self) -> str:
        """The reasoning. It is not made for users: see the model card."""
        return self._text("analysis")

    @property
    def preamble(self) -> str:
        """What the assistant said to the user before calling tools."""
        return self._text("commentary")

    def _text(self, channel: str) -> str:
        chosen = [
            m
            for m in self.messages
            if m.role == "assistant" and m.channel == channel and m.recipient is None
        ]
        return "\n".join(message.content for message in chosen)


def with_stops(sampling: Any, tokenizer: Tokenizer) -> Any:
    """The sampling settings (None for the default ones) with harmony's stop tokens, whatever the
    model's config says ends it.
    """
    from gptoss_jax.sampling import Sampling

    sampling = sampling if sampling is not None else Sampling()
    stops = dict.fromkeys([*sampling.stop_token_ids, *tokenizer.stop_ids])
    return dataclasses.replace(sampling, stop_token_ids=tuple(stops))


def read_reply(
    prompt: Collection[int],
    tokens: Iterable[int],
    stop: object,
    tokenizer: Tokenizer,
    functions: Collection[str] = (),
) -> Reply:
    """The reply that one completion makes: no tool is run, every complete call is left to the
    caller.

    Args:
      prompt: Ids that `render` gave.
      tokens: Ids that came after them, without what stopped them.
      stop: What stopped them; an id if a token (`Completion.stop`).
      tokenizer: Of the model.
      functions: Names of the tools on offer.

    Returns:
      The reply; its finish_reason is "stop", "tool_calls" or "length".
    """
    parser, messages = Parser(tokenizer, functions), []
    ids = [*tokens, *([stop] if isinstance(stop, int) else [])]
    events = [event for token in ids for event in parser.feed(token)] + parser.close()
    for event in events:
        if isinstance(event, MessageEnd) and (event.complete or event.message.recipient is None):
            messages.append(event.message)  # half a call is no call
    asked = [message for message in messages if message.recipient is not None]
    calls = [
        ToolCall(f"call_{number}", message.function or "", message.content)
        for number, message in enumerate(asked, 1)
    ]
    reason = "length" if parser.stop is None else "tool_calls" if calls else "stop"
    return Reply(messages, calls, reason, len(prompt), len(ids), parser.repairs)
