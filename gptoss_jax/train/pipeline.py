"""Samples -> batches without end: order, epochs, processes, and going on where a run stopped.

Knows rows and steps. Refuses to know text and the model. grain gives the shuffle (an index
permutation seeded per epoch), the iterator and its state.

Rows are packed once, before the first step, and what is shuffled every epoch are whole rows and
whole batches. A batch is then a function of its number alone, so that going on after a crash reads
nothing again and skips nothing. The price: the same samples share a row in every epoch, and all
samples are held in memory (8 bytes a token).
"""

import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import Tokenizer
from gptoss_jax.train.packing import Bucket, best_fit, default_buckets, fill, into_buckets
from gptoss_jax.train.samples import END_OF_TEXT, Sample, Samples

_VERSION = 1
_FOREVER = 2**62


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """How samples become batches.

    Attributes:
      length: T, the tokens of a row; without packing of the longest row.
      batch: Rows of a batch over all processes.
      packing: Several samples a row. Otherwise one, padded to one of `buckets`.
      buckets: Lengths of rows without packing; None for an eighth, a quarter, a half of `length`
        and `length`.
      shuffle: Another order every epoch; False for the data's own (packing's rows in the order
        begun).
      seed: Of the order, 0 to 2^32 - 1.
      epochs: How often all samples come; None for ever.
      process_index: Which part of every batch this process makes: of B = batch / process_count
        rows, rows index * B on.
      process_count: How many processes share a batch.
    """

    length: int = 2048
    batch: int = 8
    packing: bool = True
    buckets: tuple[int, ...] | None = None
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = None
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.length < 2 or self.batch < 1:
            raise GptOssError(
                f"length is {self.length} and batch {self.batch}: expected at least 2 tokens and "
                "1 row"
            )
        if not 0 <= self.seed < 2**32:
            raise GptOssError(f"seed is {self.seed}: expected 0 to {2**32 - 1}")
        if self.epochs is not None and self.epochs < 1:
            raise GptOssError(f"epochs is {self.epochs}: expected 1 or more, or None for ever")
        if not 0 <= self.process_index < self.process_count:
            raise GptOssError(
                f"process_index is {self.process_index} of {self.process_count}: expected 0 to "
                f"{self.process_count - 1}"
            )
        if self.batch % self.process_count:
            raise GptOssError(
                f"batch of {self.batch} rows does not divide among {self.process_count} processes: "
                f"use a multiple of {self.process_count}"
            )
        if self.buckets is not None and (self.packing or not self.buckets or min(self.buckets) < 2):
            raise GptOssError(
                f"buckets are {self.buckets}: expected lengths of 2 and more, and packing=False"
            )
        if self.buckets is not None and max(self.buckets) != self.length:
            raise GptOssError(
                f"the longest bucket is {max(self.buckets)}, length {self.length}: make them equal"
            )


class Batches:
    """All batches of a run, by number: batch `i` is this process's part of the i-th step.

    `batches[i]` gives tokens int32 [B, T], segments int32 [B, T], weights float32 [B, T]
    (packing.py), with B = batch / process_count. Every process gets the same T at the same number.
    An epoch has `per_epoch` batches and holds every sample once; rows that it lacks for its last
    batch are empty. `lengths` are the Ts that occur: a jitted step compiles once for each.

    Raises GptOssError for a sample longer than a row.
    """

    def __init__(self, samples: Samples, tokenizer: Tokenizer, settings: BatchSettings):
        self.settings = settings
        self.samples: list[Sample] = samples.samples
        self.buckets = _rows(self.samples, settings)
        self.padding = tokenizer.special[END_OF_TEXT]
        self._digest = samples.digest()
        counts = [math.ceil(len(bucket.rows) / settings.batch) for bucket in self.buckets]
        self._first = np.cumsum([0, *counts])
        self.per_epoch = int(self._first[-1])
        self._orders = [_order(len(bucket.rows), settings) for bucket in self.buckets]
        self._batch_order = _order(self.per_epoch, settings)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(bucket.length for bucket in self.buckets)

    @property
    def fill_share(self) -> float:
        """Tokens of samples over all tokens of an epoch's batches, padding included."""
        counts = np.diff(self._first) * self.settings.batch
        room = sum(int(n) * bucket.length for n, bucket in zip(counts, self.buckets, strict=True))
        return sum(map(len, self.samples)) / room

    def __len__(self) -> int:
        epochs = self.settings.epochs
        return _FOREVER if epochs is None else self.per_epoch * epochs

    def members(self, number: int) -> tuple[Bucket, list[tuple[int, ...]]]:
        """The bucket of a batch, and the samples in each of its rows, of all processes."""
        epoch, position = divmod(number, self.per_epoch)
        position = self._batch_order(epoch, position)
        at = int(np.searchsorted(self._first, position, side="right")) - 1
        bucket, order, size = self.buckets[at], self._orders[at], self.settings.batch
        begin = (position - int(self._first[at])) * size
        rows = [
            bucket.rows[order(epoch, i)] if i < len(bucket.rows) else ()
            for i in range(begin, begin + size)
        ]
        return bucket, rows

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        bucket, rows = self.members(number)
        share = self.settings.batch // self.settings.process_count
        begin = self.settings.process_index * share
        return fill(self.samples, rows[begin : begin + share], bucket.length, self.padding)

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a state to mean the same batches. Processes are not in it: a
        run may go on with another number of them."""
        settings = self.settings
        return {
            "data": self._digest,
            "length": settings.length,
            "batch": settings.batch,
            "packing": settings.packing,
            "buckets": list(self.lengths),
            "shuffle": settings.shuffle,
            "seed": settings.seed,
        }


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """The batches in order, from wherever the state says.

    `get_state` and `set_state` take and give a dict that JSON can write: the number of the next
    batch, and what it depends on. After `set_state` the next batches are the same to the bit,
    however often one restores, within an epoch and across its end.
    """

    def __init__(self, batches: Batches):
        grain = _grain()
        self.batches = batches
        # the data lie in memory: grain advises against threads then
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        # a range, since a repeated source would not learn the epoch
        numbers = grain.MapDataset.range(len(batches)).map(batches.__getitem__)
        self._iterator = iter(numbers.to_iter_dataset(options))

    def __next__(self) -> dict[str, np.ndarray]:
        return cast(dict[str, np.ndarray], next(self._iterator))

    @property
    def step(self) -> int:
        """Number of the next batch, from 0."""
        return int(cast(Mapping, self._iterator.get_state())["next_index"])

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0."""
        return self.step // self.batches.per_epoch

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, as a dict for JSON."""
        return {"version": _VERSION, "step": self.step, **self.batches.identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where a state was taken.

        Raises:
          GptOssError: the state is of other data or other settings (it names the field), of another
            version, or beyond the last epoch.
        """
        expected = {"version": _VERSION, **self.batches.identity()}
        for name, value in expected.items():
            if state.get(name) != value:
                raise GptOssError(
                    f"the saved position is of a run whose {name} is {state.get(name)!r}, this one "
                    f"has {value!r}: go on with the same data and settings, or begin a new run"
                )
        step = state.get("step")
        if type(step) is not int or not 0 <= step <= len(self.batches):
            raise GptOssError(
                f"the saved position is batch {step!r} of {len(self.batches)}: raise epochs, or "
                "begin a new run"
            )
        self._iterator.set_state({"next_index": step})


def _rows(samples: list[Sample], settings: BatchSettings) -> tuple[Bucket, ...]:
    lengths = [len(sample) for sample in samples]
    if settings.packing:
        return (Bucket(settings.length, tuple(best_fit(lengths, settings.length))),)
    sizes = settings.buckets or default_buckets(settings.length)
    return into_buckets(lengths, sizes, settings.batch)


def _grain() -> Any:
    """The library, loaded on the first use (1 s)."""
    try:
        return importlib.import_module("grain")
    except ImportError:
        raise GptOssError("training data need grain: pip install 'gptoss_jax[train]'") from None


def _order(count: int, settings: BatchSettings):
    """(epoch, position) -> number below count: a permutation of its own for every epoch."""
    if not settings.shuffle:
        return lambda epoch, position: position
    shuffled = _grain().MapDataset.range(count).shuffle(seed=settings.seed)
    return lambda epoch, position: int(shuffled[epoch * count + position])
