"""What a message header says, well-formed or not: role, channel, recipient, content type, and text
that is none of them.

Works on the header's text, already cut at its control tokens. Knows the spellings that gpt-oss is
seen to produce. Refuses to know token ids and where the header stood in the stream.
"""

import dataclasses
import re
from collections.abc import Collection, Sequence

from gptoss_jax.chat.messages import CHANNELS

ROLES = ("assistant", "user", "system", "developer", "tool")
BUILTIN = ("python", "browser", "container")
_NOBODY = ("", "assistant", "user", "all", *CHANNELS)
_TO = re.compile(r"\s*\bto=\s*([A-Za-z0-9_./:-]*)")
_WORD = re.compile(r"\s*([A-Za-z_]+)")
_TYPE = re.compile(r"\s*(json|code)(?=\s*[\[{]|\s*$)\s*")
_THOUGHT = ("analy", "think", "thought", "reason")


@dataclasses.dataclass(frozen=True)
class Header:
    """A header read: `text` is what fits nowhere (the content, if `<|message|>` never comes);
    `repairs` says what was odd."""

    channel: str
    recipient: str | None
    content_type: str | None
    text: str
    foreign: bool
    repairs: tuple[str, ...]


def read_header(
    role: str,
    channels: Sequence[str],
    constrain: str | None,
    functions: Collection[str],
    first: bool,
) -> Header:
    """Reads the text before `<|channel|>`, the texts after each `<|channel|>`, and the text after
    `<|constrain|>`.

    `first` says that the prompt has already given the role; `functions` are the names that a bare
    recipient may mean.
    """
    repairs = []
    word, address = _take_recipient(without_role(role))
    name, text = None, word if not channels and constrain is None else ""
    kind = None
    for part in channels:
        rest, to = _take_recipient(part)
        address = to or address
        found = _WORD.match(rest)
        name = found[1] if found else name
        text = rest[found.end() :] if found else rest
    if len(channels) > 1:
        repairs.append("repeated channel")
    if shape := _TYPE.match(text):
        kind, text = shape[1], text[shape.end() :]
    if constrain is not None:
        rest, to = _take_recipient(constrain)
        address = to or address
        found = _WORD.match(rest)
        kind = f"<|constrain|>{found[1]}" if found else kind
        text += rest[found.end() :] if found else rest
    word = word.strip()
    if name is None and word in CHANNELS:
        name, text = word, ""
        repairs.append("channel without marker")
    foreign = not first and (
        word in ROLES[1:] or (address == "assistant" and bool(word) and word not in ROLES)
    )
    if address is None and not foreign and (word.startswith("functions.") or word in functions):
        named = re.match(r"[A-Za-z0-9_.\-]+", word)  # what a header may hold
        address = named[0] if named and word not in functions else word
        repairs.append("recipient without to=")
    recipient = _recipient(address, functions)
    if address is not None and recipient != address:
        repairs.append("recipient")
    channel = _channel(name, recipient)
    if channel != name:
        repairs.append("channel")
    return Header(channel, recipient, kind, text, foreign, tuple(repairs))


def without_role(text: str) -> str:
    """The text before the first marker, without the role that it may repeat."""
    return text.strip().removeprefix("assistant")


def is_prose(role: str) -> bool:
    """Is the text before the first marker an answer rather than a role: two words or more besides
    `to=`?"""
    return len(_TO.sub(" ", without_role(role)).split()) > 1


def has_recipient(role: str) -> bool:
    return _TO.search(role) is not None


def _take_recipient(text: str) -> tuple[str, str | None]:
    """The text without its (last) `to=NAME`, and NAME."""
    found = list(_TO.finditer(text))
    return _TO.sub("", text), found[-1][1] if found else None


def _recipient(address: str | None, functions: Collection[str]) -> str | None:
    """`functions.NAME` for every spelling of a function, a built-in tool's name as it is, None for
    nobody."""
    if address is None:
        return None
    name = re.sub("[:/]", ".", address).strip(".")
    if name in functions:
        return f"functions.{name}"
    if name in _NOBODY:
        return None
    if name.split(".")[0] in BUILTIN:
        return name
    while (head := re.match(r"(functions?|tools?)\.+(?=.)", name)) is not None:
        name = name[head.end() :]
    return f"functions.{name}"


def _channel(name: str | None, recipient: str | None) -> str:
    known = (name or "").lower()
    if recipient is not None and recipient.startswith("functions."):
        return "commentary"
    if recipient is not None:
        return "commentary" if known.startswith("comment") else "analysis"
    if known.startswith("comment"):
        return "commentary"
    if known.startswith(_THOUGHT):
        return "analysis"
    return "final"  # no channel or an unknown one: an answer
