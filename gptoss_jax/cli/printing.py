"""A reply on the terminal as it comes: reasoning dimmed, the answer plain, tool calls marked."""

import itertools
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from gptoss_jax.chat.parse import Delta, MessageEnd, MessageStart
from gptoss_jax.chat.session import ChatEvent, Reply, ToolResult


class Printer:
    """Prints events; control characters of the model's text other than newlines and tabs are not
    passed on.
    """

    def __init__(self, hide_reasoning: bool = False, console: Console | None = None):
        self.hide_reasoning = hide_reasoning
        self.console = console or Console(highlight=False, soft_wrap=True)

    def show(self, first: ChatEvent, rest: Iterable[ChatEvent]) -> Reply:
        """Prints all events and returns the reply, the last of them."""
        event = first
        for event in itertools.chain([first], rest):
            self._event(event)
        assert isinstance(event, Reply)
        if event.finish_reason == "length":
            self._write("(stopped: the limit of tokens is reached)\n", "yellow")
        return event

    def _event(self, event: ChatEvent) -> None:
        if isinstance(event, MessageStart) and event.recipient:
            self._write(f"{event.recipient} ", "cyan")
        elif isinstance(event, Delta) and not self._hidden(event.channel, event.recipient):
            self._write(event.text, _style(event.channel, event.recipient))
        elif isinstance(event, MessageEnd) and not self._hidden(
            event.message.channel, event.message.recipient
        ):
            self._write("\n", None)
        elif isinstance(event, ToolResult):
            self._write(f"  = {event.text}\n", "cyan")

    def _hidden(self, channel: str | None, recipient: str | None) -> bool:
        return self.hide_reasoning and channel == "analysis" and recipient is None

    def _write(self, text: str, style: str | None) -> None:
        clean = "".join(c for c in text if c in "\n\t" or c.isprintable())
        self.console.print(Text(clean, style=style or ""), end="")


def _style(channel: str, recipient: str | None) -> str | None:
    if recipient:
        return "cyan"
    return "dim" if channel == "analysis" else None
