"""Conversations -> token ids with the loss weight of each: what the model learns to say.

Knows turns, channels and which tokens the assistant emits. Refuses to know files, rows of a batch
and the model.

The loss is on what the assistant itself emits (chat/render.py says which tokens those are) and only
on a conversation's last turn: earlier turns stand there as the model sees them later, without their
reasoning, and learning them would teach it to skip the reasoning. A chat of N turns therefore
becomes N samples (`multi_turn="expand"`), each with the history as it was at that moment; reasoning
inside an unfinished tool loop is part of the turn and stays.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from gptoss_jax.chat.messages import IDENTITY, ChatSettings, Message
from gptoss_jax.chat.render import drop_reasoning, render_training
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import Tokenizer
from gptoss_jax.train.forms import Conversation, conversation_from
from gptoss_jax.train.read import Example, Examples, Source, read

# the day gpt-oss was released: what "Current date" says where nobody says otherwise
PINNED_DATE = "2025-08-05"
END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How conversations are rendered, and what of them is learnt.

    Attributes:
      date: "Current date" of every system message, YYYY-MM-DD. There is no today here: the same
        data must give the same tokens tomorrow.
      reasoning_effort: low, medium or high, for rows that do not say.
      identity: First line of the system message, for rows that do not say.
      instructions: Stand before every row's own developer instructions.
      analysis_weight: Loss weight of the reasoning, its header and `<|end|>` included; 0 leaves it
        unlearnt.
      commentary_weight: The same for calls and preambles.
      final_weight: The same for answers.
      multi_turn: "expand" makes a sample of every turn that the assistant answers, "last" of the
        last one only.
      max_length: Longest sample in tokens; longer ones are left out and counted, never cut. None
        for no limit.
      skip_bad: Leave out and count rows that are broken, instead of raising the first.
    """

    date: str = PINNED_DATE
    reasoning_effort: str = "medium"
    identity: str = IDENTITY
    instructions: str | None = None
    analysis_weight: float = 1.0
    commentary_weight: float = 1.0
    final_weight: float = 1.0
    multi_turn: Literal["expand", "last"] = "expand"
    max_length: int | None = None
    skip_bad: bool = False

    def __post_init__(self):
        for channel, weight in self.channel_weights.items():
            if not math.isfinite(weight) or weight < 0:
                raise GptOssError(f"{channel}_weight is {weight}: expected 0 or a positive number")
        if not any(self.channel_weights.values()):
            raise GptOssError("all channel weights are 0: nothing would be learnt; raise one")
        if self.multi_turn not in ("expand", "last"):
            raise GptOssError(f"multi_turn is {self.multi_turn!r}: use expand or last")
        if self.max_length is not None and self.max_length < 2:
            raise GptOssError(f"max_length is {self.max_length}: expected at least 2 tokens")
        if not self.date:
            raise GptOssError("expected a date as YYYY-MM-DD, got none: training needs a fixed one")
        self.chat  # noqa: B018 (checks date and effort now, not at the first row)

    @property
    def channel_weights(self) -> dict[str, float]:
        return {
            "analysis": self.analysis_weight,
            "commentary": self.commentary_weight,
            "final": self.final_weight,
        }

    @property
    def chat(self) -> ChatSettings:
        """What the system message says where a row says nothing."""
        return ChatSettings(
            reasoning_effort=self.reasoning_effort,
            date=self.date,
            instructions=self.instructions,
            identity=self.identity,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Token ids int32 [n] and loss weights float32 [n]: weights[t] belongs to token t as a target.

    weights[0] is 0, since nothing predicts the first token. `where` is the row's place, with the
    turn if the row gave several samples.
    """

    tokens: np.ndarray
    weights: np.ndarray
    where: str

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of the rows.

    Attributes:
      rows: Rows read, broken ones included.
      bad: Rows left out because they are broken (`skip_bad`).
      samples: Samples made and kept.
      too_long: Samples left out because they exceed max_length; `longest` is the longest of all
        samples, kept or not, in tokens.
      unsupervised: Turns left out because every weight in them is 0.
      without_reasoning: Kept samples in which the assistant says nothing in `analysis`: they teach
        it to answer at once.
      tokens: Tokens of the kept samples.
      supervised: Those among them with a weight above 0.
      messages: The first messages about bad rows and the places of the first too long samples.
    """

    rows: int
    bad: int
    samples: int
    too_long: int
    longest: int
    unsupervised: int
    without_reasoning: int
    tokens: int
    supervised: int
    messages: tuple[str, ...] = ()

    @property
    def supervised_share(self) -> float:
        return self.supervised / self.tokens if self.tokens else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a data set, in its order, and what was left out."""

    samples: list[Sample]
    report: DataReport

    def digest(self) -> str:
        """16 hex digits that any change of a token, a weight or the order changes."""
        whole = hashlib.sha256()
        for sample in self.samples:
            whole.update(len(sample).to_bytes(8, "little"))
            whole.update(np.ascontiguousarray(sample.tokens, "<i4").tobytes())
            whole.update(np.ascontiguousarray(sample.weights, "<f4").tobytes())
        return whole.hexdigest()[:16]


def load_samples(
    source: Source,
    tokenizer: Tokenizer,
    settings: SampleSettings | None = None,
    *,
    split: str = "train",
    show_progress: bool = False,
) -> Samples:
    """Reads a source (`read.read`) and makes its samples (`make_samples`)."""
    settings = settings or SampleSettings()
    found = read(source, split=split, skip_bad=settings.skip_bad)
    return make_samples(found, tokenizer, settings, show_progress=show_progress)


def make_samples(
    examples: Examples | Iterable[Mapping],
    tokenizer: Tokenizer,
    settings: SampleSettings | None = None,
    *,
    show_progress: bool = False,
) -> Samples:
    """The samples of rows, in their order.

    Args:
      examples: What `read` gave, or dicts.
      tokenizer: Of the model that is trained.
      settings: How to render, and what to learn.
      show_progress: Draw a bar on stderr.

    Returns:
      At least one sample, each with a weight above 0 somewhere, and the report.

    Raises:
      GptOssError with the row's place: what `forms.conversation_from` refuses; a turn in which the
        assistant says nothing; a row whose weights are all 0. And if no sample is left at all.
    """
    settings = settings or SampleSettings()
    if not isinstance(examples, Examples):
        examples = read(examples, skip_bad=settings.skip_bad)
    kept: list[Sample] = []
    bad, long = list(examples.bad), []
    longest = unsupervised = silent = 0
    for example in _bar(examples.rows, show_progress):
        try:
            made = list(_of_row(example, tokenizer, settings))
            if not any(sample is not None for sample, _ in made):
                raise GptOssError(
                    "nothing to learn: every weight is 0; raise a message's weight or a channel's"
                )
        except GptOssError as error:
            if not settings.skip_bad:
                raise GptOssError(f"{example.where}: {error}") from None
            bad.append(f"{example.where}: {error}")
            continue
        for sample, reasoned in made:
            if sample is None:
                unsupervised += 1
                continue
            longest = max(longest, len(sample))
            if settings.max_length is not None and len(sample) > settings.max_length:
                long.append(f"{sample.where}: {len(sample)} tokens")
            else:
                kept.append(sample)
                silent += not reasoned
    report = DataReport(
        rows=len(examples.rows) + len(examples.bad),
        bad=len(bad),
        samples=len(kept),
        too_long=len(long),
        longest=longest,
        unsupervised=unsupervised,
        without_reasoning=silent,
        tokens=sum(map(len, kept)),
        supervised=sum(int(np.count_nonzero(sample.weights)) for sample in kept),
        messages=(*bad[:5], *long[:5]),
    )
    if not kept:
        reasons = [f"{len(bad)} broken"] * bool(bad)
        reasons += [f"{len(long)} longer than {settings.max_length} tokens"] * bool(long)
        first = f"; the first: {report.messages[0]}" if report.messages else ""
        raise GptOssError(
            f"no sample is left of {report.rows} rows ({', '.join(reasons) or 'none was given'})"
            f"{first}"
        )
    return Samples(kept, report)


def _of_row(
    example: Example, tokenizer: Tokenizer, settings: SampleSettings
) -> Iterator[tuple[Sample | None, bool]]:
    """A row's samples, None for one with nothing to learn; and whether the assistant reasons."""
    found = conversation_from(example.row, settings.chat)
    if isinstance(found, str):
        yield _document(found, tokenizer, example.where), True
        return
    ends = _turns(found.messages)
    chosen = list(ends.items())[-1:] if settings.multi_turn == "last" else ends.items()
    for turn, (first, end) in chosen:
        said = [m for m in found.messages[first:end] if m.role == "assistant"]
        if not any(message.content.strip() for message in said):
            raise GptOssError(f"the assistant says nothing in turn {turn}: nothing to learn there")
        where = example.where if len(chosen) == 1 else f"{example.where}, turn {turn}"
        reasoned = any(message.channel == "analysis" for message in said)
        yield _sample(found, turn, end, tokenizer, settings, where), reasoned


def _turns(messages: Sequence[Message]) -> dict[int, tuple[int, int]]:
    """Turn -> (its first message, the message after the assistant's last one), for turns with an
    assistant's message; a turn begins with a user's, as `Segment.turn` counts."""
    turn, first, out = 0, 0, {}
    for position, message in enumerate(messages):
        if message.role == "user":
            turn, first = turn + 1, position
        elif message.role == "assistant":
            out[turn] = (first, position + 1)
    return out


def _sample(
    found: Conversation,
    turn: int,
    end: int,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    where: str,
) -> Sample | None:
    """The conversation up to the end of a turn, with the loss on that turn."""
    messages = found.messages[:end]
    share = {id(m): weight for m, weight in zip(found.messages, found.weights, strict=True)}
    if not any(share[id(m)] for m in messages if m.role == "assistant"):
        return None
    rendered = render_training(messages, tokenizer, found.settings)
    kept = drop_reasoning(messages, training=True)
    # the leading developer messages are one rendered message, the rest is rendered one for one
    shift = rendered.segments[-1].message + 1 - len(kept)
    weights = np.zeros(len(rendered.ids), np.float32)
    for segment in rendered.segments:
        if segment.emitted and segment.turn == turn and segment.channel is not None:
            message = kept[segment.message - shift]
            assert (message.role, message.channel) == (segment.role, segment.channel)
            weight = settings.channel_weights[segment.channel] * share[id(message)]
            weights[segment.start : segment.stop] = weight
    assert not weights[0]
    if not weights.any():
        return None
    return Sample(np.asarray(rendered.ids, np.int32), weights, where)


def _document(text: str, tokenizer: Tokenizer, where: str) -> Sample:
    """A plain text and `<|endoftext|>`, all of it learnt but the first token."""
    ids = [*tokenizer.encode(text), tokenizer.special[END_OF_TEXT]]
    weights = np.ones(len(ids), np.float32)
    weights[0] = 0
    return Sample(np.asarray(ids, np.int32), weights, where)


def _bar(rows: list[Example], show: bool) -> Iterable[Example]:
    if not show:
        return rows
    from rich.console import Console
    from rich.progress import track

    return track(rows, "rendering", console=Console(stderr=True), transient=True)
