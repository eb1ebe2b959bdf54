"""The lines of `gptoss generate --input`: JSON objects, all checked before a model is loaded.

Knows what a line may hold and what the command line's options give it. Refuses to know models,
batches and the output.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.chat.messages import (
    ChatSettings,
    Message,
    from_openai,
    response_format_from,
    tool_from_openai,
    user,
)
from gptoss_jax.errors import GptOssError
from gptoss_jax.sampling import Sampling

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
RAW = ("id", "prompt", "max_new_tokens", *SAMPLING, "metadata")
CHAT = (*RAW, "messages", "reasoning_effort", "instructions", "tools", "response_format")


@dataclasses.dataclass(frozen=True)
class Line:
    """One prompt with its own settings.

    Attributes:
      number: Of the line in the file, from 1.
      id: As the file has it; the line's number where it has none.
      text: The prompt; None if the line holds messages.
      messages: The conversation; empty with raw.
      settings: Effort, instructions, tools, response format; the date is the run's.
      sampling: Its seed is None unless the line has one.
      max_new_tokens: None for the rest of the context.
      metadata: Passed on to the answer as it is.
    """

    number: int
    id: str | int
    text: str | None
    messages: tuple[Message, ...]
    settings: ChatSettings
    sampling: Sampling
    max_new_tokens: int | None
    metadata: Any = None

    @property
    def key(self) -> str:
        """The id as text: 7 and "7" are the same."""
        return str(self.id)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What the command line gives the lines that say nothing else."""

    raw: bool
    settings: ChatSettings
    sampling: Sampling
    max_new_tokens: int | None


def read_prompts(path: Path, defaults: Defaults) -> tuple[list[Line], str]:
    """The lines of a file, blank ones skipped, and the SHA-256 of its bytes.

    Raises:
      GptOssError: The file cannot be read or is empty, a line is malformed or has an id that an
        earlier one has; names the line.
    """
    if not path.is_file():
        raise GptOssError(f"{path}: no such file: give a file with one JSON object a line")
    data = path.read_bytes()
    lines: list[Line] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not row.strip():
            continue
        try:
            line = _read(number, row, defaults)
            if (other := seen.setdefault(line.key, number)) != number:
                what = "without an id, its number" if line.id == number else "id"
                raise GptOssError(
                    f"{what} {line.id!r} is the id of line {other} too: give each its own"
                )
        except GptOssError as error:
            raise GptOssError(f"{path} line {number}: {error}") from None
        lines.append(line)
    if not lines:
        raise GptOssError(f"{path} holds no prompts: give one JSON object a line")
    return lines, hashlib.sha256(data).hexdigest()


def _read(number: int, row: bytes, defaults: Defaults) -> Line:
    raw = defaults.raw
    expected = (
        'expected {"prompt": "..."}' if raw else 'expected {"prompt": ...} or {"messages": ...}'
    )
    try:
        found = json.loads(row.decode())
    except UnicodeDecodeError:
        raise GptOssError(f"not UTF-8: {expected} in UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise GptOssError(f"not JSON ({reason}): {_short(row.decode())}: {expected}") from None
    if not isinstance(found, dict):
        raise GptOssError(f"found {_short(json.dumps(found))}: {expected}")
    given = {key: value for key, value in found.items() if value is not None}
    allowed = RAW if raw else CHAT
    for key in given:
        if key in allowed:
            continue
        if key in CHAT:
            raise GptOssError(f"{key!r} is of conversations: with --raw leave it out")
        raise GptOssError(
            f"unknown key {key!r}: expected {', '.join(allowed)}; keys of your own go into metadata"
        )
    if ("prompt" in given) == ("messages" in given):
        both = "both prompt and messages" if "prompt" in given else f"keys {sorted(given)}"
        raise GptOssError(f"found {both}: {expected}")
    return Line(
        number,
        _id(given.get("id", number)),
        _text(given["prompt"]) if "prompt" in given else None,
        () if raw else _messages(given),
        defaults.settings if raw else _settings(given, defaults.settings),
        dataclasses.replace(defaults.sampling, **{k: given[k] for k in SAMPLING if k in given}),
        check_limit(given.get("max_new_tokens", defaults.max_new_tokens)),
        found.get("metadata"),
    )


def _id(value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise GptOssError(f"id is {_short(json.dumps(value))}: expected text or an integer")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise GptOssError(f"prompt is {_short(json.dumps(value))}: expected text, not empty")
    return value


def check_limit(value: Any) -> int | None:
    """max_new_tokens, or a GptOssError."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise GptOssError(f"max_new_tokens is {value!r}: expected a positive integer")
    return value


def _messages(given: Mapping[str, Any]) -> tuple[Message, ...]:
    if "prompt" in given:
        return (user(_text(given["prompt"])),)
    messages = given["messages"]
    if not isinstance(messages, list) or not messages:
        raise GptOssError(
            f"messages is {_short(json.dumps(messages))}: expected a list of messages"
        )
    return tuple(from_openai(messages))


def _settings(given: Mapping[str, Any], defaults: ChatSettings) -> ChatSettings:
    changes: dict[str, Any] = {}
    if "reasoning_effort" in given:
        changes["reasoning_effort"] = given["reasoning_effort"]
    if "instructions" in given:
        changes["instructions"] = _text(given["instructions"])
    if "tools" in given:
        tools = given["tools"]
        if not isinstance(tools, list):
            raise GptOssError(f"tools is {_short(json.dumps(tools))}: expected a list of tools")
        changes["tools"] = tuple(tool_from_openai(tool) for tool in tools)
    if "response_format" in given:
        changes["response_format"] = response_format_from(given["response_format"])
    return dataclasses.replace(defaults, **changes) if changes else defaults


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
