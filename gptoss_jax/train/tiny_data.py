"""Conversations as token batches for gpt-oss-tiny, and the compact vocabulary they need.

Rows that share a system message are trained as branches of one prefix, whose keys and values are
computed once: half of a short conversation is its system message. Knows text and tokens; knows no
parameters.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from gptoss_jax.chat.render import render_training
from gptoss_jax.tokenizer import HARMONY_SPECIALS, Tokenizer, kept_ids, load_tokenizer
from gptoss_jax.train.tiny_tasks import Conversation, conversation

PREFIX = 84  # tokens of the longest system message, rounded up
BRANCHES = 12  # rows that share a prefix
BUCKETS = (
    (64, 3),
    (112, 3),
    (192, 3),
)  # (longest row, prefixes a step), in the proportion of the lengths drawn


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation in tokens.

    Attributes:
      prefix: The system message.
      row: Everything after it.
      learnt: For each token of the row whether the assistant emits it after the last question.
    """

    prefix: tuple[int, ...]
    row: tuple[int, ...]
    learnt: tuple[bool, ...]


def example(talk: Conversation, tokenizer: Tokenizer) -> Example:
    """Renders a conversation; what the assistant says after the last question is learnt, a call
    before its result too."""
    rendered = render_training([*talk.history, *talk.reply], tokenizer, talk.settings)
    last = rendered.segments[-1].turn
    prefix = next(s.start for s in rendered.segments if s.message == 1)
    learnt = [
        s.emitted and s.turn == last for s in rendered.segments for _ in range(s.start, s.stop)
    ]
    ids = rendered.ids
    return Example(tuple(ids[:prefix]), tuple(ids[prefix:]), tuple(learnt[prefix:]))


def batches(
    tokenizer: Tokenizer, seed: int, start: int = 0, wide: bool = False
) -> Iterator[list[dict[str, np.ndarray]]]:
    """Endless training steps, each a list of one batch a bucket; the same arguments give the
    same steps.

    Conversations come as they are drawn; those of one system message and bucket wait until they are
    enough for a group.

    Yields:
      prefix int32 [G, P] and prefix_mask bool [G, P]; rows int32 [G * BRANCHES, T + 1]; learnt
      int32 [L], flat indices into the [G * BRANCHES, T] predictions, and weight float32 [L], 0
      where an index is only padding.
    """
    waiting: dict[tuple, list[Example]] = {}
    ready: list[collections.deque] = [collections.deque() for _ in BUCKETS]
    index = start << 16
    while True:
        while any(len(groups) < count for groups, (_, count) in zip(ready, BUCKETS, strict=True)):
            talk = conversation(seed, index, wide=wide)
            index += 1
            made = example(talk, tokenizer)
            bucket = next(
                (i for i, (longest, _) in enumerate(BUCKETS) if len(made.row) <= longest + 1), None
            )
            if bucket is None:
                continue
            group = waiting.setdefault(
                (talk.settings.reasoning_effort, bool(talk.settings.tools), bucket), []
            )
            group.append(made)
            if len(group) == BRANCHES:  # all take the prefix, and so the date, of the first
                ready[bucket].append(group.copy())
                group.clear()
        yield [
            _arrays([groups.popleft() for _ in range(count)], longest)
            for groups, (longest, count) in zip(ready, BUCKETS, strict=True)
        ]


def _arrays(groups: list[list[Example]], longest: int) -> dict[str, np.ndarray]:
    rows = [made for group in groups for made in group]
    prefix = np.zeros((len(groups), PREFIX), np.int32)
    mask = np.zeros((len(groups), PREFIX), bool)
    for i, group in enumerate(groups):
        size = len(group[0].prefix)
        prefix[i, :size], mask[i, :size] = group[0].prefix, True
    tokens = np.zeros((len(rows), longest + 1), np.int32)
    learnt = np.zeros((len(rows), longest), bool)
    for i, made in enumerate(rows):
        tokens[i, : len(made.row)] = made.row
        learnt[i, : len(made.row) - 1] = made.learnt[1:]
    limit = int(0.7 * learnt.size)
    where = np.flatnonzero(learnt)[:limit]
    indices, weight = np.zeros(limit, np.int32), np.zeros(limit, np.float32)
    indices[: len(where)], weight[: len(where)] = where, 1.0
    return {
        "prefix": prefix,
        "prefix_mask": mask,
        "rows": tokens,
        "learnt": indices,
        "weight": weight,
    }


def vocabulary(count: int = 12000, common: int = 900) -> list[int]:
    """o200k_harmony ids of the compact vocabulary, ascending.

    Every token that some conversations of a seed outside training use, the commonest English
    pieces, the bytes and the control tokens; numbers of two and more digits are left out, so that
    arithmetic goes digit by digit.

    Args:
      count: Conversations looked at.
      common: Ids below which English pieces are kept whether used or not.
    """
    full = load_tokenizer()
    used: collections.Counter[int] = collections.Counter()
    for index in range(count):
        talk = conversation(-1, index, wide=True)
        used.update(set(render_training([*talk.history, *talk.reply], full, talk.settings).ids))
    wanted = {
        token
        for token, times in used.items()
        if times >= 4 and token < min(HARMONY_SPECIALS.values())
    }
    wanted |= {
        i for i in range(256, common) if re.fullmatch(rb" ?[A-Za-z]+", full.decode_bytes([i]))
    }
    ordinary = min(HARMONY_SPECIALS.values())
    return [
        i
        for i in kept_ids(wanted)
        if i >= ordinary or not re.search(rb"..*\d|\d.+", full.decode_bytes([i]))
    ]
