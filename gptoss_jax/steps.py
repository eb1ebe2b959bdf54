"""The jitted steps of generation: prefill a chunk, decode some tokens on the device.

One decode step serves both loops: `decode` runs up to `size` of them on the device, and streaming
calls it with a smaller `limit`, which does not recompile. Caches and state are donated. Knows no
text and no requests.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import cache as kv
from gptoss_jax.cache import KVCache
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model import Params, hidden, unembed
from gptoss_jax.sampling import SamplingArrays, logprobs, sample
from gptoss_jax.sharding import constrain, replicate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a batch of generations stands.

    Attributes:
      cache: Of all tokens so far.
      logits_BV: float32, of the next token.
      seen_BV: int8, 1 where the prompt holds the token.
      counts_BV: int32, occurrences in the output.
      done_B: bool, rows that have stopped.
    """

    cache: KVCache
    logits_BV: jax.Array
    seen_BV: jax.Array
    counts_BV: jax.Array
    done_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What `decode` made: the first `steps` columns are set; a row's tokens end with its stop
    token.

    Attributes:
      tokens_Bn: int32, -1 after a row has stopped.
      logprobs_Bn: float32 of the chosen tokens (0 unless asked for).
      top_ids_Bnk, top_logprobs_Bnk: The likeliest tokens.
      stopped_B: bool, rows whose last token is a stop token.
      steps: int32, columns made.
    """

    tokens_Bn: jax.Array
    logprobs_Bn: jax.Array
    top_ids_Bnk: jax.Array
    top_logprobs_Bnk: jax.Array
    stopped_B: jax.Array
    steps: jax.Array


def settle(state: State) -> State:
    """The state held to its place on the context's mesh, so that every step leaves it where the
    next one expects it; itself without a mesh.
    """
    return State(
        kv.constrain(state.cache),
        constrain(state.logits_BV, "BV"),
        constrain(state.seen_BV, "BV"),
        constrain(state.counts_BV, "BV"),
        constrain(state.done_B, "B"),
    )


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache", "last_BD"))
def prefill(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    cache: KVCache,
    last_BD: Float[Array, "B D"],
    added: Params | None = None,
    *,
    config: GptOssConfig,
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Reads one chunk of the prompts into the cache.

    Args:
      params: The model.
      tokens_BT: int32 ids.
      mask_BT: False for padding; a row may be padding altogether.
      cache: Of the chunks before; donated.
      last_BD: Hidden state of each row's last token so far; donated.
      added: Low-rank additions as `model.apply` takes them, here and below.

    Returns:
      The cache and the hidden state of each row's last token.
    """
    x_BTD, after, _ = hidden(params, tokens_BT, cache, config=config, mask=mask_BT, added=added)
    assert after is not None
    steps = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    index_B = jnp.where(mask_BT, steps, -1).max(1)
    found = jnp.take_along_axis(x_BTD, jnp.maximum(index_B, 0)[:, None, None], axis=1)[:, 0]
    return after, constrain(jnp.where((index_B >= 0)[:, None], found, last_BD), "BD")


@functools.partial(jax.jit, donate_argnames=("cache",))
def start(params: Params, cache: KVCache, last_BD, seen_BV, done_B, added=None) -> State:
    """State after prefill; the cache is donated."""
    logits_BV = unembed(params, last_BD, added)
    return settle(State(cache, logits_BV, seen_BV, jnp.zeros(logits_BV.shape, jnp.int32), done_B))


@functools.partial(jax.jit, static_argnames=("copies",))
def repeat(rows, copies: int):
    """Every row of cache, last_BD, seen_BV and done_B `copies` times: n completions share one
    prefill.
    """
    cache, last_BD, seen_BV, done_B = jax.tree.map(
        functools.partial(jnp.repeat, repeats=copies, axis=0), rows
    )
    last_BD, done_B = constrain(last_BD, "BD"), constrain(done_B, "B")
    return kv.constrain(cache), last_BD, constrain(seen_BV, "BV"), done_B


def step(
    params: Params,
    state: State,
    settings: SamplingArrays,
    stops_BJ,
    added=None,
    *,
    config: GptOssConfig,
):
    """One decode step: choose a token from the logits, and read it.

    Returns:
      The new state and the chosen tokens int32 [B], -1 for rows that had stopped before.
    """
    tokens_B = sample(
        state.logits_BV, settings, state.seen_BV, state.counts_BV, state.cache.length_B
    )
    rows = jnp.arange(tokens_B.shape[0], dtype=jnp.int32)
    counts_BV = state.counts_BV.at[rows, tokens_B].add((~state.done_B).astype(jnp.int32))
    out_B = jnp.where(state.done_B, -1, tokens_B)
    done_B = state.done_B | (tokens_B[:, None] == stops_BJ).any(1)
    x_B1D, cache, _ = hidden(
        params,
        tokens_B[:, None],
        state.cache,
        config=config,
        mask=~state.done_B[:, None],
        added=added,
    )
    assert cache is not None
    logits_BV = unembed(params, x_B1D[:, 0], added)
    return settle(State(cache, logits_BV, state.seen_BV, counts_BV, done_B)), out_B


@functools.partial(jax.jit, static_argnames=("config", "size", "top"), donate_argnames=("state",))
def decode(
    params: Params,
    state: State,
    settings: SamplingArrays,
    stops_BJ: Int[Array, "B J"],
    limit: Int[Array, ""],
    added: Params | None = None,
    *,
    config: GptOssConfig,
    size: int,
    top: int | None = None,
) -> tuple[State, Output]:
    """Decodes up to `limit` tokens for every row on the device; ends early when all rows have
    stopped.

    Args:
      params: The model.
      state: Donated.
      settings: Sampling settings of each row.
      stops_BJ: Ids that end a row, -1 for none.
      limit: Steps to make, at most `size`; a change does not recompile.
      added: As in `prefill`; other adapters of the same stack do not recompile.
      size: Columns of the output, static.
      top: None for no log probabilities, else how many of the likeliest to report, static.

    Returns:
      The new state and the output.
    """
    B = state.done_B.shape[0]
    k = top or 0
    empty = Output(
        jnp.full((B, size), -1, jnp.int32),
        jnp.zeros((B, size)),
        jnp.zeros((B, size, k), jnp.int32),
        jnp.zeros((B, size, k)),
        state.done_B,
        jnp.int32(0),
    )

    def running(carry):
        state, out = carry
        return (out.steps < limit) & ~state.done_B.all()

    def body(carry):
        state, out = carry
        logits_BV, i = state.logits_BV, out.steps
        state, tokens_B = step(params, state, settings, stops_BJ, added, config=config)
        tokens = jax.lax.dynamic_update_slice_in_dim(out.tokens_Bn, tokens_B[:, None], i, axis=1)
        if top is None:
            return state, dataclasses.replace(
                out, tokens_Bn=tokens, stopped_B=state.done_B, steps=i + 1
            )
        chosen_B, ids_Bk, values_Bk = logprobs(logits_BV, jnp.maximum(tokens_B, 0), k)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=1)
        columns = [
            (out.logprobs_Bn, chosen_B),
            (out.top_ids_Bnk, ids_Bk),
            (out.top_logprobs_Bnk, values_Bk),
        ]
        chosen, ids, values = (put(old, new[:, None]) for old, new in columns)
        return state, Output(tokens, chosen, ids, values, state.done_B, i + 1)

    state, out = jax.lax.while_loop(running, body, (state, empty))
    return state, replicate(out)


@functools.partial(jax.jit, static_argnames=("config",))
def score(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    added: Params | None = None,
    *,
    config: GptOssConfig,
):
    """Float32 logits [B, T, V] of whole sequences, without a cache."""
    x_BTD, _, _ = hidden(params, tokens_BT, config=config, mask=mask_BT, added=added)
    return unembed(params, x_BTD, added)
