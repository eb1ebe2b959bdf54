"""The gradient of attention on a GPU: two kernels, which make the weights again from the logarithm
of each row's total instead of keeping them (Dao 2023, FlashAttention-2, algorithm 2).

One has a block of queries and goes over keys, for the queries' gradient; the other has a block of
keys and goes over the queries that see them, for the keys' and values'. Blocks that cannot be seen
are skipped as in attention.py. Nothing here has been timed: no GPU was there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gptoss_jax.kernels.gpu.attention import (
    LOG2_E,
    SMALLEST,
    Blocks,
    compiler_params,
    cut,
    dot,
    extent,
    load_numbers,
    load_slots,
    result_shape,
    rows_of,
    seen,
    slots_of,
    visible,
)
from gptoss_jax.kernels.gpu.blocks import Tuning

ROWS = 64  # of a product: scores are made twice and two sums kept, in the same registers


def backward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    sinks_N,
    q_positions_BT,
    k_positions_BS,
    segments,
    out_BTNH,
    norm_BTN,
    d_out_BTNH,
    *,
    window: int | None,
    interpret: bool = False,
):
    """Gradients of `attention.forward`.

    Args:
      q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS, segments, window: As given to
        it.
      out_BTNH, norm_BTN: Its results.
      d_out_BTNH: Gradient of its first result.
      interpret: Run without a GPU.

    Returns:
      Those of q, k and v in their dtypes, and of the sinks for each row of the batch, float32 [B,
      N].
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    G = N // K
    blocks = cut(B, T, S, K, G, H, q_BTNH.dtype, split=False, chosen=Tuning())
    few = max(1, max(SMALLEST, ROWS) // blocks.heads)
    blocks = dataclasses.replace(blocks, queries=min(blocks.queries, few))
    d_out_BTNH = d_out_BTNH.astype(q_BTNH.dtype)
    mean_BTN = (d_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(-1)
    share_BTN = jnp.exp(sinks_N.astype(jnp.float32)[None, None] - norm_BTN)
    d_sinks_BN = -(share_BTN * mean_BTN).sum(1)

    q, d_out = (x.reshape(B, T, K, G, H) for x in (q_BTNH, d_out_BTNH))
    norm, mean = (x.reshape(B, T, K, G) for x in (norm_BTN, mean_BTN))
    seen_BCs = seen(q_positions_BT, k_positions_BS, segments, window, blocks)
    inputs = [q, d_out, norm, mean, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS]
    inputs += segments or []
    of_rows = pl.BlockSpec((None, T, None, G, H), lambda i, h, b: (b, 0, h, 0, 0))
    of_norm = pl.BlockSpec((None, T, None, G), lambda i, h, b: (b, 0, h, 0))
    of_slots = pl.BlockSpec((None, S, None, H), lambda i, h, b: (b, 0, h, 0))

    def numbers(size):
        return pl.BlockSpec((None, size), lambda i, h, b: (b, 0))

    specs = [of_rows, of_rows, of_norm, of_norm, of_slots, of_slots, numbers(T), numbers(S)]
    specs += [numbers(T), numbers(S)] if segments else []

    def run(kernel, seen, results, out_specs):
        bounds = extent(seen)
        count = seen.shape[1]
        return pl.pallas_call(
            functools.partial(kernel, blocks=blocks, window=window, packed=segments is not None),
            grid=(count, K, B),
            in_specs=[numbers(count), numbers(count), *specs],
            out_specs=out_specs,
            out_shape=[result_shape(x.shape, x.dtype, *inputs) for x in results],
            compiler_params=compiler_params(q.dtype, blocks),
            interpret=interpret,
            name=kernel.__name__.lstrip("_"),
        )(*bounds, *inputs)

    (d_q,) = run(_attention_of_queries, seen_BCs, [q], [of_rows])
    d_k, d_v = run(
        _attention_of_keys, seen_BCs.swapaxes(1, 2), [k_BSKH, v_BSKH], [of_slots, of_slots]
    )
    return d_q.reshape(B, T, N, H), d_k, d_v, d_sinks_BN


class _Queries:
    """What a block of queries brings."""

    def __init__(self, block, blocks: Blocks, q, d_out, norm, mean, q_positions, segments):
        T, G, self.size = q.shape
        self.rows = rows_of(block, blocks, T, G)
        self.q, self.d_out = self.rows.load(q), self.rows.load(d_out)
        self.norm, self.mean = self.rows.load(norm) * LOG2_E, self.rows.load(mean)
        self.position = self.rows.of_query(q_positions, -1)
        self.segment = self.rows.of_query(segments[0], -1) if segments else None


def _weights(scores, shown, norm):
    return jnp.exp2(jnp.where(shown, scores * LOG2_E, -jnp.inf) - norm)


def _attention_of_queries(first, end, q, d_out, norm, mean, keys, values, q_positions, k_positions,
                          *rest, blocks, window, packed):  # fmt: skip
    *segments, d_q = rest
    block = pl.program_id(0)
    own = _Queries(block, blocks, q, d_out, norm, mean, q_positions, segments)
    S, scale = keys.shape[0], own.size**-0.5
    segment = own.segment[:, None] if own.segment is not None else None

    def step(i, sums):
        slot, held = slots_of(first[block] + i, blocks, S)
        there = load_numbers(segments[1], slot, held)[None] if packed else None
        position = load_numbers(k_positions, slot, held)[None]
        shown = visible(own.position[:, None], position, window, segment, there)
        key = load_slots(keys, slot, held)
        weights = _weights(dot(own.q, key, transposed=True) * scale, shown, own.norm[:, None])
        d_weights = dot(own.d_out, load_slots(values, slot, held), transposed=True)
        d_scores = weights * (d_weights - own.mean[:, None]) * scale
        return sums + dot(d_scores.astype(key.dtype), key)

    empty = jnp.zeros((blocks.rows, blocks.width), jnp.float32)
    sums = jax.lax.fori_loop(0, jnp.maximum(end[block] - first[block], 0), step, empty)
    at, mask = own.rows.wide(q)
    plgpu.store(d_q.at[at], sums.astype(d_q.dtype), mask=mask)


def _attention_of_keys(first, end, q, d_out, norm, mean, keys, values, q_positions, k_positions,
                       *rest, blocks, window, packed):  # fmt: skip
    *segments, d_k, d_v = rest
    block = pl.program_id(0)
    S, H = keys.shape
    scale = H**-0.5
    slot, held = slots_of(block, blocks, S)
    key, value = load_slots(keys, slot, held), load_slots(values, slot, held)
    position = load_numbers(k_positions, slot, held)[:, None]
    segment = load_numbers(segments[1], slot, held)[:, None] if packed else None

    def step(i, carry):
        sums_k, sums_v = carry
        own = _Queries(first[block] + i, blocks, q, d_out, norm, mean, q_positions, segments)
        there = own.segment[None] if own.segment is not None else None
        shown = visible(own.position[None], position, window, there, segment)
        weights = _weights(dot(key, own.q, transposed=True) * scale, shown, own.norm[None])
        d_weights = dot(value, own.d_out, transposed=True)
        d_scores = weights * (d_weights - own.mean[None]) * scale
        sums_v += dot(weights.astype(value.dtype), own.d_out)
        return sums_k + dot(d_scores.astype(key.dtype), own.q), sums_v

    empty = jnp.zeros((blocks.slots, blocks.width), jnp.float32)
    steps = jnp.maximum(end[block] - first[block], 0)
    column = jnp.arange(blocks.width, dtype=jnp.int32)[None]
    mask = jnp.broadcast_to(column < H, empty.shape)
    if held is not None:
        mask &= held[:, None]
    for result, sums in zip((d_k, d_v), jax.lax.fori_loop(0, steps, step, (empty, empty)),
                            strict=True):  # fmt: skip
        plgpu.store(result.at[slot[:, None], column], sums.astype(result.dtype), mask=mask)
