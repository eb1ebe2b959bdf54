"""What a conversation is: messages, tools, response format and settings, and how OpenAI-style dicts
become them.

Knows roles, channels and what clients may set. Refuses to know tokens, generation and HTTP.

Channels of the assistant: `analysis` (reasoning), `commentary` (tool calls, and preambles that the
user sees), `final` (the answer). A call has the recipient `functions.NAME`; its result is a tool
message named `functions.NAME`.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptoss_jax.errors import GptOssError

EFFORTS = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")
ROLES = ("developer", "user", "assistant", "tool")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
CONSTRAIN_JSON = "<|constrain|>json"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclasses.dataclass(frozen=True)
class Message:
    """One harmony message. `recipient` and `content_type` are for the assistant's calls, `name` for
    tool results.

    `content_type` is `<|constrain|>json` for a call with JSON arguments. Messages of clients are
    made by `from_openai`, which never sets recipient, channel or content type from what the client
    wrote there.
    """

    role: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    name: str | None = None
    content_type: str | None = None

    @property
    def function(self) -> str | None:
        """The name of the function that this message calls or answers for, without `functions.`."""
        address = self.name if self.role == "tool" else self.recipient
        return address.removeprefix("functions.") if address else None


def developer(text: str) -> Message:
    return Message("developer", text)


def user(text: str) -> Message:
    return Message("user", text)


def analysis(text: str) -> Message:
    """The assistant's reasoning."""
    return Message("assistant", text, channel="analysis")


def preamble(text: str) -> Message:
    """What the assistant tells the user before it calls a tool."""
    return Message("assistant", text, channel="commentary")


def call(function: str, arguments: str | Mapping[str, Any]) -> Message:
    """The assistant calls a function; `arguments` is JSON text, or a mapping to be written as
    JSON."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    recipient = f"functions.{check_name(function)}"
    return Message(
        "assistant", text, channel="commentary", recipient=recipient, content_type=CONSTRAIN_JSON
    )


def result(function: str, text: str) -> Message:
    """What a function returned."""
    name = f"functions.{check_name(function)}"
    return Message("tool", text, channel="commentary", recipient="assistant", name=name)


def final(text: str) -> Message:
    """The assistant's answer."""
    return Message("assistant", text, channel="final")


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function the model may call: `parameters` is a JSON schema of type object, or None for no
    arguments. `strict` asks that every call's arguments are valid (chat/grammar.py)."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def __post_init__(self):
        check_name(self.name)
        if self.parameters is not None and not isinstance(self.parameters, Mapping):
            raise GptOssError(
                f"tool {self.name}: parameters must be a JSON schema (an object), got "
                f"{self.parameters!r}"
            )


@dataclasses.dataclass(frozen=True)
class ResponseFormat:
    """The JSON schema of the final answer. It is shown to the model; enforcing it needs a grammar
    as well."""

    schema: Mapping[str, Any]
    name: str = "response"
    description: str = ""

    def __post_init__(self):
        check_name(self.name, what="response format name")
        if not isinstance(self.schema, Mapping):
            raise GptOssError(
                f"response format: expected a JSON schema (an object), got {self.schema!r}"
            )


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """What the system and the first developer message say.

    `date`: "YYYY-MM-DD" or a datetime.date; None means today, which makes prompts (and cached
    prefixes) change at midnight: pin it where results must be reproducible. Raises GptOssError for
    an unknown effort, a malformed date, a bad or repeated tool name.
    """

    reasoning_effort: str = "medium"
    date: str | datetime.date | None = None
    instructions: str | None = None
    tools: Sequence[Tool] = ()
    response_format: ResponseFormat | None = None
    identity: str = IDENTITY
    knowledge_cutoff: str = "2024-06"

    def __post_init__(self):
        if self.reasoning_effort not in EFFORTS:
            raise GptOssError(
                f"unknown reasoning effort {self.reasoning_effort!r}: use low, medium or high"
            )
        if isinstance(self.date, str):
            check_date(self.date)
        names = [tool.name for tool in self.tools]
        for name in names:
            if names.count(name) > 1:
                raise GptOssError(f"two tools are called {name!r}: give each its own name")


def check_date(date: str) -> str:
    """The date, or a GptOssError: it stands in prompts as it is, so only YYYY-MM-DD will do."""
    try:
        valid = datetime.date.fromisoformat(date).isoformat() == date
    except ValueError:
        valid = False
    if not valid:
        raise GptOssError(f"expected a date as YYYY-MM-DD, got {date!r}")
    return date


def check_name(name: object, what: str = "tool name") -> str:
    """The name, or a GptOssError: names stand in message headers, so only letters, digits, _ and -
    are safe."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise GptOssError(f"{what} {name!r} is not allowed: use 1 to 64 letters, digits, _ or -")
    return name


def tool_from_openai(tool: Mapping[str, Any]) -> Tool:
    """A Tool from {"type": "function", "function": {name, description, parameters}} or the same
    without the wrapper."""
    if not isinstance(tool, Mapping):
        raise GptOssError(f"expected a tool as a dict with type 'function', got {tool!r}")
    if tool.get("type", "function") != "function":
        raise GptOssError(f"tools of type {tool['type']!r} are not supported: use type 'function'")
    body = tool.get("function", tool)
    if not isinstance(body, Mapping) or "name" not in body:
        raise GptOssError(f"a function tool needs a name, got {dict(tool)!r}")
    strict = body.get("strict")
    if strict not in (None, True, False):
        raise GptOssError(f"tool {body['name']}: strict must be true or false, got {strict!r}")
    return Tool(body["name"], body.get("description") or "", body.get("parameters"), strict is True)


def response_format_from(value: Any) -> ResponseFormat | None:
    """A ResponseFormat from a JSON schema, OpenAI's response_format dict, or a pydantic model
    class; None for none.

    OpenAI's dicts are {"type": "json_schema", "json_schema": {name, description, schema}}, {"type":
    "json_object"} and {"type": "text"}.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if hasattr(value, "model_json_schema"):
        return ResponseFormat(value.model_json_schema(), name=value.__name__)
    if not isinstance(value, Mapping):
        raise GptOssError(f"response format: expected a JSON schema (an object), got {value!r}")
    if value.get("type") == "text":
        return None
    if value.get("type") == "json_object":
        return ResponseFormat({"type": "object"})
    if value.get("type") != "json_schema":
        return ResponseFormat(value)
    body = value.get("json_schema", value)
    if not isinstance(body, Mapping) or not isinstance(body.get("schema"), Mapping):
        raise GptOssError(
            "response format of type json_schema: expected {'name', 'schema'} in it; give the "
            "schema"
        )
    return ResponseFormat(
        body["schema"], body.get("name") or "response", body.get("description") or ""
    )


_KEYS = {
    "developer": set(),
    "user": {"name"},
    "assistant": {
        "name",
        "tool_calls",
        "function_call",
        "reasoning",
        "reasoning_content",
        "thinking",
        "refusal",
    },
    "tool": {"name", "tool_call_id"},
}
_REASONING = ("reasoning", "reasoning_content", "thinking")


def from_openai(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """OpenAI-style chat messages (role system, developer, user, assistant or tool) as harmony
    messages.

    system becomes developer: a client never writes the model's system message. An assistant's
    `reasoning` (or `reasoning_content`, `thinking`) becomes analysis, its content a preamble when
    tool_calls follow and final otherwise, each tool call a commentary message to `functions.NAME`.
    A tool's name comes from `tool_call_id` or `name`. Keys with the value None count as absent;
    every other unknown key is refused by name, `channel` and `recipient` included. Raises
    GptOssError with the message's index.
    """
    out: list[Message] = []
    calls: dict[str, str] = {}  # tool_call_id -> function name
    for position, raw in enumerate(messages):
        try:
            out += _from_dict(raw, calls)
        except GptOssError as error:
            raise GptOssError(f"message {position}: {error}") from None
    return out


def _from_dict(raw: Mapping[str, Any], calls: dict[str, str]) -> list[Message]:
    if not isinstance(raw, Mapping):
        raise GptOssError(f"expected a dict with role and content, got {raw!r}")
    given = {key: value for key, value in raw.items() if value is not None}
    role = given.get("role")
    role = (
        {"system": "developer", "function": "tool"}.get(role, role)
        if isinstance(role, str)
        else role
    )
    if role not in ROLES:
        raise GptOssError(
            f"unknown role {given.get('role')!r}: use system, developer, user, assistant or tool"
        )
    unknown = sorted(given.keys() - _KEYS[role] - {"role", "content"})
    if unknown:
        raise GptOssError(
            f"key {unknown[0]!r} is not allowed in a message of role {given['role']}: "
            f"use {', '.join(sorted(_KEYS[role] | {'content'}))}"
        )
    if role == "assistant":
        return _from_assistant(given, calls)
    text = _text(given.get("content", ""))
    if role == "tool":
        function = calls.get(given.get("tool_call_id", "")) or given.get("name")
        if function is None:
            raise GptOssError(
                f"the tool result's tool_call_id {given.get('tool_call_id')!r} matches no earlier "
                "call: "
                "give the assistant message with that call, or the function's name"
            )
        return [result(str(function).removeprefix("functions."), text)]
    name = check_name(given["name"], what="author name") if "name" in given else None
    return [Message(role, text, name=name)]


def _from_assistant(given: dict[str, Any], calls: dict[str, str]) -> list[Message]:
    out: list[Message] = []
    reasoning = next((given[key] for key in _REASONING if given.get(key)), None)
    if reasoning is not None:
        out.append(analysis(_text(reasoning)))
    requested = given.get("tool_calls") or []
    if not isinstance(requested, Sequence) or isinstance(requested, str):
        raise GptOssError(f"expected tool_calls as a list, got {requested!r}")
    if "function_call" in given:
        requested = [*requested, {"function": given["function_call"]}]
    text = _text(given.get("content", "")) or _text(given.get("refusal", ""))
    if text or not (requested or out):
        out.append(preamble(text) if requested else final(text))
    for request in requested:
        body = request.get("function") if isinstance(request, Mapping) else None
        if not isinstance(body, Mapping) or "name" not in body:
            raise GptOssError(
                f"expected a tool call as {{'id', 'function': {{'name', 'arguments'}}}}, got "
                f"{request!r}"
            )
        out.append(call(body["name"], body.get("arguments") or "{}"))
        if request.get("id") is not None:
            calls[request["id"]] = body["name"]
    return out


def _text(content: Any) -> str:
    """The text of `content`: a string, or a list of text parts, joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else None
            if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(
                part, Mapping
            ):
                raise GptOssError(
                    f"content part of type {kind!r} is not supported: gpt-oss reads text only"
                )
            text = part.get("text", part.get("refusal"))
            if not isinstance(text, str):
                raise GptOssError(f"expected text in a content part, got {part!r}")
            parts.append(text)
        return "".join(parts)
    raise GptOssError(
        f"expected content as text or a list of text parts, got {type(content).__name__}"
    )
