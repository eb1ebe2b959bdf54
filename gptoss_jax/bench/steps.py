"""The steps that `Model.generate` makes, called one by one so that each can be timed: the same
jitted programs, chunks and cache sizes.

Knows how generation is driven; knows no clock.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import cache as kv
from gptoss_jax import sharding, steps
from gptoss_jax.cache import KVCache, make_cache
from gptoss_jax.engine import CHUNKS, DECODE, MIN_CAPACITY, Model
from gptoss_jax.errors import GptOssError
from gptoss_jax.sampling import Sampling, SamplingArrays, to_arrays
from gptoss_jax.steps import State


@contextlib.contextmanager
def on_mesh(model: Model) -> Iterator[None]:
    """Where steps find the model's mesh."""
    with contextlib.nullcontext() if model.mesh is None else jax.set_mesh(model.mesh):
        yield


def prompts(model: Model, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random ids int32 [batch, length], another prompt in every row."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, model.config.vocab_size, (batch, length), np.int32)


def capacity_for(model: Model, total: int) -> int:
    """Cache slots that the engine takes for rows of `total` tokens.

    Raises:
      GptOssError: They do not fit into the model's context.
    """
    if total > model.max_context:
        raise GptOssError(
            f"{total} tokens of prompt and output: the context is {model.max_context}"
        )
    return min(model.max_context, max(MIN_CAPACITY, 1 << (total - 1).bit_length()))


def prefill(model: Model, tokens_BT: np.ndarray, capacity: int) -> State:
    """Reads the prompts chunk by chunk, as `generate` does.

    Args:
      model: The model.
      tokens_BT: int32 ids, no padding.
      capacity: Slots of the cache.
    """
    batch, length = tokens_BT.shape
    with on_mesh(model):
        cache, last_BD = _empty(model, batch, capacity)
        for at in range(0, length, CHUNKS[-1]):
            part = tokens_BT[:, at : at + CHUNKS[-1]]
            width = next(n for n in CHUNKS if n >= part.shape[1])
            mask = np.zeros((batch, width), bool)
            mask[:, : part.shape[1]] = True
            padded = np.pad(part, ((0, 0), (0, width - part.shape[1])))
            ids, mask = (put(model, x, "BT") for x in (padded, mask))
            cache, last_BD = steps.prefill(
                model.params, ids, mask, cache, last_BD, None, config=model.config
            )
        seen = np.zeros((batch, model.config.vocab_size), np.int8)
        np.put_along_axis(seen, tokens_BT, 1, axis=1)
        done = put(model, np.zeros(batch, bool), "B")
        return steps.start(model.params, cache, last_BD, put(model, seen, "BV"), done, None)


def greedy(model: Model, batch: int) -> tuple[SamplingArrays, jax.Array]:
    """Settings and stop ids of rows that take the likeliest token and never end."""
    settings = to_arrays(
        [Sampling(temperature=0, seed=0)] * batch, [0] * batch, model.config.vocab_size
    )
    return settings, jnp.full((batch, 4), -1, jnp.int32)


def decode(model: Model, state: State, settings, count: int) -> tuple[State, steps.Output]:
    """Up to 64 tokens of every row in one call, as `generate` makes them; the state is donated.

    Args:
      model: The model.
      state: Where the rows stand.
      settings: As `greedy` gives them.
      count: Tokens, at most engine.DECODE.
    """
    with on_mesh(model):
        return steps.decode(
            model.params,
            state,
            *settings,
            jnp.int32(count),
            None,
            config=model.config,
            size=DECODE,
            top=None,
        )


def state_at(model: Model, batch: int, context: int, capacity: int) -> State:
    """A state whose cache says that it holds `context` tokens; they are all zeros. Its steps cost
    what those after a real prompt do, and no prompt has to be read.
    """
    with on_mesh(model):
        return _at(model.config, batch, capacity, model.params["embedding"].dtype, context)


def put(model: Model, x: np.ndarray, letters: str) -> jax.Array:
    """An array of the host on the model's devices."""
    return jnp.asarray(x) if model.mesh is None else sharding.put(x, letters, model.mesh)


def _empty(model: Model, batch: int, capacity: int) -> tuple[KVCache, jax.Array]:
    return _zeros(model.config, batch, capacity, model.params["embedding"].dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zeros(config, batch, capacity, dtype):
    last_BD = sharding.constrain(jnp.zeros((batch, config.hidden_size), dtype), "BD")
    return kv.constrain(make_cache(config, batch, capacity, dtype)), last_BD


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _at(config, batch, capacity, dtype, context):
    cache = make_cache(config, batch, capacity, dtype)
    cache = KVCache(cache.keys, cache.values, jnp.full(batch, context, jnp.int32))
    logits_BV = jnp.zeros((batch, config.vocab_size), jnp.float32)
    seen_BV, counts_BV = (jnp.zeros(logits_BV.shape, kind) for kind in (jnp.int8, jnp.int32))
    return steps.settle(State(cache, logits_BV, seen_BV, counts_BV, jnp.zeros(batch, bool)))
