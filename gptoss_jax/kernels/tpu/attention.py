"""Attention with sinks on a TPU: one kernel for decode, prefill, rings and full caches.

Keys are read in blocks of slots, and of those only the ones that hold a key which a block of
queries sees: which they are is worked out from the positions and prefetched as scalars, and the
grid is as long as the longest such range. So a step's cost follows what is seen, not what the cache
could hold. jax's own splash attention takes sinks too, but its masks are fixed at compile time, and
a chunk of a prompt begins at any position.

Cache and kernel agree on memory: XLA lays [B, S, K, 64] with slots along lanes (anything else would
pad 64 to 128), which is what the kernel reads; no copy is made. Nothing here has been timed: no TPU
was there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.tpu.moe import VMEM, in_place, result_shape

SLOTS = 1024  # of a step: 1 MB of keys and as much of values with 8 kv heads of 64
QUERIES = 64  # of a step: 512 rows of each kv head
ROWS = 16  # sublanes of a bfloat16 tile
LANES = 128
HIDDEN = -1e30  # a score that counts for nothing beside the sink's


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    sinks_N: Float[Array, " N"],
    q_positions_BT: Int[Array, "B T"],
    k_positions_BS: Int[Array, "B S"],
    window: int | None = None,
    extent_B: Int[Array, " B"] | None = None,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T N H"]:
    """softmax over the visible keys and one sink per head, whose share is dropped.

    Args:
      q_BTNH: Rotated queries.
      k_BSKH: Rotated keys, in any order of positions.
      v_BSKH: Values.
      sinks_N: One logit a query head.
      q_positions_BT: int32; a query at -1 sees nothing and gives zeros.
      k_positions_BS: int32, -1 where the slot holds nothing.
      window: Keys a query sees, itself included; None for all.
      extent_B: int32; slots from this one on are not read. None reads what the positions say.
      interpret: As pallas_call's: True or pltpu.InterpretParams to run without a TPU.

    Returns:
      [B, T, N, H] in q's dtype; scores, softmax and sums in float32 (ops/attention.py is the
      definition).
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    queries = min(T, QUERIES)
    count = -(-T // queries)  # blocks of queries, C below
    rows = -(-queries * G // ROWS) * ROWS
    slots = _slots(S)

    pad = ((0, 0), (0, count * queries - T))
    q_positions_BCt = jnp.pad(q_positions_BT, pad, constant_values=-1).reshape(B, count, queries)
    first_BC, blocks_BC = _ranges(q_positions_BCt, k_positions_BS, window, extent_B, slots)

    def by_rows(x, fill=0):
        """[B, C, t, K, G, ...] -> [B, C, K, rows, ...]."""
        x = jnp.moveaxis(x, 2, 3).reshape(B, count, x.shape[3], queries * G, -1)
        more = ((0, 0),) * 3 + ((0, rows - queries * G), (0, 0))
        return jnp.pad(x, more, constant_values=fill)

    q = jnp.pad(q_BTNH, (*pad, (0, 0), (0, 0))).reshape(B, count, queries, K, G, H)
    ones = jnp.ones((1, 1, 1, 1, G), jnp.int32)
    positions = by_rows(q_positions_BCt[..., None, None] * ones, -1)[:, :, 0]
    sinks_KG = sinks_N.astype(jnp.float32).reshape(K, G)
    sinks = jnp.broadcast_to(sinks_KG[:, None], (K, queries, G)).reshape(K, -1, 1)
    sinks = jnp.pad(sinks, ((0, 0), (0, rows - queries * G), (0, 0)))
    keys, values = (in_place(x.transpose(0, 2, 3, 1), interpret) for x in (k_BSKH, v_BSKH))

    def held(b, c, s, first, blocks):
        return b, first[b, c] + jnp.minimum(s, jnp.maximum(blocks[b, c] - 1, 0))

    def of_keys(*at):
        b, s = held(*at)
        return b, 0, 0, s

    def of_positions(*at):
        b, s = held(*at)
        return b, 0, s

    of_queries = pl.BlockSpec((1, 1, K, rows, H), lambda b, c, s, *_: (b, c, 0, 0, 0))
    out = pl.pallas_call(
        functools.partial(_attend, window=window, size=S, slots=slots),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, count, jnp.maximum(blocks_BC.max(), 1)),
            in_specs=[
                of_queries,
                pl.BlockSpec((1, 1, rows, 1), lambda b, c, s, *_: (b, c, 0, 0)),
                pl.BlockSpec((K, rows, 1), lambda b, c, s, *_: (0, 0, 0)),
                pl.BlockSpec((1, K, H, slots), of_keys),
                pl.BlockSpec((1, K, H, slots), of_keys),
                pl.BlockSpec((1, 1, slots), of_positions),
            ],
            out_specs=of_queries,
            scratch_shapes=[
                pltpu.VMEM((K, rows, 1), jnp.float32),
                pltpu.VMEM((K, rows, 1), jnp.float32),
                pltpu.VMEM((K, rows, H), jnp.float32),
            ],
        ),
        out_shape=result_shape((B, count, K, rows, H), q_BTNH.dtype, q, keys, values),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="attention",
    )(first_BC, blocks_BC, by_rows(q), positions, sinks, keys, values,
      k_positions_BS[:, None])  # fmt: skip
    out = out[..., : queries * G, :].reshape(B, count, K, queries, G, H)
    return jnp.moveaxis(out, 3, 2).reshape(B, count * queries, N, H)[:, :T]


def _slots(S: int) -> int:
    """Slots of a block: all if they are few, else a divisor of S where one is large enough."""
    if S <= SLOTS:
        return S
    found = [n for n in range(SLOTS, SLOTS // 4, -LANES) if S % n == 0]
    return found[0] if found else SLOTS


def _ranges(q_positions_BCt, k_positions_BS, window, extent_B, slots):
    """First block of slots, and how many, that each block of queries has to read: int32 [B, C]."""
    S = k_positions_BS.shape[1]
    known = jnp.where(q_positions_BCt < 0, jnp.iinfo(jnp.int32).max, q_positions_BCt)
    least, most = known.min(2)[..., None], q_positions_BCt.max(2)[..., None]
    position = k_positions_BS[:, None]
    seen_BCS = (position >= 0) & (position <= most)
    if window is not None:
        seen_BCS &= position > least - window
    slot = jnp.arange(S, dtype=jnp.int32)[None, None]
    if extent_B is not None:
        seen_BCS &= slot < extent_B[:, None, None]
    # unsigned: a floor division of signed scalars is a dozen operations on a TPU
    first = jnp.where(seen_BCS, slot, S).min(2).astype(jnp.uint32) // slots
    end = jnp.where(seen_BCS, slot + slots, 0).max(2).astype(jnp.uint32) // slots
    first, end = first.astype(jnp.int32), end.astype(jnp.int32)
    blocks = jnp.maximum(end - first, 0)
    return jnp.where(blocks > 0, first, 0), blocks


def _attend(first, blocks, q, q_positions, sinks, keys, values, k_positions, out, largest, total,
            sums, *, window, size, slots):  # fmt: skip
    """One block of slots for one block of queries: sums are scaled as the largest score grows."""
    b, c, s = (pl.program_id(i) for i in range(3))
    last = pl.num_programs(2) - 1
    heads, _, H = sums.shape

    @pl.when(s == 0)
    def _():
        # the sink is the first score; it has no value
        largest[...] = sinks[...]
        total[...] = jnp.ones_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(s < blocks[b, c])
    def _():
        query, key = q_positions[0, 0], k_positions[0]
        visible = (key >= 0) & (key <= query)
        if window is not None:
            visible &= key > query - window
        ragged = size % slots != 0
        slot = jax.lax.broadcasted_iota(jnp.int32, (1, slots), 1) + (first[b, c] + s) * slots
        if ragged:
            visible &= slot < size
        for head in range(heads):
            value = values[0, head]
            if ragged:  # beyond the end of the cache there is anything, and 0 * NaN is NaN
                value = jnp.where(slot < size, value.astype(jnp.float32), 0.0).astype(value.dtype)
            scores = _dot(q[0, 0, head], keys[0, head], 0) * H**-0.5
            scores = jnp.where(visible, scores, HIDDEN)
            before = largest[head]
            new = jnp.maximum(before, scores.max(-1, keepdims=True))
            weights = jnp.where(visible, jnp.exp(scores - new), 0.0)
            scale = jnp.exp(before - new)
            largest[head] = new
            total[head] = total[head] * scale + weights.sum(-1, keepdims=True)
            sums[head] = sums[head] * scale + _dot(weights.astype(value.dtype), value, 1)

    @pl.when(s == last)
    def _():
        out[0, 0] = (sums[...] / total[...]).astype(out.dtype)


def _dot(x, y, axis):
    """x times y along the last axis of x and `axis` of y, float32."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (((1,), (axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )
