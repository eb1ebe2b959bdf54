"""One token for each sequence, from projections to the attention's output in one kernel: rotate
query and key, store key and value in the cache, attend.

A program that reads the slot where another one stores takes the new row from the projections, so
that no order between programs matters. Nothing here has been timed: no GPU was there.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.gpu.attention import (
    average,
    combined,
    compiler_params,
    cut,
    extent,
    leave,
    load_numbers,
    load_slots,
    place,
    result_shape,
    results_of,
    rows_of,
    seen,
    sink_of,
    slots_of,
    visible,
)
from gptoss_jax.kernels.gpu.blocks import Tuning


def attend_one(
    q_B1NH: Float[Array, "B 1 N H"],
    k_B1KH: Float[Array, "B 1 K H"],
    v_B1KH: Float[Array, "B 1 K H"],
    cos_B1h: Float[Array, "B 1 h"],
    sin_B1h: Float[Array, "B 1 h"],
    keys_BSKH: Float[Array, "B S K H"],
    values_BSKH: Float[Array, "B S K H"],
    slots_B: Int[Array, " B"],
    sinks_N: Float[Array, " N"],
    q_positions_B1: Int[Array, "B 1"],
    k_positions_BS: Int[Array, "B S"],
    window: int | None = None,
    *,
    chosen: Tuning | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Attention of one new token to the cache and itself.

    Args:
      q_B1NH, k_B1KH, v_B1KH: Not rotated.
      cos_B1h, sin_B1h: float32, of the token's position.
      keys_BSKH, values_BSKH: The cache's, written over.
      slots_B: int32, where the new row goes; the last slot for S and more.
      sinks_N: One logit a query head.
      q_positions_B1: int32.
      k_positions_BS: int32, after the new row is stored.
      window: Keys a query sees, itself included; None for all.
      chosen: Block sizes; by default those of the card.
      interpret: Run without a GPU.

    Returns:
      [B, 1, N, H] in q's dtype, and the new keys and values.
    """
    (B, _, N, H), (S, K) = q_B1NH.shape, keys_BSKH.shape[1:3]
    G, dtype = N // K, keys_BSKH.dtype
    blocks = cut(B, 1, S, K, G, H, dtype, chosen=chosen)
    bounds = extent(seen(q_positions_B1, k_positions_BS, None, window, blocks))
    q = q_B1NH.reshape(B, 1, K, G, H)
    sinks = sinks_N.reshape(K, G)

    def numbers(*shape):
        return pl.BlockSpec((None, *shape), lambda i, h, b: (b, *(0 for _ in shape)))

    of_cache = pl.BlockSpec((None, S, None, H), lambda i, h, b: (b, 0, h, 0))
    of_row = pl.BlockSpec((None, None, None, H), lambda i, h, b: (b, 0, h, 0))
    inputs = (
        q, k_B1KH.astype(dtype), v_B1KH.astype(dtype), cos_B1h[:, 0], sin_B1h[:, 0], keys_BSKH,
        values_BSKH, slots_B[:, None], sinks, q_positions_B1, k_positions_BS,
        *bounds,
    )  # fmt: skip
    results, specs = results_of(blocks, (B, 1, K, G, H), q.dtype)
    results += [(keys_BSKH.shape, dtype)] * 2
    made = pl.pallas_call(
        functools.partial(_attend_one, blocks=blocks, window=window),
        grid=(blocks.splits, K, B),
        in_specs=[
            pl.BlockSpec((None, 1, None, G, H), lambda i, h, b: (b, 0, h, 0, 0)),
            of_row,
            of_row,
            numbers(H // 2),
            numbers(H // 2),
            of_cache,
            of_cache,
            numbers(1),
            pl.BlockSpec((None, G), lambda i, h, b: (h, 0)),
            numbers(1),
            numbers(S),
            numbers(1),
            numbers(1),
        ],
        out_specs=[*specs, of_cache, of_cache],
        out_shape=[result_shape(*result, *inputs) for result in results],
        input_output_aliases={5: len(specs), 6: len(specs) + 1},
        compiler_params=compiler_params(dtype, blocks),
        interpret=interpret,
        name="attention_step",
    )(*inputs)
    found, keys, values = made[:-2], *made[-2:]
    if blocks.splits > 1:
        sums, largest, total = found
        return combined(sums, largest, total, sinks, q.dtype, blocks, interpret), keys, values
    return found[0].reshape(B, 1, N, H), keys, values


def _attend_one(q, k, v, cos, sin, keys, values, slot, sinks, q_position, k_positions, first, end,
                *results, blocks, window):  # fmt: skip
    *out, new_keys, new_values = results
    _, G, H = q.shape
    half = H // 2
    _, split = place(blocks)
    column = jnp.arange(blocks.width, dtype=jnp.int32)
    there = column < H
    low = column < half
    partner = jnp.where(low, column + half, column - half)
    angle = jnp.where(low, column, column - half)
    turn, aside = (plgpu.load(x.at[angle], mask=there, other=0)[None] for x in (cos, sin))
    aside = jnp.where(low[None], -aside, aside)

    def rotated(x, other):
        return (x.astype(jnp.float32) * turn + other.astype(jnp.float32) * aside).astype(x.dtype)

    rows = rows_of(0, blocks, 1, G)
    query, head = rows.query[:, None], rows.head[:, None]
    mask = rows.held[:, None] & there[None]
    own, other = (
        plgpu.load(q.at[query, head, at[None]], mask=mask, other=0) for at in (column, partner)
    )
    key, aside_key, value = (
        plgpu.load(x.at[at], mask=there, other=0)[None]
        for x, at in ((k, column), (k, partner), (v, column))
    )
    query, key = rotated(own, other), rotated(key, aside_key)
    at = jnp.minimum(slot[0], keys.shape[0] - 1)

    @pl.when(split == 0)
    def _():
        for result, row in ((new_keys, key), (new_values, value)):
            plgpu.store(
                result.at[jnp.full((1, 1), at, jnp.int32), column[None]], row, mask=there[None]
            )

    position = rows.of_query(q_position, -1)[:, None]

    def read(number):
        slot, held = slots_of(number, blocks, keys.shape[0])
        known = load_numbers(k_positions, slot, held)[None]
        new = (slot == at)[:, None]
        stored = (
            jnp.where(new, row, load_slots(x, slot, held))
            for row, x in ((key, keys), (value, values))
        )
        return *stored, visible(position, known, window)

    sink = sink_of(rows.of_head(sinks))
    found = average(query, sink, first[0], end[0], split, blocks, H, read)
    leave(out, rows, sink, split, blocks, *found)
