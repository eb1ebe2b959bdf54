"""Items of the Responses API: what clients send, how it is stored, and the messages it means.

Knows the shapes of items. Refuses to know responses, the store and HTTP. Items of clients are
brought into the shapes that the API shows; messages are made of these alone, so that a conversation
is the same whether it is sent as a whole or continued from stored responses.
"""

import base64
import secrets
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from gptoss_jax.chat.messages import Message, analysis, call, final, preamble, result
from gptoss_jax.errors import GptOssError
from gptoss_jax.server.errors import bad, of_faults
from gptoss_jax.server.responses_models import (
    ITEMS,
    CallItem,
    Item,
    MessageItem,
    OutputItem,
    ReasoningItem,
    ReferenceItem,
    Refusal,
    TextPart,
)

SEALED = "gptoss1."  # begins what encrypted_content holds here
LONGEST_REASONING = 4_000_000  # bytes


def new_id(prefix: str) -> str:
    """An id that nobody guesses."""
    return f"{prefix}_{secrets.token_hex(20)}"


def read_input(value: str | Sequence[dict[str, Any]]) -> list[Item]:
    """The items that a request's `input` holds; a string is a user's message.

    Raises ApiError with the place of the first mistake.
    """
    if isinstance(value, str):
        if not value:
            raise bad("parameter 'input' is empty: write something", "input")
        return [MessageItem(role="user", content=value)]
    return [_read(item, place) for place, item in enumerate(value)]


def _read(raw: dict[str, Any], place: int) -> Item:
    given = _without_nulls(raw)
    kind = given.get("type", "message" if "role" in given else "item_reference")
    model = ITEMS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise bad(
            f"items of type {str(kind)[:100]!r} are not supported: use {', '.join(ITEMS)}",
            f"input.{place}.type",
            "unsupported_parameter",
        )
    try:
        return model.model_validate(given)
    except ValidationError as error:
        faults = [
            {**fault, "loc": ("input", place, *fault["loc"])}
            for fault in error.errors(include_url=False)
        ]
        raise of_faults(faults, {"input": {place: raw}}) from None


def _without_nulls(raw: dict[str, Any]) -> dict[str, Any]:
    """An item without the keys that are null, in its parts too: clients send back what they got."""
    out = {key: value for key, value in raw.items() if value is not None}
    for key in ("content", "output"):
        if isinstance(out.get(key), list):
            out[key] = [
                {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part
                for part in out[key]
            ]
    return out


def resolve(
    items: Sequence[Item], known: Iterable[str], find: Callable[[str], dict[str, Any] | None]
) -> list[dict[str, Any]]:
    """The items as they are stored and shown, each with an id of its own.

    Args:
      items: What the client sent.
      known: Ids of the items that the conversation has already.
      find: The stored item of an id, or None.

    Raises ApiError for a reference to nothing, and for an item that is there already.
    """
    seen, out = set(known), []
    for place, item in enumerate(items):
        if item.id is not None:
            if item.id in seen:
                raise bad(
                    f"item {item.id[:100]!r} is in the conversation already: send it once, or "
                    "leave it out where previous_response_id brings it",
                    f"input.{place}",
                    "duplicate_item",
                )
            seen.add(item.id)
        if isinstance(item, ReferenceItem):
            found = find(item.id)
            if found is None:
                raise bad(
                    f"there is no stored item {item.id[:100]!r}: send the item itself",
                    f"input.{place}",
                    "item_not_found",
                )
            prefix = item.id.partition("_")[0]
            out.append({**found, "id": new_id(prefix)})
        else:
            out.append(_shown(item, place, find))
    return out


def _shown(item: Item, place: int, find: Callable[[str], dict[str, Any] | None]) -> dict[str, Any]:
    """A client's item in the shape in which the API lists it."""
    status = getattr(item, "status", None) or "completed"
    if isinstance(item, MessageItem):
        return _shown_message(item, status)
    if isinstance(item, CallItem):
        return {
            "type": "function_call",
            "id": new_id("fc"),
            "call_id": item.call_id,
            "name": item.name,
            "arguments": item.arguments,
            "status": status,
        }
    if isinstance(item, OutputItem):
        return {
            "type": "function_call_output",
            "id": new_id("fco"),
            "call_id": item.call_id,
            "output": item.output if isinstance(item.output, str) else _parts(item.output),
            "status": status,
        }
    assert isinstance(item, ReasoningItem)
    texts = [part.text for part in item.content or ()]
    if not texts and item.encrypted_content:
        texts = [unseal(item.encrypted_content, f"input.{place}.encrypted_content")]
    elif not texts and item.id is not None and (stored := find(item.id)) is not None:
        texts = [part["text"] for part in stored.get("content") or ()]
    elif not texts and item.summary:
        raise bad(
            "the reasoning item has a summary only, which the model cannot go on from: send its "
            "content, or leave the item out",
            f"input.{place}.content",
        )
    return reasoning_item(new_id("rs"), texts, status)


def _shown_message(item: MessageItem, status: str) -> dict[str, Any]:
    parts = item.content
    if isinstance(parts, str):
        parts = [TextPart(type="input_text", text=parts)]
    shown: dict[str, Any] = {"type": "message", "id": new_id("msg"), "role": item.role}
    if item.role != "assistant":
        return {**shown, "content": _parts(parts), "status": status}
    content = [
        {"type": "refusal", "refusal": part.refusal}
        if isinstance(part, Refusal)
        else output_text(part.text)
        for part in parts
    ]
    phase = {} if item.phase is None else {"phase": item.phase}
    return {**shown, "content": content, "status": status, **phase}


def _parts(parts: Sequence[TextPart | Refusal]) -> list[dict[str, Any]]:
    texts = [part.refusal if isinstance(part, Refusal) else part.text for part in parts]
    return [{"type": "input_text", "text": text} for text in texts]


def output_text(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """A part of an assistant's message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def reasoning_item(id: str, texts: Sequence[str], status: str) -> dict[str, Any]:
    """The model's reasoning, as an item."""
    content = [{"type": "reasoning_text", "text": text} for text in texts]
    return {"type": "reasoning", "id": id, "summary": [], "content": content, "status": status}


def to_messages(items: Sequence[dict[str, Any]], first: int = 0) -> list[Message]:
    """The conversation that shown items make.

    An assistant's message without phase is a preamble where a call follows, else an answer. A call
    that was cut (status incomplete) is no call. Every other call needs its output.

    Args:
      items: Of the whole conversation.
      first: Where the request's own begin: mistakes are counted from there.

    Raises ApiError for an output without its call, a call without output, a name that is none.
    """
    out: list[Message] = []
    names: dict[str, str] = {}  # call_id -> function
    waiting: dict[str, int] = {}
    for place, item in enumerate(items):
        where = f"input.{place - first}" if place >= first else "previous_response_id"
        try:
            if item["type"] == "message":
                out.append(_message(items, place))
            elif item["type"] == "reasoning":
                out += [analysis(part["text"]) for part in item["content"] if part["text"]]
            elif item["type"] == "function_call" and item["status"] != "incomplete":
                out.append(call(item["name"], item["arguments"]))
                names[item["call_id"]] = item["name"]
                waiting[item["call_id"]] = place
            elif item["type"] == "function_call_output":
                if item["call_id"] not in names:
                    raise bad(
                        f"there is no function_call with call_id {item['call_id'][:100]!r} before "
                        "its output: send the call, or previous_response_id",
                        f"{where}.call_id",
                    )
                out.append(result(names[item["call_id"]], _text(item["output"])))
                waiting.pop(item["call_id"], None)
        except GptOssError as error:
            raise bad(f"{where}: {error}", where) from None
    for call_id, place in waiting.items():
        raise bad(
            f"the function call {call_id[:100]!r} has no output: send an item of type "
            "function_call_output with this call_id",
            f"input.{place - first}" if place >= first else "input",
        )
    return out


def _message(items: Sequence[dict[str, Any]], place: int) -> Message:
    item = items[place]
    text = _text(item["content"])
    if item["role"] != "assistant":
        role = "developer" if item["role"] == "system" else item["role"]
        return Message(role, text)
    kinds = (items[later]["type"] for later in range(place + 1, len(items)))
    following = next((kind for kind in kinds if kind != "reasoning"), None)
    phase = item.get("phase")
    if phase == "commentary" or (phase is None and following == "function_call"):
        return preamble(text)
    return final(text)


def _text(content: str | Sequence[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", part.get("refusal", "")) for part in content)


def seal(text: str) -> str:
    """Reasoning in the form of encrypted_content, for clients that carry only this back. It is
    packed, not secret: the same text is in the item's content.
    """
    data = zlib.compress(text.encode("utf-8", "surrogatepass"))
    return SEALED + base64.urlsafe_b64encode(data).decode()


def unseal(sealed: str, where: str) -> str:
    """What `seal` has packed; ApiError for anything else."""
    try:
        if not sealed.startswith(SEALED):
            raise ValueError
        data = base64.b64decode(sealed.removeprefix(SEALED), altchars=b"-_", validate=True)
        reader = zlib.decompressobj()
        text = reader.decompress(data, LONGEST_REASONING)
        if not reader.eof:
            raise ValueError
        return text.decode("utf-8", "surrogatepass")
    except (ValueError, zlib.error):
        raise bad(
            "encrypted_content was not made by this server, or is damaged: send the reasoning's "
            "content, or leave the item out",
            where,
            "invalid_encrypted_content",
        ) from None
