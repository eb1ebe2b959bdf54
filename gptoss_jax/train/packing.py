"""Samples -> rows of equal length: which samples share a row, and the arrays of a batch.

Knows lengths and segment ids. Refuses to know order over epochs, processes and text.

A batch is a dict of numpy arrays: tokens int32 [B, T]; segments int32 [B, T], 1, 2, ... within a
row and 0 for padding (the network takes positions, windows and visibility from them); weights
float32 [B, T], the loss weight of token t as a target, predicted from t - 1. The first token of
every segment and all padding weigh 0.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from gptoss_jax.errors import GptOssError
from gptoss_jax.train.samples import Sample


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Rows of one length T; a row is a tuple of samples' numbers."""

    length: int
    rows: tuple[tuple[int, ...], ...]


def best_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Packs items into rows: the longest first, each into the row that it fills best.

    Args:
      lengths: Tokens of each sample. capacity: Tokens of a row.

    Returns:
      Rows of item numbers, every item once; rows in the order in which they were begun. The same
      lengths give the same rows.

    Raises:
      GptOssError: an item longer than a row.

    Source: best-fit decreasing (Johnson 1973): at most 11/9 of the fewest rows, and four.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows, newest last
    rooms: list[int] = []  # the keys of open_rows, ascending
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if not 0 < length <= capacity:
            raise GptOssError(
                f"sample {item} has {length} tokens, a row {capacity}: leave long samples out "
                f"(max_length={capacity}) or make rows longer"
            )
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        rows[row].append(item)
        if (rest := room - length) > 0:
            if rest not in open_rows:
                bisect.insort(rooms, rest)
                open_rows[rest] = []
            open_rows[rest].append(row)
    return [tuple(row) for row in rows]


def default_buckets(length: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half of a length and the length itself: one compilation each."""
    parts = (-(-length // share) for share in (8, 4, 2))
    return tuple(sorted({*(part for part in parts if part >= 16), length}))


def into_buckets(lengths: Sequence[int], buckets: Sequence[int], batch: int) -> tuple[Bucket, ...]:
    """One sample a row, each row of the shortest length that holds it.

    What does not fill the last batch of a length moves up to the next one, longest samples first,
    so that only the longest length has a batch with empty rows.

    Args:
      lengths: Tokens of each sample. buckets: Lengths of rows. batch: Rows of a batch.

    Raises:
      GptOssError: a sample longer than the longest bucket.
    """
    sizes = sorted(set(buckets))
    groups: list[list[int]] = [[] for _ in sizes]
    for item, length in enumerate(lengths):
        at = bisect.bisect_left(sizes, length)
        if at == len(sizes):
            raise GptOssError(
                f"sample {item} has {length} tokens, the longest row {sizes[-1]}: leave long "
                f"samples out (max_length={sizes[-1]}) or make rows longer"
            )
        groups[at].append(item)
    last = max((at for at, group in enumerate(groups) if group), default=0)
    for at in range(last):
        spare = len(groups[at]) % batch
        groups[at].sort(key=lambda i: (lengths[i], i))
        groups[at + 1] += groups[at][len(groups[at]) - spare :]
        groups[at] = sorted(groups[at][: len(groups[at]) - spare])
    groups[last].sort()
    return tuple(
        Bucket(size, tuple((item,) for item in group))
        for size, group in zip(sizes, groups, strict=True)
        if group
    )


def fill(
    samples: Sequence[Sample], rows: Sequence[Sequence[int]], length: int, padding: int
) -> dict[str, np.ndarray]:
    """The arrays of a batch: one row of samples after another; an empty row is padding alone.

    Args:
      samples: All samples. rows: Numbers of the samples of each row [B]. length: T. padding: Id
      that stands in the rest of a row.

    Returns:
      tokens int32, segments int32 and weights float32, each [B, T].
    """
    tokens = np.full((len(rows), length), padding, np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        start = 0
        for number, item in enumerate(row, 1):
            sample = samples[item]
            stop = start + len(sample)
            assert stop <= length
            tokens[b, start:stop] = sample.tokens
            segments[b, start:stop] = number
            weights[b, start:stop] = sample.weights
            weights[b, start] = 0
            start = stop
    return {"tokens": tokens, "segments": segments, "weights": weights}
