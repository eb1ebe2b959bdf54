"""Rows -> conversations: which columns and keys mean what, in the forms that data sets come in.

Knows OpenAI's messages and their aliases, ShareGPT, the columns of HuggingFaceH4's
Multilingual-Thinking, prompt and completion, plain text. Refuses to know tokens and files.

    messages            role (system, developer, user, assistant, tool) and content; the
                        assistant's `thinking` (or reasoning, reasoning_content) and `tool_calls`;
                        `weight` or `train`
    conversations       ShareGPT: from, value (or role, content); a `system` column
    prompt, completion  strings (a user's message and its answer) or lists of messages; only the
                        completion is learnt
    user, final         with developer, reasoning_language, analysis
    text                a document: all of it is learnt

The first form that is there counts, in this order; other columns are ignored, except `tools`,
`reasoning_effort`, `chat_template_kwargs` and `response_format`, which are this row's own.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.chat.messages import (
    ChatSettings,
    Message,
    from_openai,
    response_format_from,
    tool_from_openai,
)
from gptoss_jax.errors import GptOssError

_SHAREGPT = {
    "system": "system", "developer": "developer", "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "function_call",
}  # fmt: skip
_WEIGHTS = ("weight", "loss_weight", "train")
_KWARGS = ("reasoning_effort", "model_identity", "builtin_tools")
_CONTROL = ("<|start|>", "<|channel|>")
_TEXT = r"((?:(?!<\|(?:start|channel|message|end|return|call|constrain)\|>)[\s\S])*)"
_RAW = re.compile(
    r"\s*(?:<\|start\|>assistant)?"
    rf"(?:<\|channel\|>analysis<\|message\|>{_TEXT}<\|end\|>\s*<\|start\|>assistant)?"
    rf"<\|channel\|>final<\|message\|>{_TEXT}(?:<\|return\|>|<\|end\|>)?\s*"
)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row that is a conversation: messages, the loss weight of each, what the system message
    says."""

    messages: list[Message]
    weights: list[float]
    settings: ChatSettings


def conversation_from(row: Mapping[str, Any], defaults: ChatSettings) -> Conversation | str:
    """The conversation that a row holds, or its text if it is a plain document.

    Args:
      row: Columns; None counts as absent, in messages too.
      defaults: Date, effort and identity where the row has none of its own; instructions that come
        before the row's.

    Returns:
      Messages with their weights: 1 unless `weight`, `loss_weight` or `train` say otherwise, 0 for
      the prompt of a prompt and completion, and for everybody but the assistant. A tool result
      without id and name answers the earliest call that waits for one. An assistant's content that
      is written as raw `<|channel|>analysis<|message|>...` (ms-swift's way) is taken apart.

    Raises:
      GptOssError: no form that is known, an unknown role, no assistant message, arguments of a call
        that are no JSON object, control text that cannot be taken apart, a weight that is no
        number, a builtin tool.
    """
    row = {key: value for key, value in row.items() if value is not None}
    learnt_from = 0
    if "messages" in row:
        raw = _messages(row["messages"], "messages")
    elif "conversations" in row:
        raw = _sharegpt(row)
    elif "prompt" in row and "completion" in row:
        prompt = _either(row["prompt"], "prompt", "user")
        raw = [*prompt, *_either(row["completion"], "completion", "assistant")]
        learnt_from = len(prompt)
    elif "user" in row and "final" in row:
        raw = _columns(row)
    elif "text" in row:
        return _document(row["text"])
    else:
        raise GptOssError(
            f"no conversation in the columns {', '.join(map(repr, row)) or '(none)'}: expected "
            "messages, conversations, prompt and completion, user and final, or text"
        )
    messages, weights = _convert(raw, learnt_from)
    if not any(message.role == "assistant" for message in messages):
        raise GptOssError("no assistant message: there is nothing to learn")
    return Conversation(messages, weights, _settings(row, defaults))


def _convert(raw: list[Any], learnt_from: int) -> tuple[list[Message], list[float]]:
    """Harmony messages of OpenAI's, and the weight of each."""
    plain: list[Mapping[str, Any]] = []
    shares: list[float] = []
    counts: list[int] = []
    waiting: list[tuple[Any, str]] = []  # calls without a result yet: id, function
    for number, message in enumerate(raw):
        try:
            clean, share = _clean(message, waiting)
            # only an assistant's dict becomes several messages, whatever came before it
            several = clean.get("role") == "assistant"
            counts.append(len(from_openai([clean])) if several else 1)
        except GptOssError as error:
            text = str(error).removeprefix("message 0: ")
            raise GptOssError(f"message {number}: {text}") from None
        plain.append(clean)
        shares.append(share if number >= learnt_from else 0.0)
    messages = from_openai(plain)
    return messages, [share for share, n in zip(shares, counts, strict=True) for _ in range(n)]


def _clean(message: Any, waiting: list[tuple[Any, str]]) -> tuple[dict[str, Any], float]:
    """A message as from_openai takes it, and its weight."""
    if not isinstance(message, Mapping):
        raise GptOssError(f"expected a dict with role and content, got {message!r}")
    out = {key: value for key, value in message.items() if value is not None}
    role = out.get("role")
    given = {key: out.pop(key) for key in _WEIGHTS if key in out}
    share = _weight(given, role)
    if role == "user":
        waiting.clear()
    if role == "assistant":
        if out.get("tool_calls"):
            out["tool_calls"] = [_call(call) for call in _list(out["tool_calls"], "tool_calls")]
            for call in out["tool_calls"]:
                waiting.append((call.get("id"), call["function"]["name"]))
        elif not out.get("tool_calls", True):
            del out["tool_calls"]
        _take_apart(out)
    elif role == "tool":
        if isinstance(out.get("content"), Mapping):
            out["content"] = json.dumps(out["content"], ensure_ascii=False)
        if "tool_call_id" in out:
            out["tool_call_id"] = str(out["tool_call_id"])
        _name_result(out, waiting)
    else:  # keys that a table of messages has for everybody
        for key in ("tool_calls", "thinking", "reasoning", "reasoning_content"):
            if key in out and not out[key]:
                del out[key]
    return out, share


def _name_result(result: dict[str, Any], waiting: list[tuple[Any, str]]) -> None:
    """Takes the answered call off `waiting`, and gives a nameless result its function's name."""
    key, name = result.get("tool_call_id"), result.get("name")
    if isinstance(name, str):
        name = name.removeprefix("functions.")
    for position, (call, function) in enumerate(waiting):
        nameless = key is None and name is None
        if nameless or (key is not None and key == call) or (key is None and name == function):
            result.setdefault("name", function)
            del waiting[position]
            return
    if name is None and key is None:
        raise GptOssError(
            "the tool result has no name and no tool_call_id, and no call waits for it: give the "
            "function's name"
        )


def _call(call: Any) -> dict[str, Any]:
    """A tool call in OpenAI's nested form, its arguments checked."""
    call = {k: v for k, v in call.items() if v is not None} if isinstance(call, Mapping) else call
    body = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(body, Mapping) or "name" not in body:
        raise GptOssError(
            "expected a tool call as {'function': {'name', 'arguments'}} or {'name', 'arguments'}, "
            f"got {call!r}"
        )
    arguments = body.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        try:
            known = isinstance(json.loads(arguments), dict)
        except (ValueError, RecursionError):
            known = False
    else:
        known = isinstance(arguments, Mapping)
    if not known:
        raise GptOssError(
            f"the arguments of {body['name']} are not a JSON object: {arguments!r}; give an object "
            "or its JSON text"
        )
    named = {"function": {"name": body["name"], "arguments": arguments}}
    return {**named, "id": str(call["id"])} if "id" in call else named


def _take_apart(message: dict[str, Any]) -> None:
    """Raw harmony in an assistant's content becomes reasoning and answer, where that is certain."""
    content = message.get("content")
    if not isinstance(content, str) or not content.lstrip().startswith(_CONTROL):
        return
    found = _RAW.fullmatch(content)
    reasoned = any(message.get(k) for k in ("thinking", "reasoning", "reasoning_content"))
    if found is None or reasoned or message.get("tool_calls"):
        raise GptOssError(
            f"content begins with harmony's control text ({content.strip()[:40]!r}): give the "
            "reasoning as thinking, the answer as content, calls as tool_calls"
        )
    if found[1]:
        message["thinking"] = found[1]
    message["content"] = found[2]


def _weight(given: Mapping[str, Any], role: Any) -> float:
    values = []
    for key, value in given.items():
        number = isinstance(value, bool | int | float) and math.isfinite(value)
        if not number or value < 0:
            raise GptOssError(f"{key} is {value!r}: expected 0, 1 or a positive number")
        values.append(float(value))
    if len(set(values)) > 1:
        raise GptOssError(f"{' and '.join(given)} disagree: keep one of them")
    if role == "assistant":
        return values[0] if values else 1.0
    if values and values[0]:
        raise GptOssError(
            f"{next(iter(given))} is {values[0]:g} in a message of role {role!r}: only what the "
            "assistant says is learnt; leave it out or give 0"
        )
    return 0.0


def _sharegpt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    if row.get("system"):
        out.append({"role": "system", "content": row["system"]})
    for number, turn in enumerate(_messages(row["conversations"], "conversations")):
        turn = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, Mapping) else {}
        if "role" in turn:
            out.append(turn)
            continue
        role = _SHAREGPT.get(str(turn.get("from")))
        if role is None or "value" not in turn:
            raise GptOssError(
                f"conversations, turn {number}: unknown role {turn.get('from')!r} or no value: use "
                f"from ({', '.join(_SHAREGPT)}) and value"
            )
        kept = {key: turn[key] for key in _WEIGHTS if key in turn}
        if role == "function_call":
            calls = _decoded(turn["value"], f"conversations, turn {number}: function_call")
            calls = calls if isinstance(calls, list) else [calls]
            out.append({"role": "assistant", "tool_calls": calls, **kept})
        else:
            out.append({"role": role, "content": turn["value"], **kept})
    return out


def _columns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """HuggingFaceH4/Multilingual-Thinking's columns, with its own way of naming the language."""
    language = row.get("reasoning_language")
    parts = [f"reasoning language: {language}" if language else "", row.get("developer") or ""]
    system = "\n\n".join(part for part in parts if part)
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": row["user"]},
        {"role": "assistant", "thinking": row.get("analysis"), "content": row["final"]},
    ]


def _document(text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise GptOssError(f"text is {text!r}: expected a document that is not empty")
    if text.lstrip().startswith(_CONTROL):
        raise GptOssError(
            "text is a conversation that is rendered already: give messages, so that what the "
            "assistant says can be told from the rest"
        )
    return text


def _settings(row: Mapping[str, Any], defaults: ChatSettings) -> ChatSettings:
    """The defaults with what the row says itself."""
    kwargs = _decoded(row.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(kwargs, Mapping):
        raise GptOssError(f"chat_template_kwargs: expected an object, got {kwargs!r}")
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if unknown := sorted(kwargs.keys() - set(_KWARGS)):
        raise GptOssError(
            f"chat_template_kwargs: {unknown[0]!r} is not known: use {', '.join(_KWARGS)}"
        )
    if kwargs.get("builtin_tools"):
        raise GptOssError(
            f"builtin_tools {kwargs['builtin_tools']!r} are not supported: describe them in tools, "
            "or leave the row out"
        )
    efforts = {
        str(value).lower()
        for value in (row.get("reasoning_effort"), kwargs.get("reasoning_effort"))
        if value is not None
    }
    if len(efforts) > 1:
        raise GptOssError("reasoning_effort is given twice and differs: keep one")
    own: dict[str, Any] = {}
    if efforts:
        own["reasoning_effort"] = efforts.pop()
    if "model_identity" in kwargs:
        own["identity"] = str(kwargs["model_identity"])
    if row.get("tools"):
        tools = _list(_decoded(row["tools"], "tools"), "tools")
        own["tools"] = tuple(
            tool_from_openai({k: v for k, v in t.items() if v is not None})
            if isinstance(t, Mapping)
            else tool_from_openai(t)
            for t in tools
        )
    if row.get("response_format"):
        own["response_format"] = response_format_from(
            _decoded(row["response_format"], "response_format")
        )
    return dataclasses.replace(defaults, **own)


def _either(value: Any, name: str, role: str) -> list[Any]:
    """A string as one message of a role, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value, name)


def _messages(value: Any, name: str) -> list[Any]:
    found = _list(_decoded(value, name), name)
    if not found:
        raise GptOssError(f"{name} is empty: expected a list of messages")
    return found


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise GptOssError(f"expected {name} as a list, got {value!r}")
    return list(value)


def _decoded(value: Any, name: str) -> Any:
    """A value, or what its JSON text says: tables often keep nested columns as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise GptOssError(f"{name} is text that is not JSON: {value[:60]!r}") from None
