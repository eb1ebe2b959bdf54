"""A model in memory, and generating from it: prompts in, completions out, all at once or as a
stream.

Works on token ids and plain text; what roles, channels and tools are is the conversation's business
(chat/), where models come from is loading.py's.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import cache as kv
from gptoss_jax import sharding, steps
from gptoss_jax.cache import KVCache, make_cache
from gptoss_jax.completions import Piece, Reader, TokenLogprob, join
from gptoss_jax.config import SLIDING, GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.hub import TINY
from gptoss_jax.lora import Stack
from gptoss_jax.model import Params
from gptoss_jax.sampling import Sampling, to_arrays
from gptoss_jax.tokenizer import Tokenizer

CHUNKS = (32, 128, 256, 512)  # prefill lengths that are compiled; longer prompts go chunk by chunk
DECODE = 64  # decode steps in one call to the device
STREAM = 8  # of them before a streaming caller sees something
MIN_CAPACITY = 512

Prompt = str | Sequence[int]
Names = str | Sequence[str | None] | None


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: config, parameters, tokenizer, and how to generate from them.

    Attributes:
      config: Architecture.
      params: Nested dict of arrays and MxTensors (model.py shows the tree); some in the layout that
        the device's kernels read (loading.py), `loading.released` gives them back.
      tokenizer: Of this checkpoint; its vocabulary may be pruned.
      max_context: Longest sequence, in tokens.
      name: Where it was loaded from.
      mesh: The devices it is spread over, None for one device.
      adapters: Those that requests may name; None without any.
    """

    config: GptOssConfig
    params: Params
    tokenizer: Tokenizer
    max_context: int
    name: str = TINY
    mesh: Any = None
    adapters: Stack | None = None

    def logits(self, tokens, adapter: Names = None) -> jax.Array | list[jax.Array]:
        """Logits of whole sequences.

        Args:
          tokens: int array [B, T], or lists of ids of any lengths.
          adapter: Name of one of `adapters` for all sequences, or one (or None) for each.

        Returns:
          float32 [B, T, V], or for lists of ids a list of [T_i, V]; in several processes whole on
          every device.

        Raises:
          GptOssError: An id is out of range, a sequence is empty or longer than the context, or no
            adapter has this name.
        """
        rows = [np.asarray(row) for row in tokens]
        for row in rows:
            self._check_ids(row, 0)
        length = max(len(row) for row in rows)
        width = next((n for n in CHUNKS if n >= length), -(-length // CHUNKS[-1]) * CHUNKS[-1])
        ids, mask = (self._array(x, "BT") for x in _pad(rows, width))
        added = self._added(self._numbers(adapter, len(rows)), len(rows))
        out = self._on_mesh(steps.score, self.params, ids, mask, added, config=self.config)
        if jax.process_count() > 1:  # a process can read only what it has
            out = self._on_mesh(jax.jit(sharding.replicate), out)
        if hasattr(tokens, "ndim"):
            return out[:, :length]
        return [out[i, : len(row)] for i, row in enumerate(rows)]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        max_new_tokens: int | Sequence[int | None] | None = 64,
        stop: Sequence[str] = (),
        progress: Callable[[int], None] | None = None,
        adapter: Names = None,
    ) -> Any:
        """Continues prompts.

        Args:
          prompts: A text, a list of ids, or a list of either. Text is ordinary text: it holds no
            control tokens.
          sampling: Settings for all prompts, or one for each; by default temperature 1.
          max_new_tokens: Most tokens of a completion, for all prompts or one for each; None for the
            rest of the context.
          stop: Strings that end a completion; they are not part of it.
          progress: Called with the number of new tokens, as they come.
          adapter: Name of one of `adapters` for all prompts, or one (or None) for each; another
            choice does not recompile.

        Returns:
          A Completion for one prompt, a list for several; with sampling.n > 1 a list of n in place
          of each.

        Raises:
          GptOssError: A prompt is empty, holds an id out of range, or does not fit into the context
            with max_new_tokens, or no adapter has this name.
        """
        rows, single = _as_rows(prompts)
        each = _as_settings(sampling, len(rows))
        parts: list[list[Piece]] = [[] for s in each for _ in range(s.n)]
        for index, piece in self._run(rows, each, max_new_tokens, stop, DECODE, adapter):
            parts[index].append(piece)
            if progress:
                progress(len(piece.tokens))
        flat = iter([join(pieces) for pieces in parts])
        grouped = [next(flat) if s.n == 1 else [next(flat) for _ in range(s.n)] for s in each]
        return grouped[0] if single else grouped

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = 64,
        stop: Sequence[str] = (),
        adapter: str | None = None,
    ) -> Iterator[Piece]:
        """Continues one prompt, piece by piece; arguments and errors as `generate`.

        Yields:
          Pieces; the last has a finish_reason.
        """
        rows, _ = _as_rows([prompt])
        each = _as_settings(sampling, 1)
        if each[0].n != 1:
            raise GptOssError(
                f"n is {each[0].n}: a stream has one completion, use generate for more"
            )
        pieces = self._run(rows, each, max_new_tokens, stop, STREAM, adapter)
        return (piece for _, piece in pieces)

    def _check_ids(self, row: np.ndarray, new: int) -> None:
        if row.size == 0:
            raise GptOssError("the prompt is empty: give at least one token")
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise GptOssError(f"expected a list of token ids: got {row.dtype} of shape {row.shape}")
        bad = np.flatnonzero((row < 0) | (row >= self.config.vocab_size))
        if bad.size:
            i = int(bad[0])
            raise GptOssError(
                f"token id {int(row[i])} at position {i} is out of range: "
                f"ids are 0 to {self.config.vocab_size - 1}"
            )
        if row.size + new > self.max_context:
            what = f"the prompt has {row.size} tokens"
            what += f" and {new} new ones are asked for" if new else ""
            raise GptOssError(
                f"{what}: the context is {self.max_context} tokens; "
                "shorten the prompt or ask for fewer"
            )

    def _run(self, rows, each, max_new_tokens, stop, chunk, adapter) -> Iterator[tuple[int, Piece]]:
        """Pieces of all completions as they come, with the index of the completion."""
        numbers = self._numbers(adapter, len(rows))
        each_most = _as_limits(max_new_tokens, len(rows))
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(s, str) and s for s in stops):
            raise GptOssError(f"stop is {stop!r}: expected strings that are not empty")
        ids = [
            np.asarray(self.tokenizer.encode(row) if isinstance(row, str) else row) for row in rows
        ]
        for row, most in zip(ids, each_most, strict=True):
            self._check_ids(row, most or 1)
        limits = [
            self.max_context - len(row) if most is None else most
            for row, most in zip(ids, each_most, strict=True)
        ]
        return self._decode(ids, each, limits, stops, chunk, numbers)

    def _decode(self, ids, each, limits, stops, chunk, numbers):
        copies = each[0].n if len({s.n for s in each}) == 1 else 1
        if copies == 1:
            ids = [row for row, s in zip(ids, each, strict=True) for _ in range(s.n)]
            numbers = np.repeat(numbers, [s.n for s in each])
        settings = [s for s in each for _ in range(s.n)]
        choices = [i for s in each for i in range(s.n)]
        lengths = [len(row) for row in ids for _ in range(copies)]
        limits = [most for most, s in zip(limits, each, strict=True) for _ in range(s.n)]
        rows = len(settings)
        state = self._prefill(ids, copies, max(lengths) + min(max(limits), 256), numbers)
        batch = state.done_B.shape[0]
        added = self._added(np.repeat(numbers, copies), batch)
        pad = batch - rows
        arrays = to_arrays(
            settings + [Sampling(temperature=0)] * pad, choices + [0] * pad, self.config.vocab_size
        )
        stop_ids = self._stop_ids(settings, batch)
        wanted = [s.top_logprobs for s in settings if s.logprobs or s.top_logprobs]
        top = None if not wanted else (20 if max(wanted) else 0)
        readers = [
            Reader(self.tokenizer, stops, s, limit)
            for s, limit in zip(settings, limits, strict=True)
        ]
        made = 0
        while any(not reader.finished for reader in readers):
            capacity = _capacity(state.cache, self.config)
            most = max(n + r.limit for n, r in zip(lengths, readers, strict=True) if not r.finished)
            room = capacity - max(lengths) - made
            if room <= 0:
                capacity = min(2 * capacity, self.max_context)
                state = self._on_mesh(_grow, state, capacity, self.config)
                continue
            size = min(chunk, room, most - min(lengths) - made)
            if chunk < DECODE and made < STREAM:
                size = min(size, 2)  # the first words at once
            state, out = self._on_mesh(
                steps.decode,
                self.params,
                state,
                arrays,
                stop_ids,
                jnp.int32(size),
                added,
                config=self.config,
                size=DECODE,
                top=top,
            )
            out = jax.device_get(out)
            made += int(out.steps)
            for i, reader in enumerate(readers):
                if not reader.finished:
                    yield i, _read(reader, out, i)
            done = [r.finished for r in readers] + [True] * pad
            if any(done):
                stopped_B = self._array(out.stopped_B | np.array(done), "B")
                state = dataclasses.replace(state, done_B=stopped_B)

    def _numbers(self, adapter: Names, count: int) -> np.ndarray:
        """Numbers in the stack of the adapters that `count` rows name, 0 for none."""
        names = [adapter] * count if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != count:
            raise GptOssError(
                f"{len(names)} adapters for {count} prompts: give one, or one for each"
            )
        known = () if self.adapters is None else self.adapters.names
        for name in names:
            if name is not None and name not in known:
                loaded = f"loaded are {', '.join(known)}" if known else "none is loaded"
                raise GptOssError(
                    f"no adapter {name!r}: {loaded}; load with adapters={{{str(name)!r}: folder}}"
                )
        return np.array([0 if name is None else 1 + known.index(name) for name in names], np.int32)

    def _added(self, numbers: np.ndarray, batch: int) -> Params | None:
        """Additions for a batch whose first rows use these adapters, the rest none; None without
        adapters.
        """
        if self.adapters is None:
            return None
        numbers = np.pad(numbers, (0, batch - len(numbers)))
        return self.adapters.added(numbers, lambda gain_BR: self._array(gain_BR, "BR"))

    def _array(self, x: np.ndarray, letters: str) -> jax.Array:
        """An array of the host on the model's devices."""
        return jnp.asarray(x) if self.mesh is None else sharding.put(x, letters, self.mesh)

    def _on_mesh(self, call: Callable[..., Any], *arguments, **keywords) -> Any:
        """call(...) where it finds the model's mesh; a plain call without one."""
        if self.mesh is None:
            return call(*arguments, **keywords)
        with jax.set_mesh(self.mesh):
            return call(*arguments, **keywords)

    def _stop_ids(self, settings: Sequence[Sampling], batch: int) -> jax.Array:
        own = self.config.eos_token_ids
        rows = [[*(() if s.ignore_eos else own), *s.stop_token_ids] for s in settings]
        width = max(4, 1 << (max(len(row) for row in rows) - 1).bit_length())
        table = np.full((batch, width), -1, np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        return jnp.asarray(table)

    def _prefill(
        self, ids: Sequence[np.ndarray], copies: int, total: int, numbers: np.ndarray
    ) -> steps.State:
        """State of the prompts, padded to a power of two of rows when rows are not copied."""
        batch = len(ids) if copies > 1 else 1 << (len(ids) - 1).bit_length()
        if self.mesh is not None and len(ids) > 1:  # every copy of the model gets as many rows
            copies_of_model = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            batch = -(-batch // copies_of_model) * copies_of_model
        rows = [*ids, *[np.zeros(0, np.int32)] * (batch - len(ids))]
        dtype = self.params["embedding"].dtype
        capacity = min(self.max_context, max(MIN_CAPACITY, 1 << (total - 1).bit_length()))
        empty = _empty if self.mesh is None else _empty_spread
        cache, last_BD = self._on_mesh(empty, self.config, batch, capacity, dtype)
        seen = np.zeros((batch, self.config.vocab_size), np.int8)
        for i, row in enumerate(rows):
            seen[i, row] = 1
        added = self._added(numbers, batch)
        longest, at = max(len(row) for row in rows), 0
        while at < longest:
            width = next((n for n in CHUNKS if n >= longest - at), CHUNKS[-1])
            padded = _pad([row[at : at + width] for row in rows], width)
            part, mask = (self._array(x, "BT") for x in padded)
            cache, last_BD = self._on_mesh(
                steps.prefill, self.params, part, mask, cache, last_BD, added, config=self.config
            )
            at += width
        done = np.array([len(row) == 0 for row in rows])
        parts = cache, last_BD, self._array(seen, "BV"), self._array(done, "B")
        if copies > 1:
            parts = self._on_mesh(steps.repeat, parts, copies)
            added = self._added(np.repeat(numbers, copies), batch * copies)
        return self._on_mesh(steps.start, self.params, *parts, added)


def _read(reader: Reader, out: steps.Output, row: int) -> Piece:
    tokens = [int(t) for t in out.tokens_Bn[row, : int(out.steps)] if t >= 0]

    def logprob(column: int) -> TokenLogprob:
        top = slice(reader.top)
        ids, values = out.top_ids_Bnk[row, column, top], out.top_logprobs_Bnk[row, column, top]
        pairs = tuple((int(i), float(v)) for i, v in zip(ids, values, strict=True))
        return TokenLogprob(tokens[column], float(out.logprobs_Bn[row, column]), pairs)

    return reader.read(tokens, bool(out.stopped_B[row]), logprob)


def _as_rows(prompts) -> tuple[list[Any], bool]:
    if isinstance(prompts, str):
        return [prompts], True
    prompts = list(prompts)
    if not prompts:
        raise GptOssError("the prompt is empty: give at least one token")
    if all(isinstance(p, int | np.integer) for p in prompts):
        return [prompts], True
    return prompts, False


def _as_settings(sampling, count: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling or Sampling()] * count
    if len(sampling) != count:
        raise GptOssError(
            f"{len(sampling)} sampling settings for {count} prompts: give one, or one for each"
        )
    return list(sampling)


def _as_limits(max_new_tokens, count: int) -> list[int | None]:
    each = [max_new_tokens] * count
    if isinstance(max_new_tokens, Sequence):
        each = list(max_new_tokens)
    if len(each) != count:
        raise GptOssError(
            f"{len(each)} values of max_new_tokens for {count} prompts: give one, or one for each"
        )
    for most in each:
        if most is not None and (isinstance(most, bool) or most < 1):
            raise GptOssError(f"max_new_tokens is {most}: expected a positive integer, or None")
    return each


def _pad(rows: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return ids, mask


def _capacity(cache: KVCache, config: GptOssConfig) -> int:
    full = [
        k.shape[1]
        for k, kind in zip(cache.keys, config.layer_types, strict=True)
        if kind != SLIDING
    ]
    return max(full, default=config.max_context)


@functools.partial(jax.jit, static_argnames=("capacity", "config"))
def _grow(state: steps.State, capacity: int, config: GptOssConfig) -> steps.State:
    """The same state with room for `capacity` tokens in full layers."""

    def wider(arrays):
        return tuple(
            x
            if kind == SLIDING
            else jnp.pad(x, [(0, 0), (0, capacity - x.shape[1]), (0, 0), (0, 0)])
            for x, kind in zip(arrays, config.layer_types, strict=True)
        )

    cache = dataclasses.replace(
        state.cache, keys=wider(state.cache.keys), values=wider(state.cache.values)
    )
    return dataclasses.replace(state, cache=kv.constrain(cache))


def _empty(config: GptOssConfig, batch: int, capacity: int, dtype) -> tuple[KVCache, jax.Array]:
    """Cache and last hidden states before the first token."""
    last_BD = sharding.constrain(jnp.zeros((batch, config.hidden_size), dtype), "BD")
    return kv.constrain(make_cache(config, batch, capacity, dtype)), last_BD


# On a mesh no device may hold the whole cache, not even at first.
_empty_spread = jax.jit(_empty, static_argnums=(0, 1, 2, 3))
