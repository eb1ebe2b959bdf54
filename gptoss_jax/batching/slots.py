"""The rows of continuous batching on the device: a fixed number, each at its own place, and the
jitted programs by which one is read, begins, is copied and ends.

Every program has one shape, so that a row's numbers never depend on what the others do: `read`
reads a chunk of a prompt into a row, `admit` lets it generate. Caches are donated. Knows no
requests and no text.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from gptoss_jax import cache as kv
from gptoss_jax.cache import KVCache, make_cache
from gptoss_jax.config import SLIDING, GptOssConfig
from gptoss_jax.lora import Stack
from gptoss_jax.model import Params, hidden
from gptoss_jax.ops import LowRank
from gptoss_jax.sampling import BIAS_SLOTS, Sampling, SamplingArrays
from gptoss_jax.sharding import constrain, replicate

BIASES = BIAS_SLOTS[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where all rows stand.

    Attributes:
      cache: Of all tokens but the last.
      last_B: int32, the newest token, not yet in the cache.
      active_B: bool, rows that generate.
      recent_Bn: int32, the newest tokens that were chosen, -1 where there are none; as many as a
        row can be taken back.
      seen_BV: int8, 1 where the prompt holds the token.
      counts_BV: int32, occurrences in the output.
      adapter_B: int32, number in the stack of adapters, 0 for none.
      settings: How each row chooses.
    """

    cache: KVCache
    last_B: jax.Array
    active_B: jax.Array
    recent_Bn: jax.Array
    seen_BV: jax.Array
    counts_BV: jax.Array
    adapter_B: jax.Array
    settings: SamplingArrays


def settle(slots: Slots) -> Slots:
    """The rows held to their place on the context's mesh; themselves without a mesh."""

    def by_row(x):
        return constrain(x, "B" + "_" * (x.ndim - 1))

    return Slots(
        kv.constrain(slots.cache),
        by_row(slots.last_B),
        by_row(slots.active_B),
        by_row(slots.recent_Bn),
        constrain(slots.seen_BV, "BV"),
        constrain(slots.counts_BV, "BV"),
        by_row(slots.adapter_B),
        jax.tree.map(by_row, slots.settings),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def make(config: GptOssConfig, rows: int, capacity: int, back: int, dtype) -> Slots:
    """Rows that are all free.

    Args:
      config: The model.
      rows: How many.
      capacity: Tokens that a row can hold.
      back: How many tokens a row can be taken back, at least 1.
      dtype: Of keys and values.
    """

    def row(value, dtype: Any = jnp.float32):
        return jnp.full(rows, value, dtype)

    settings = SamplingArrays(
        row(0),
        row(0, jnp.int32),
        row(1),
        row(0),
        row(1),
        row(0),
        row(0),
        jnp.full((rows, BIASES), config.vocab_size, jnp.int32),
        jnp.zeros((rows, BIASES)),
        jnp.zeros((rows, 2), jnp.uint32),
    )
    cache = make_cache(config, rows, capacity, dtype, slack=back)
    V = config.vocab_size
    return settle(
        Slots(
            cache,
            row(0, jnp.int32),
            row(False, bool),
            jnp.full((rows, back), -1, jnp.int32),
            jnp.zeros((rows, V), jnp.int8),
            jnp.zeros((rows, V), jnp.int32),
            row(0, jnp.int32),
            settings,
        )
    )


def tables(stack: Stack | None, put) -> Params | None:
    """A stack of adapters as the programs take it: {"a", "b", "gain"} at every weight.

    Args:
      stack: The adapters; None for none.
      put: Puts a numpy array on the devices.
    """
    if stack is None:
        return None

    def walk(pairs, gains) -> Any:
        if set(pairs) == {"a", "b"}:
            return {**pairs, "gain": put(gains)}
        return {key: walk(child, gains[key]) for key, child in pairs.items()}

    return walk(stack.pairs, stack.gains)


def added(adapters: Any, numbers_B) -> Any:
    """What `model.hidden` adds for rows with these numbers."""
    if adapters is None:
        return None
    if set(adapters) == {"a", "b", "gain"}:
        gain_BR = constrain(adapters["gain"][numbers_B], "BR")
        return LowRank(adapters["a"], adapters["b"], gain_BR)
    return {key: added(child, numbers_B) for key, child in adapters.items()}


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("slots",))
def read(
    params: Params,
    slots: Slots,
    tokens_1T: Int[Array, "one T"],
    place: Int[Array, " four"],
    adapters: Params | None = None,
    *,
    config: GptOssConfig,
) -> tuple[Slots, Int[Array, " B"]]:
    """Reads a chunk of a prompt into a row that is not active.

    Args:
      params: The model.
      slots: Donated.
      tokens_1T: int32 ids, padded at the end.
      place: int32: the row, tokens in it so far, how many of these tokens count, and the number of
        its adapter.
      adapters: What `tables` made.

    Returns:
      The rows, and something small to wait for.
    """
    row, before, count, number = place
    T = tokens_1T.shape[1]

    cache = slots.cache
    keys, values = (tuple(kv.row_of(x, row) for x in some) for some in (cache.keys, cache.values))
    alone = KVCache(keys, values, before.reshape(1))
    mask_1T = (jnp.arange(T, dtype=jnp.int32) < count)[None]
    _, after, _ = hidden(
        params,
        tokens_1T,
        alone,
        config=config,
        mask=mask_1T,
        added=added(adapters, number.reshape(1)),
        sparse=True,
    )
    assert after is not None

    def put(whole, part, kind):
        if kind == SLIDING:
            return jax.lax.dynamic_update_slice(whole, part, (row, 0, 0, 0))
        # what a chunk changes is no more than its own length; near the end both slices move alike
        start = jnp.minimum(before, whole.shape[1] - T)
        part = jax.lax.dynamic_slice_in_dim(part, start, T, axis=1)
        return jax.lax.dynamic_update_slice(whole, part, (row, start, 0, 0))

    kinds = config.layer_types
    keys = tuple(map(put, cache.keys, after.keys, kinds))
    values = tuple(map(put, cache.values, after.values, kinds))
    length_B = cache.length_B.at[row].set(before + count)
    slots = settle(dataclasses.replace(slots, cache=KVCache(keys, values, length_B)))
    return slots, replicate(length_B + 0)


@dataclasses.dataclass(frozen=True)
class Start:
    """What a row starts from, as arrays of the host.

    Attributes:
      integers: int32: row, tokens in the cache, last token, top-k, adapter's number, choice.
      floats: float32: temperature, top-p, min-p, the three penalties.
      seed: uint32 [2].
      seen: int8 [V].
      bias_ids, bias: [BIASES].
    """

    integers: Any
    floats: Any
    seed: Any
    seen: Any
    bias_ids: Any
    bias: Any


jax.tree_util.register_dataclass(
    Start, [field.name for field in dataclasses.fields(Start)], meta_fields=[]
)


def start(
    row: int, prompt: np.ndarray, sampling: Sampling, choice: int, seed: int, number: int, V: int
) -> Start:
    """What `admit` takes, for a row whose cache holds the prompt but for its last token."""
    s = sampling
    seen = np.zeros(V, np.int8)
    if s.repetition_penalty != 1:
        seen[prompt] = 1
    bias_ids, bias = np.full(BIASES, V, np.int32), np.zeros(BIASES, np.float32)
    bias_ids[: len(s.logit_bias)] = list(s.logit_bias)
    bias[: len(s.logit_bias)] = list(s.logit_bias.values())
    numbers = [row, len(prompt) - 1, int(prompt[-1]), s.top_k, number, choice]
    penalties = [s.repetition_penalty, s.presence_penalty, s.frequency_penalty]
    return Start(
        np.array(numbers, np.int32),
        np.array([s.temperature, s.top_p, s.min_p, *penalties], np.float32),
        np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        seen,
        bias_ids,
        bias,
    )


@functools.partial(jax.jit, donate_argnames=("slots",))
def admit(slots: Slots, start: Start) -> Slots:
    """Lets a row generate; the rows are donated."""
    row, length, last, top_k, number, choice = start.integers
    temperature, top_p, min_p, repetition, presence, frequency = start.floats
    key = jax.random.fold_in(jax.random.wrap_key_data(start.seed), choice.astype(jnp.uint32))
    s = slots.settings
    given = SamplingArrays(
        temperature,
        top_k,
        top_p,
        min_p,
        repetition,
        presence,
        frequency,
        start.bias_ids,
        start.bias,
        jax.random.key_data(key),
    )
    cache = dataclasses.replace(slots.cache, length_B=slots.cache.length_B.at[row].set(length))
    return settle(
        Slots(
            cache,
            slots.last_B.at[row].set(last),
            slots.active_B.at[row].set(True),
            slots.recent_Bn.at[row].set(-1),
            slots.seen_BV.at[row].set(start.seen),
            slots.counts_BV.at[row].set(0),
            slots.adapter_B.at[row].set(number),
            jax.tree.map(lambda x, value: x.at[row].set(value), s, given),
        )
    )


@functools.partial(jax.jit, donate_argnames=("slots",))
def release(slots: Slots, free_B: Bool[Array, " B"]) -> Slots:
    """Frees rows; the rows are donated. A free row asks for nothing that costs time."""

    def reset(x, value):
        free = free_B.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(free, jnp.asarray(value, x.dtype), x)

    s, V = slots.settings, slots.seen_BV.shape[1]
    settings = SamplingArrays(
        reset(s.temperature_B, 0),
        reset(s.top_k_B, 0),
        reset(s.top_p_B, 1),
        reset(s.min_p_B, 0),
        reset(s.repetition_B, 1),
        reset(s.presence_B, 0),
        reset(s.frequency_B, 0),
        reset(s.bias_ids_BJ, V),
        s.bias_BJ,
        s.keys_B2,
    )
    cache = dataclasses.replace(slots.cache, length_B=reset(slots.cache.length_B, 0))
    active_B = slots.active_B & ~free_B
    slots = dataclasses.replace(slots, cache=cache, active_B=active_B, settings=settings)
    return settle(slots)


@functools.partial(jax.jit, donate_argnames=("slots",))
def copy(slots: Slots, pair: Int[Array, " two"]) -> Slots:
    """Copies the cache of a row into another; `pair` is (from, to); the rows are donated."""
    source, target = pair

    def moved(x):
        return jax.lax.dynamic_update_slice_in_dim(x, kv.row_of(x, source), target, 0)

    cache = slots.cache
    keys, values = (tuple(map(moved, some)) for some in (cache.keys, cache.values))
    return settle(dataclasses.replace(slots, cache=KVCache(keys, values, cache.length_B)))


@functools.partial(jax.jit, donate_argnames=("slots",))
def erase(slots: Slots, row: Int[Array, ""]) -> Slots:
    """Zeros in the cache of a row: what is not a number there would reach the next request, since 0
    times it is not 0.
    """

    def erased(x):
        return x.at[row].set(jnp.zeros(x.shape[1:], x.dtype))

    return settle(dataclasses.replace(slots, cache=jax.tree.map(erased, slots.cache)))
