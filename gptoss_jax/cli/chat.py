"""Talk to the model: answers stream, reasoning is dimmed. /help lists what else can be typed."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, get_args

import tyro

from gptoss_jax.cli.loading import (
    ADAPTER,
    Effort,
    ModelArguments,
    SamplingArguments,
    load_model,
    note,
    working,
)
from gptoss_jax.errors import GptOssError

HELP = """/effort low|medium|high   how long to reason
/new                      forget the conversation
/reasoning                show or hide the reasoning
/history                  show the conversation so far
/help                     this list
/quit                     leave (Ctrl-D does too); Ctrl-C stops an answer"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss chat`."""

    model: Annotated[ModelArguments, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ModelArguments
    )
    sampling: Annotated[SamplingArguments, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SamplingArguments
    )
    adapter: Path | None = None
    """Answer with an adapter: the folder of a run of gptoss finetune, or of an adapter, ours or
    peft's.
    """
    effort: Effort = "medium"
    """Reasoning effort; /effort changes it."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; by default the rest of the context."""
    instructions: str | None = None
    """The developer's instructions."""
    hide_reasoning: bool = False
    """Print the answers only; /reasoning changes it."""


def run(arguments: Arguments) -> None:
    """Reads lines and answers them until /quit or the end of the input."""
    from gptoss_jax import hosts
    from gptoss_jax.chat import Chat
    from gptoss_jax.cli.printing import Printer

    with contextlib.suppress(ImportError):  # line editing and history, where the platform has it
        import readline  # noqa: F401

    sampling = arguments.sampling.sampling()
    model = load_model(arguments.model, adapter=arguments.adapter)
    chat = Chat(
        model,
        reasoning_effort=arguments.effort,
        instructions=arguments.instructions,
        sampling=sampling,
        max_new_tokens=arguments.max_new_tokens,
        adapter=ADAPTER if arguments.adapter else None,
    )
    printer = Printer(hide_reasoning=arguments.hide_reasoning)
    note("/help for what can be typed, Ctrl-D to leave.")
    while True:
        line = hosts.from_first(_read)
        if line in (None, "/quit", "/exit"):
            return
        if not line:
            continue
        try:
            _command(line, chat, printer) if line.startswith("/") else _answer(line, chat, printer)
        except KeyboardInterrupt:
            if hosts.place() is not None:  # the others would go on with the answer
                raise
            note("\n(stopped)")
        except GptOssError as error:
            note(f"{error}")


def _read() -> str | None:
    """The next line, None at the end of the input."""
    while True:
        try:
            return input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            note("\nCtrl-D or /quit leaves.")


def _answer(line: str, chat, printer) -> None:
    events = chat.stream(line)
    with working("reading"):
        first = next(events)
    printer.show(first, events)


def _command(line: str, chat, printer) -> None:
    name, _, rest = line.partition(" ")
    if name == "/effort" and rest in get_args(Effort):
        chat.reasoning_effort = rest
        note(f"reasoning effort: {rest}")
    elif name == "/effort":
        note(f"reasoning effort is {chat.reasoning_effort}: choose {', '.join(get_args(Effort))}")
    elif name == "/new":
        chat.reset()
        note("a new conversation")
    elif name == "/reasoning":
        printer.hide_reasoning = not printer.hide_reasoning
        note(f"reasoning is {'hidden' if printer.hide_reasoning else 'shown'}")
    elif name == "/history":
        for message in chat.history:
            note(f"{message.role} {message.channel or ''}: {message.content}")
    else:
        note(HELP)
