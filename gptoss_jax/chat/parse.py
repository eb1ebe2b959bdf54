"""The assistant's token ids -> messages, as they come. Tolerant: every sequence of ids has an
outcome, none raises.

Knows harmony's control tokens and what gpt-oss is seen to do with them when it errs. Refuses to
know whether a tool exists or its arguments are valid, and never reads control tokens out of text.

Well-formed output gives exactly the messages that openai-harmony's parser gives (but for one
defect there: it takes ` <|constrain|>json` of a message without recipient for a recipient). For
the rest (S E R C stand for `<|start|>`, `<|end|>`, `<|return|>`, `<|call|>`):

    output                                outcome
    ------------------------------------  -------------------------------------------------------
    final message, E R                    the message; the stop after it adds nothing
    E E                                   the second E is ignored
    S S                                   one S
    stray text between E and S            dropped
    stray text between E and the stop     the final message, if there is none yet; else dropped
    <|channel|> right after E             a new message, as if S and `assistant` were there
    S or <|channel|> inside content       the message ends there and a new one begins
    other control tokens inside content   dropped
    <|channel|><|message|>                final
    no <|channel|>                        final
    unknown channel                       comment... is commentary; analy..., think..., thought...,
                                          reason... are analysis; everything else is final
    channel name, then junk               the junk is dropped (`commentary?`)
    <|channel|>final TEXT R               TEXT is the content; so on every channel, and with E
    TEXT R, TEXT E (a bare refusal)       TEXT is a final message; two words or more also when
                                          <|channel|> or <|message|> follows
    S assistantfinal<|message|>           final, as if <|channel|> were there
    two <|channel|> in one header         the last name counts; a recipient in either
    to=assistant, user, all, a channel    no recipient
    to=NAME in the role or channel part   the same
    to=NAME, function.NAME, tool.NAME,    functions.NAME; python, browser.*, container.* are
      functions.functions.NAME            built-in tools and stay, unless NAME is one of ours
    functions.NAME<|channel|>...          to=functions.NAME
    call on analysis, final, nowhere      commentary for functions.*; analysis for built-in tools
    <|constrain|>json, spaced or not      content type <|constrain|>json
    json, code as a word in the header    content type json, code; the content is not looked at
    call that ends with E or R            still a call
    call without <|message|>              with C a call with empty arguments; with E or R dropped
    another role (S user, or              dropped whole: the assistant speaks for itself only
      S functions.NAME to=assistant)
    R, C or <|endoftext|> in a header     as E there, and stop
    ends on <|endoftext|>                 as R; stop is <|endoftext|>
    ends without stop                     the open message ends incomplete; a header is dropped
    header above 256 characters           it is text: content from there on
    character split over tokens           comes with its last token; never finished: U+FFFD
    ids after the stop or out of range    ignored

`Parser.repairs` names what was mended, in order; it is empty for well-formed output.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence

from gptoss_jax.chat.header import Header, has_recipient, is_prose, read_header, without_role
from gptoss_jax.chat.messages import CHANNELS, Message
from gptoss_jax.tokenizer import Tokenizer

LONGEST_HEADER = 256  # characters; the longest good one has a recipient of 64 and a content type
STOPS = ("<|return|>", "<|call|>", "<|endoftext|>")
_PLAIN_ROLES = ("", "assistant", "user", "system", "developer", "tool", *CHANNELS)


@dataclasses.dataclass(frozen=True)
class MessageStart:
    """A message begins: its header is complete."""

    channel: str
    recipient: str | None
    content_type: str | None


@dataclasses.dataclass(frozen=True)
class Delta:
    """New text of the open message; the deltas of a message add up to its content."""

    channel: str
    recipient: str | None
    text: str


@dataclasses.dataclass(frozen=True)
class MessageEnd:
    """The open message ends; `complete` is False when the generation ended before it did."""

    message: Message
    complete: bool


@dataclasses.dataclass(frozen=True)
class Stop:
    """The completion ends; `token` is `<|return|>`, `<|call|>` or `<|endoftext|>`, None when none
    came."""

    token: str | None


Event = MessageStart | Delta | MessageEnd | Stop


class Parser:
    """Reads the completion of a prompt that ends with `<|start|>assistant`, token by token.

    `feed(id)` and finally `close()` return events; `messages`, `stop` and `repairs` hold what was
    read so far, `channel` and `recipient` belong to the open message (None in a header).
    `functions` are the names of the tools on offer, without `functions.`: they decide only what a
    bare recipient means.
    """

    def __init__(self, tokenizer: Tokenizer, functions: Collection[str] = ()):
        self.messages: list[Message] = []
        self.repairs: list[str] = []
        self.stop: str | None = None
        self.channel: str | None = None
        self.recipient: str | None = None
        self.done = False
        self._functions = frozenset(functions)
        self._names = {token: name for name, token in tokenizer.special.items()}
        self._size = tokenizer.vocab_size
        self._decoder = tokenizer.decoder()
        self._header: Header | None = None  # of the open message
        self._content: list[str] = []
        self._first = True  # the prompt has given the role
        self._started = True  # a `<|start|>` came (or is in the prompt) for the header being read
        self._role, self._channels, self._constrain = "", [], None

    def feed(self, token: int) -> list[Event]:
        """Takes the next id and returns what it completes."""
        if self.done:
            if self.repairs[-1:] != ["token after the stop"]:
                self.repairs.append("token after the stop")
            return []
        if not 0 <= token < self._size:
            self.repairs.append("not a token")
            return []
        name = self._names.get(token)
        if name in STOPS:
            return self._finish(name)
        if self._header is not None:
            return self._in_content(token, name)
        return self._in_header(token, name)

    def close(self) -> list[Event]:
        """The generation has ended: closes what is open. Nothing to do after a stop token."""
        return [] if self.done else self._finish(None)

    def _in_content(self, token: int, name: str | None) -> list[Event]:
        if name is None:
            return self._text(self._decoder.feed(token))
        if name == "<|end|>":
            return self._end(complete=True, started=False)
        if name in ("<|start|>", "<|channel|>"):
            self.repairs.append(f"{name} inside content")
            events = self._end(complete=True, started=name == "<|start|>")
            if name == "<|channel|>":
                self._channels = [""]
            return events
        self.repairs.append(f"{name} inside content")
        return []

    def _in_header(self, token: int, name: str | None) -> list[Event]:
        if name is None:
            self._extend(self._decoder.feed(token))
            return self._overflow()
        self._extend(self._decoder.flush())
        if name == "<|message|>":
            return self._open()
        if name == "<|channel|>":
            events = self._prose()
            self._channels.append("")
            return events
        if name == "<|constrain|>":
            if self._constrain is not None:
                self.repairs.append("repeated <|constrain|>")
            self._constrain = self._constrain or ""
            return []
        if name == "<|start|>":
            if self._started or self._blank_since_end():
                events = self._unopened(name)
            else:
                self.repairs.append("stray text")
                events = []
            if self._started:
                self.repairs.append("repeated <|start|>")
            self._reset(started=True)
            return events
        if name == "<|end|>":
            if self._blank_since_end():
                self.repairs.append("repeated <|end|>")
            events = self._unopened(name)
            self._reset(started=False)
            return events
        self.repairs.append(f"{name} in a header")
        return []

    def _extend(self, text: str) -> None:
        if self._constrain is not None:
            self._constrain += text
        elif self._channels:
            self._channels[-1] += text
        else:
            self._role += text

    def _blank_since_end(self) -> bool:
        """Nothing but space since `<|end|>`?"""
        return not (
            self._started or self._channels or self._constrain is not None or self._role.strip()
        )

    def _read(self) -> Header:
        return read_header(
            self._role, self._channels, self._constrain, self._functions, self._first
        )

    def _prose(self) -> list[Event]:
        """Text before a marker that is no role: an answer without header (after `<|start|>`), or
        stray."""
        if not is_prose(self._role):
            return []
        text, self._role = without_role(self._role), ""
        if not self._started:
            self.repairs.append("stray text")
            return []
        self.repairs.append("text without header")
        return self._whole(Header("final", None, None, "", False, ()), text.strip(), complete=True)

    def _open(self) -> list[Event]:
        """`<|message|>`: the header is complete."""
        events = self._prose()
        header = self._read()
        self.repairs += () if header.foreign else header.repairs
        if header.text.strip():
            self.repairs.append("text in a header")
        if not self._started:
            self.repairs.append("missing <|start|>")
        return events + self._begin(header)

    def _overflow(self) -> list[Event]:
        """A header that does not end is text."""
        length = len(self._role) + sum(map(len, self._channels)) + len(self._constrain or "")
        if length <= LONGEST_HEADER:
            return []
        if not self._started and not self._channels and self._answered():
            self._role = self._role[
                :1
            ]  # stray text after the answer: forget it, remember that it is there
            return []
        self.repairs.append("header too long")
        header = self._read()
        text = (
            header.text
            if self._channels or self._constrain is not None
            else without_role(self._role)
        )
        return self._begin(header) + self._text(text.lstrip())

    def _unopened(self, stop: str | None) -> list[Event]:
        """The header ends without `<|message|>`: its text, if any, is the content."""
        marked = bool(self._channels) or self._constrain is not None
        header = self._read()
        text = (header.text if marked else without_role(self._role)).strip()
        if not marked and (text in _PLAIN_ROLES or has_recipient(self._role)):
            text = ""
        call = stop == "<|call|>" and header.recipient is not None
        if marked or text or call:
            self.repairs.append(
                "header without <|message|>" if marked or call else "text without header"
            )
        if header.foreign or not (text or call):
            return []
        return self._whole(header, text, complete=stop is not None)

    def _finish(self, stop: str | None) -> list[Event]:
        if self._header is not None:
            events = self._end(complete=stop is not None, started=False)
        elif self._blank_since_end():
            # openai-harmony's parser refuses `<|end|>` and then a stop
            self.repairs += ["stop after <|end|>"] if stop is not None else []
            events = []
        else:
            self._extend(self._decoder.flush())
            stray = not self._started and not self._channels and self._constrain is None
            if stray and self._answered():
                self.repairs.append("stray text")
                events = []
            else:
                if stop is not None:
                    self.repairs.append(f"{stop} in a header")
                events = self._unopened(stop)
        self.done, self.stop = True, stop
        return [*events, Stop(stop)]

    def _answered(self) -> bool:
        return any(message.channel == "final" for message in self.messages)

    def _begin(self, header: Header) -> list[Event]:
        self._header, self._content = header, []
        if header.foreign:
            self.repairs.append("message of another role")
            return []
        self.channel, self.recipient = header.channel, header.recipient
        return [MessageStart(header.channel, header.recipient, header.content_type)]

    def _text(self, text: str) -> list[Event]:
        header = self._header
        if not text or header is None or header.foreign:
            return []
        self._content.append(text)
        return [Delta(header.channel, header.recipient, text)]

    def _end(self, complete: bool, started: bool) -> list[Event]:
        header = self._header
        assert header is not None
        events = self._text(self._decoder.flush())
        if not header.foreign:
            message = Message(
                "assistant",
                "".join(self._content),
                channel=header.channel,
                recipient=header.recipient,
                content_type=header.content_type,
            )
            self.messages.append(message)
            events.append(MessageEnd(message, complete))
        self._header, self.channel, self.recipient = None, None, None
        self._reset(started)
        return events

    def _whole(self, header: Header, text: str, complete: bool) -> list[Event]:
        """A message that is known at once; the header being read goes on."""
        state = (self._first, self._started, self._role, self._channels, self._constrain)
        events = self._begin(header) + self._text(text) + self._end(complete, started=False)
        self._first, self._started, self._role, self._channels, self._constrain = state
        return events

    def _reset(self, started: bool) -> None:
        self._first, self._started = False, started
        self._role, self._channels, self._constrain = "", [], None


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A whole completion: its messages, its stop token (None if it was cut), what had to be
    mended."""

    messages: list[Message]
    stop: str | None
    repairs: list[str]


def parse(ids: Iterable[int], tokenizer: Tokenizer, functions: Collection[str] = ()) -> Parsed:
    """Parses the ids that follow a prompt's `<|start|>assistant`. Never raises; see the module's
    table."""
    parser = Parser(tokenizer, functions)
    for token in ids:
        parser.feed(int(token))
    parser.close()
    return Parsed(parser.messages, parser.stop, parser.repairs)


_LETTERS = {
    "<|channel|>": "H",
    "<|constrain|>": "K",
    "<|message|>": "M",
    "<|start|>": "S",
    "<|end|>": "E",
    "<|return|>": "R",
    "<|call|>": "C",
}
# role text, channel, content type, content; only the last message ends with a stop
_GOOD = re.compile(r"t*Ht+(?:Kt+)?Mt*(?:ESt+Ht+(?:Kt+)?Mt*)*[RC]")


def well_formed(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Is this completion of `<|start|>assistant`, stop token included, harmony without a fault?

    The control tokens stand in their order, openai-harmony's strict parser accepts it, every
    message is the assistant's, on a known channel and valid UTF-8, functions are called on
    commentary, and it ends with a call and `<|call|>` or with a `final` message and `<|return|>`.
    """
    from gptoss_jax.chat.render import harmony

    if not all(0 <= token < tokenizer.vocab_size for token in ids):
        return False
    names = {token: name for name, token in tokenizer.special.items()}
    letters = "".join(_LETTERS.get(names[token], "x") if token in names else "t" for token in ids)
    if not _GOOD.fullmatch(letters):
        return False
    from openai_harmony import HarmonyError, Role

    try:
        tokenizer.decode_bytes(ids).decode("utf-8")
        parsed = harmony().parse_messages_from_completion_tokens(
            tokenizer.to_harmony(ids), Role.ASSISTANT
        )
    except (HarmonyError, UnicodeDecodeError):
        return False
    ours = parse(ids, tokenizer)
    if ours.repairs or len(ours.messages) != len(parsed):
        return False
    for message in parsed:
        if message.author.role != Role.ASSISTANT or message.channel not in CHANNELS:
            return False
    last = ours.messages[-1]
    calls = [message.recipient is not None for message in ours.messages]
    if letters[-1] == "C":
        return sum(calls) == 1 and calls[-1]
    return not any(calls) and last.channel == "final"
