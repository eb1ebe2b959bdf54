"""Prefixes of prompts that are kept: pages of as many tokens as a chunk, found by their tokens and
all before them.

A page holds keys and values of its tokens for full layers, and the ring of sliding layers as it is
at the page's end, which is where a chunk ended. A page that is found is copied at once, and the
device does things in order: so nothing has to be held, and the page that was used longest ago may
always go.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gptoss_jax import cache as kv
from gptoss_jax.batching.slots import Slots, settle
from gptoss_jax.cache import KVCache
from gptoss_jax.config import SLIDING, GptOssConfig
from gptoss_jax.sharding import constrain


def names(prompt: np.ndarray, size: int, adapter: int) -> list[bytes]:
    """Names of a prompt's pages: digests of the adapter and of all tokens up to the page's end.

    Args:
      prompt: int32 ids; the last one is never in a page, since the first step reads it.
      size: Tokens of a page.
      adapter: Its number: keys and values depend on it.
    """
    digest, found = hashlib.blake2b(str(adapter).encode(), digest_size=16), []
    for start in range(0, (len(prompt) - 1) // size * size, size):
        digest.update(np.ascontiguousarray(prompt[start : start + size], np.int32).tobytes())
        found.append(digest.copy().digest())
    return found


class PageTable:
    """Which page holds what.

    Args:
      count: How many pages there are.
    """

    def __init__(self, count: int):
        self._free = list(range(count - 1, -1, -1))
        self._pages: collections.OrderedDict[bytes, int] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def find(self, name: bytes) -> int | None:
        """The page of this name; it counts as used."""
        if name in self._pages:
            self._pages.move_to_end(name)
        return self._pages.get(name)

    def add(self, name: bytes) -> int | None:
        """A page for a name that has none: a free one, or the one that was used longest ago; None
        if there are no pages at all.
        """
        assert name not in self._pages
        if not self._free:
            if not self._pages:
                return None
            self._free.append(self._pages.popitem(last=False)[1])
        self._pages[name] = self._free.pop()
        return self._pages[name]

    def forget(self, names: Iterable[bytes]) -> None:
        """Frees pages whose contents are no good."""
        for name in names:
            if name in self._pages:
                self._free.append(self._pages.pop(name))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def make(config: GptOssConfig, pages: int, size: int, dtype) -> tuple[tuple, tuple]:
    """Keys and values of empty pages, one [P, S, K, H] a layer; S is the window in sliding layers.

    Args:
      config: The model.
      pages: How many.
      size: Tokens of a page.
      dtype: Of keys and values.
    """

    def zeros():
        lengths = [config.sliding_window if k == SLIDING else size for k in config.layer_types]
        shapes = [(pages, n, config.num_kv_heads, config.head_dim) for n in lengths]
        return tuple(constrain(jnp.zeros(shape, dtype), "PSKH") for shape in shapes)

    return zeros(), zeros()


@functools.partial(jax.jit, static_argnames=("config", "size"), donate_argnames=("pool",))
def save(
    pool, slots: Slots, place: Int[Array, " three"], *, config: GptOssConfig, size: int
) -> tuple[tuple, tuple]:
    """Copies the newest `size` tokens of a row into a page; the pages are donated.

    Args:
      pool: What `make` made.
      slots: The rows.
      place: int32: row, page, tokens in the row's cache.
      config: The model.
      size: Tokens of a page, static.
    """
    row, page, end = place

    def one(pages, stored, kind):
        if kind == SLIDING:
            own = kv.row_of(stored, row)
            part = kv.last_of_ring(own, end.reshape(1), config.sliding_window)
        else:
            part = kv.row_of(stored, row, end - size, size)
        return constrain(jax.lax.dynamic_update_slice_in_dim(pages, part, page, 0), "PSKH")

    cache, kinds = slots.cache, config.layer_types
    keys, values = pool
    return tuple(map(one, keys, cache.keys, kinds)), tuple(map(one, values, cache.values, kinds))


@functools.partial(jax.jit, static_argnames=("config", "size"), donate_argnames=("slots",))
def restore(
    slots: Slots, pool, place: Int[Array, " three"], *, config: GptOssConfig, size: int
) -> Slots:
    """Copies a page to the end of a row; the rows are donated.

    Args:
      slots: The rows.
      pool: What `make` made.
      place: int32: row, page, tokens in the row's cache after it.
      config: The model.
      size: Tokens of a page, static.
    """
    row, page, end = place

    def one(stored, pages, kind):
        part = jax.lax.dynamic_slice_in_dim(pages, page, 1)
        if kind == SLIDING:
            own = kv.row_of(stored, row)
            at = kv.last_positions(end.reshape(1), config.sliding_window) % stored.shape[1]
            return jax.lax.dynamic_update_slice_in_dim(stored, kv.write(own, part, at), row, 0)
        return jax.lax.dynamic_update_slice(stored, part, (row, end - size, 0, 0))

    cache, kinds = slots.cache, config.layer_types
    keys, values = pool
    after = KVCache(
        tuple(map(one, cache.keys, keys, kinds)),
        tuple(map(one, cache.values, values, kinds)),
        cache.length_B.at[row].set(end),
    )
    return settle(dataclasses.replace(slots, cache=after))
