"""Conversation -> token ids, by the openai-harmony library on the bundled vocabulary.

Knows harmony's message layout, which reasoning is dropped, and which tokens of a conversation the
assistant itself emits. Refuses to know generation. The library is loaded on the first use (0.35 s)
and never reaches for the network.

Around the library, ours: the filter of earlier reasoning (`drop_reasoning`), the `# Response
Formats` section, tool schemas in words that the library knows (schema.py), and pruned vocabularies.
Text of messages is always encoded as ordinary text, so nothing that a user writes becomes a control
token.
"""

import dataclasses
import datetime
import functools
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gptoss_jax.chat.messages import CONSTRAIN_JSON, ChatSettings, Message, ResponseFormat
from gptoss_jax.chat.schema import simplify
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import HARMONY_SPECIALS, VOCAB_FILE, Tokenizer

if TYPE_CHECKING:
    import openai_harmony

_MESSAGE, _END = HARMONY_SPECIALS["<|message|>"], HARMONY_SPECIALS["<|end|>"]
_RETURN, _CALL = HARMONY_SPECIALS["<|return|>"], HARMONY_SPECIALS["<|call|>"]
NEXT_TURN = (
    HARMONY_SPECIALS["<|start|>"],
    173_781,
)  # <|start|>assistant, which the model does not emit itself

_CONTENT_TYPE = re.compile(r"(<\|constrain\|>)?[A-Za-z_]+")
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a rendered conversation that belong together.

    `part` is "header" (`<|start|>` to `<|message|>`), "content" or "stop" (`<|end|>`, `<|call|>`,
    `<|return|>`). `emitted` says whether the assistant produces them itself. `message` counts the
    rendered messages, `turn` the user messages so far (1 for everything from the first user message
    to the second).
    """

    start: int
    stop: int
    role: str
    channel: str | None
    recipient: str | None
    part: str
    emitted: bool
    message: int
    turn: int


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation for training: token ids and the segments that tile them."""

    ids: list[int]
    segments: list[Segment]

    @property
    def emitted(self) -> list[bool]:
        """Per token: does the assistant emit it (so: is there a loss on it)?"""
        return [
            segment.emitted for segment in self.segments for _ in range(segment.start, segment.stop)
        ]

    @property
    def channels(self) -> list[str | None]:
        """Per token: the channel of its message (None outside the assistant's and tools'
        messages)."""
        return [
            segment.channel for segment in self.segments for _ in range(segment.start, segment.stop)
        ]


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, settings: ChatSettings | None = None
) -> list[int]:
    """The prompt for the assistant's next message: system, developer and the conversation, then
    `<|start|>assistant`.

    Reasoning of earlier turns is dropped, that of an unfinished tool loop is kept
    (`drop_reasoning`). Earlier answers end with `<|end|>`. Returns ids of `tokenizer`. Raises
    GptOssError for a role that clients do not have. Source: the harmony format (openai/harmony,
    docs/format.md).
    """
    ids: list[int] = []
    for _, tokens in _rendered(drop_reasoning(messages), settings or ChatSettings()):
        ids += _translate(tokens, tokenizer)
    return ids + tokenizer.from_harmony(NEXT_TURN)


def render_training(
    messages: Sequence[Message], tokenizer: Tokenizer, settings: ChatSettings | None = None
) -> Rendered:
    """The whole conversation with the tokens that the assistant emits marked.

    Of a run of assistant messages everything is emitted except the first `<|start|>assistant` (the
    prompt ends with it; after `<|call|>` too): recipients, channels, contents, later headers, stop
    tokens. The last answer ends with `<|return|>`, a call with `<|call|>`; an earlier answer ends
    with the `<|end|>` of history, which is not emitted. The reasoning of the last turn is kept,
    that of earlier turns dropped, so what is emitted in earlier turns lacks its reasoning: train on
    the last turn (`Segment.turn`) and expand a long conversation into one sample a turn.
    """
    kept = drop_reasoning(messages, training=True)
    ids: list[int] = []
    segments: list[Segment] = []

    def add(tokens: Sequence[int], part: str, emitted: bool) -> None:
        start = len(ids)
        ids.extend(tokenizer.from_harmony(tokens))
        if len(ids) > start:
            where = (message.role, message.channel, message.recipient)
            segments.append(Segment(start, len(ids), *where, part, emitted, number, turn))

    turn, previous = 0, None
    rendered = list(_rendered(kept, settings or ChatSettings()))
    for number, (message, tokens) in enumerate(rendered):
        turn += message.role == "user"
        assistant = message.role == "assistant"
        last = number == len(rendered) - 1
        answer = assistant and message.channel == "final" and message.recipient is None
        stop = _RETURN if answer and last else tokens[-1]
        following = None if last else rendered[number + 1][0].role
        body = tokens.index(_MESSAGE) + 1
        begin = 0
        if assistant and previous != _END:
            add(tokens[:2], "header", False)
            begin = 2
        add(tokens[begin:body], "header", assistant)
        add(tokens[body:-1], "content", assistant)
        add([stop], "stop", assistant and not (answer and following not in (None, "assistant")))
        previous = stop if assistant else None
    return Rendered(ids, segments)


def drop_reasoning(messages: Sequence[Message], training: bool = False) -> list[Message]:
    """The messages that the model sees again: without the reasoning before the last answer of a
    finished turn.

    A turn is finished when an assistant's `final` message is followed by a user message, or (not in
    training, where it is the target) ends the conversation. Only analysis without a recipient goes:
    calls, results and preambles stay. Later analysis stays too, since a tool loop without an answer
    needs it. Source: OpenAI cookbook, "Handling the raw chain of thought in gpt-oss".
    """
    cut = 0
    answered = None
    for position, message in enumerate(messages):
        if message.role == "assistant" and message.channel == "final" and message.recipient is None:
            answered = position
        elif message.role == "user" and answered is not None:
            cut = answered
        elif message.role == "tool":
            answered = None
    if not training and messages and answered == len(messages) - 1:
        cut = len(messages) - 1
    return [m for position, m in enumerate(messages) if position >= cut or not _is_reasoning(m)]


def _is_reasoning(message: Message) -> bool:
    return (
        message.role == "assistant" and message.channel == "analysis" and message.recipient is None
    )


@functools.cache
def _load_harmony() -> "openai_harmony.HarmonyEncoding":
    import openai_harmony

    name = "TIKTOKEN_ENCODINGS_BASE"  # the only way to tell the library where its vocabulary lies
    before = os.environ.get(name)
    os.environ[name] = str(VOCAB_FILE.parent)
    try:
        return openai_harmony.load_harmony_encoding(
            openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS
        )
    except openai_harmony.HarmonyError as error:
        raise GptOssError(
            f"openai-harmony cannot load the vocabulary {VOCAB_FILE}: {error}"
        ) from None
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def harmony() -> "openai_harmony.HarmonyEncoding":
    """openai-harmony's encoding of gpt-oss from the bundled vocabulary, loaded once; the
    environment is left as it was."""
    with _lock:
        return _load_harmony()


def _rendered(
    messages: Sequence[Message], settings: ChatSettings
) -> Iterator[tuple[Message, list[int]]]:
    """Every message, system and developer first, with its o200k_harmony ids."""
    import openai_harmony as oh

    encoding = harmony()
    options = oh.RenderOptions(conversation_has_function_tools=bool(settings.tools))
    lead = 0
    while lead < len(messages) and messages[lead].role == "developer":
        lead += 1
    instructions = [settings.instructions or "", *(message.content for message in messages[:lead])]
    text = "\n\n".join(part for part in instructions if part)
    yield Message("system", ""), encoding.render(_system(settings), options)
    block = _developer(text, settings, options)
    if block:
        yield Message("developer", text), block
    for message in messages[lead:]:
        yield message, encoding.render(_harmony_message(message), options)


def _system(settings: ChatSettings) -> "openai_harmony.Message":
    import openai_harmony as oh

    date = settings.date if settings.date is not None else datetime.date.today()
    content = oh.SystemContent(
        model_identity=_valid(settings.identity),
        reasoning_effort=oh.ReasoningEffort(settings.reasoning_effort.capitalize()),
        conversation_start_date=str(date),
        knowledge_cutoff=_valid(settings.knowledge_cutoff),
    )
    return oh.Message.from_role_and_content(oh.Role.SYSTEM, content)


def _developer(
    text: str, settings: ChatSettings, options: "openai_harmony.RenderOptions"
) -> list[int]:
    """The developer message: instructions, tools, response format, in this order; [] for none of
    them."""
    import openai_harmony as oh

    ids: list[int] = []
    if text or settings.tools:
        content = oh.DeveloperContent(instructions=_valid(text) or None)
        if settings.tools:
            content.with_function_tools([_tool(tool) for tool in settings.tools])
        ids = harmony().render(
            oh.Message.from_role_and_content(oh.Role.DEVELOPER, content), options
        )
    if settings.response_format is None:
        return ids
    # one text, encoded as a whole: the blank line may share its token with what stands before
    before = harmony().decode(ids[ids.index(_MESSAGE) + 1 : -1]) + "\n\n" if ids else ""
    whole = oh.TextContent(text=before + response_section(settings.response_format))
    return harmony().render(oh.Message.from_role_and_content(oh.Role.DEVELOPER, whole), options)


def response_section(fmt: ResponseFormat) -> str:
    """The `# Response Formats` section, which the library has no words for. Source: the harmony
    format, Structured output."""
    head = f"# Response Formats\n\n## {fmt.name}\n\n"
    comment = f"// {' '.join(fmt.description.split())}\n" if fmt.description.strip() else ""
    return _valid(
        head + comment + json.dumps(fmt.schema, ensure_ascii=False, separators=(",", ":"))
    )


def _tool(tool) -> "openai_harmony.ToolDescription":
    import openai_harmony as oh

    parameters = simplify(tool.parameters) if tool.parameters else None
    if parameters is not None and not parameters.get("properties") and "oneOf" not in parameters:
        parameters = None  # shown as `() => any`
    described = json.loads(_valid(json.dumps([tool.description, parameters], ensure_ascii=False)))
    return oh.ToolDescription(name=tool.name, description=described[0], parameters=described[1])


def _harmony_message(message: Message) -> "openai_harmony.Message":
    import openai_harmony as oh

    if message.role not in ("developer", "user", "assistant", "tool"):
        raise GptOssError(f"unknown role {message.role!r}: use developer, user, assistant or tool")
    for value in (message.channel, message.recipient, message.name):
        if value is not None and not all(
            c.isascii() and (c.isalnum() or c in "_-.") for c in value
        ):
            raise GptOssError(
                f"{value!r} cannot stand in a message header: use letters, digits, _, - and ."
            )
    if message.content_type is not None and not _CONTENT_TYPE.fullmatch(message.content_type):
        raise GptOssError(
            f"content type {message.content_type!r} cannot stand in a message header: use "
            f"{CONSTRAIN_JSON}, json or code"
        )
    text = _valid(message.content)
    content = (
        oh.DeveloperContent(instructions=text)
        if message.role == "developer"
        else oh.TextContent(text=text)
    )
    return oh.Message(
        author=oh.Author(role=oh.Role(message.role), name=message.name),
        content=[content],
        channel=message.channel,
        recipient=message.recipient,
        content_type=message.content_type,
    )


def _translate(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """A message's o200k_harmony ids in the tokenizer's vocabulary, cut where a prompt would end
    (`<|start|>assistant`)."""
    if tuple(tokens[:2]) == NEXT_TURN:
        return tokenizer.from_harmony(tokens[:2]) + tokenizer.from_harmony(tokens[2:])
    return tokenizer.from_harmony(tokens)


def _valid(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 has, as U+FFFD (as tiktoken does)."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
