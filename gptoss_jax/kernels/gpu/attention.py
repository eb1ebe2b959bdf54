"""Attention with sinks on a GPU: one Pallas-Triton kernel for decode, prefill, rings and full
caches.

A program has a block of queries with all heads of one kv head as the rows of its products (8 heads
of one token are padded to 16 rows), and reads keys in blocks of slots. Which blocks can be seen is
worked out ahead from the least and largest position in each, so that a step's cost follows what is
seen and not what the cache could hold. Where that gives few programs, as in decode, each block of
queries gets several: they take its blocks of slots in turn, and a second kernel combines them.

Positions may stand in any order. Knows arrays, no meshes. Nothing here has been timed: no GPU was
there.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import ManualAxisType
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.gpu.blocks import Tuning, at_hand

FLOAT32_ROWS = 16  # whose products hold their operands in registers too; 32 spill
SMALLEST = 16  # rows, slots and head size that tensor cores take
FEW_BLOCKS = 4  # of slots that one program reads rather than that a second kernel is started
LOG2_E = math.log2(math.e)
LEAST = -1e30  # a sink of -inf is taken as this
FAR = jnp.iinfo(jnp.int32).max

Segments = tuple[Int[Array, "B T"], Int[Array, "B S"]]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
      queries: Of a program.
      heads: Of a kv head, padded to a power of two; rows are (query, head) pairs.
      width: Of a head, padded to a power of two.
      slots: Of a step.
      splits: Programs that share the slots of one block of queries.
      warps: Of a program.
    """

    queries: int
    heads: int
    width: int
    slots: int
    splits: int
    warps: int = 4

    @property
    def rows(self) -> int:
        """Of a product."""
        return self.queries * self.heads


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    sinks_N: Float[Array, " N"],
    q_positions_BT: Int[Array, "B T"],
    k_positions_BS: Int[Array, "B S"],
    segments: Segments | None = None,
    window: int | None = None,
    *,
    chosen: Tuning | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax over the visible keys and one sink per head, whose share is dropped.

    Args:
      q_BTNH: Rotated queries.
      k_BSKH: Rotated keys, in any order of positions.
      v_BSKH: Values.
      sinks_N: One logit a query head.
      q_positions_BT: int32; a query at -1 sees nothing and gives zeros.
      k_positions_BS: int32, -1 where the slot holds nothing.
      segments: Segment ids of queries and keys; None for one segment.
      window: Keys a query sees, itself included; None for all.
      chosen: Block sizes; by default those of the card.
      interpret: Run without a GPU.

    Returns:
      [B, T, N, H] in q's dtype; scores, softmax and sums in float32 (ops/attention.py is the
      definition).
    """
    parts = q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS, segments
    return forward(*parts, window=window, norm=False, chosen=chosen, interpret=interpret)[0]


def forward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    sinks_N,
    q_positions_BT,
    k_positions_BS,
    segments=None,
    *,
    window: int | None,
    norm: bool = True,
    chosen: Tuning | None = None,
    interpret: bool = False,
):
    """`attention`, and with `norm` the logarithm of each row's total, sink included: float32 [B, T,
    N], else None.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    blocks = cut(B, T, S, K, N // K, H, q_BTNH.dtype, split=not norm, chosen=chosen)
    seen_BCs = seen(q_positions_BT, k_positions_BS, segments, window, blocks)
    first_BC, end_BC = extent(seen_BCs)
    count, splits = seen_BCs.shape[1], blocks.splits
    q = q_BTNH.reshape(B, T, K, N // K, H)
    sinks = sinks_N.reshape(K, N // K)
    inputs = q, k_BSKH, v_BSKH, sinks, q_positions_BT, k_positions_BS, first_BC, end_BC
    specs = [
        pl.BlockSpec((None, T, None, N // K, H), lambda i, h, b: (b, 0, h, 0, 0)),
        *_of_slots(S, H),
        pl.BlockSpec((None, N // K), lambda i, h, b: (h, 0)),
        *_positions(T, S),
        *_scalars(count, 2),
    ]
    if segments is not None:
        inputs, specs = (*inputs, *segments), [*specs, *_positions(T, S)]
    results, out_specs = results_of(blocks, (B, T, K, N // K, H), q.dtype, norm)
    found = pl.pallas_call(
        functools.partial(_attend, blocks=blocks, window=window, packed=segments is not None),
        grid=(count * splits, K, B),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=[result_shape(*result, *inputs) for result in results],
        compiler_params=compiler_params(q.dtype, blocks),
        interpret=interpret,
        name="attention",
    )(*inputs)
    if splits > 1:
        return combined(*found, sinks, q.dtype, blocks, interpret), None
    return found[0].reshape(B, T, N, H), found[1].reshape(B, T, N) if norm else None


def results_of(blocks: Blocks, shape, dtype, norm: bool = False):
    """Shapes with dtypes, and specs, of what a kernel leaves: the result (and each row's norm), or
    of every split the sums, their largest score and total.
    """
    B, T, K, G, H = shape
    ahead = () if blocks.splits == 1 else (blocks.splits,)

    def one(last, dtype):
        def at(i, h, b):
            return *(0 for _ in ahead), b, 0, h, 0, *(0 for _ in last)

        spec = pl.BlockSpec((*ahead, None, T, None, G, *last), at)
        return ((*ahead, B, T, K, G, *last), dtype), spec

    if ahead:
        found = [one(last, jnp.float32) for last in ((H,), (), ())]
    else:
        found = [one((H,), dtype)] + [one((), jnp.float32)] * norm
    results, specs = zip(*found, strict=True)
    return list(results), list(specs)


def cut(
    B: int,
    T: int,
    S: int,
    K: int,
    G: int,
    H: int,
    dtype,
    split: bool = True,
    chosen: Tuning | None = None,
) -> Blocks:
    """Blocks for these shapes; `chosen` by default as the card has it."""
    chosen = chosen or at_hand()
    heads, width = pl.next_power_of_2(G), max(SMALLEST, pl.next_power_of_2(H))
    most = chosen.attention_rows if jnp.dtype(dtype).itemsize == 2 else FLOAT32_ROWS
    most = max(SMALLEST, min(chosen.attention_rows, most * 64 // width))
    rows = min(most, max(SMALLEST, pl.next_power_of_2(T * heads)))
    queries, slots = max(1, rows // heads), chosen.attention_slots
    most = -(-S // slots)
    splits = 1
    if split and most > FEW_BLOCKS:
        wanted = chosen.attention_programs // (-(-T // queries) * K * B)
        splits = 1 << max(0, min(wanted, most).bit_length() - 1)
    return Blocks(queries, heads, width, slots, splits, chosen.attention_warps)


def seen(q_positions_BT, k_positions_BS, segments, window, blocks: Blocks):
    """Whether a block of queries may see a block of slots, by the extremes of each: bool [B, C,
    s].
    """

    def extremes(x, held, size):
        pad = (0, 0), (0, -x.shape[1] % size)
        x, held = (jnp.pad(y, pad).reshape(len(x), -1, size) for y in (x, held))
        return jnp.where(held, x, FAR).min(2), jnp.where(held, x, -1).max(2)

    q_held, k_held = q_positions_BT >= 0, k_positions_BS >= 0
    q_low, q_high = extremes(q_positions_BT, q_held, blocks.queries)
    k_low, k_high = extremes(k_positions_BS, k_held, blocks.slots)
    found = k_low[:, None] <= q_high[..., None]
    if window is not None:
        found &= k_high[:, None] > q_low[..., None] - window
    if segments is not None:
        q_low, q_high = extremes(segments[0], q_held, blocks.queries)
        k_low, k_high = extremes(segments[1], k_held, blocks.slots)
        found &= (k_low[:, None] <= q_high[..., None]) & (k_high[:, None] >= q_low[..., None])
    return found


def extent(seen_BCs):
    """First block of the last axis that is seen, and the one after the last: int32 [B, C]; the
    first lies behind the last where none is seen.
    """
    count = seen_BCs.shape[2]
    block = jnp.arange(count, dtype=jnp.int32)[None, None]
    first = jnp.where(seen_BCs, block, count).min(2)
    return first, jnp.where(seen_BCs, block + 1, 0).max(2)


def _of_slots(S, H):
    spec = pl.BlockSpec((None, S, None, H), lambda i, h, b: (b, 0, h, 0))
    return spec, spec


def _positions(*sizes):
    return [pl.BlockSpec((None, size), lambda i, h, b: (b, 0)) for size in sizes]


def _scalars(size, times):
    return _positions(*(size,) * times)


def compiler_params(dtype, blocks: Blocks) -> plgpu.CompilerParams:
    """As many steps in flight as 100 KB of shared memory hold."""
    step = 2 * blocks.slots * blocks.width * jnp.dtype(dtype).itemsize
    stages = max(1, min(3, (80 << 10) // step))
    return plgpu.CompilerParams(num_warps=blocks.warps, num_stages=stages)


def result_shape(shape: tuple[int, ...], dtype, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that an operand varies over, inside shard_map."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=axes))


@dataclasses.dataclass(frozen=True)
class Rows:
    """The (query, head) pairs of a block of queries: their places and which of them are there.

    Attributes:
      query, head: int32 [rows].
      held: bool [rows].
    """

    query: jax.Array
    head: jax.Array
    held: jax.Array

    def load(self, ref, other=0):
        """Of [T, G, H], [T, G], [T] or [G], one row each."""
        if len(ref.shape) == 3:
            at, mask = self.wide(ref)
            return plgpu.load(ref.at[at], mask=mask, other=other)
        return plgpu.load(ref.at[self.query, self.head], mask=self.held, other=other)

    def wide(self, ref):
        """Index and mask of [T, G, H], or of its first axes with H."""
        width = max(SMALLEST, pl.next_power_of_2(ref.shape[-1]))
        column = jnp.arange(width, dtype=jnp.int32)[None]
        mask = self.held[:, None] & (column < ref.shape[-1])
        return (self.query[:, None], self.head[:, None], column), mask

    def of_query(self, ref, other):
        """Of [T]."""
        return plgpu.load(ref.at[self.query], mask=self.held, other=other)

    def of_head(self, ref):
        """Of [G]."""
        return plgpu.load(ref.at[self.head], mask=self.held, other=0)


def rows_of(block, blocks: Blocks, T: int, G: int) -> Rows:
    """Rows of one block of queries."""
    row = jnp.arange(blocks.rows, dtype=jnp.int32)
    query = (row >> (blocks.heads.bit_length() - 1)) + block * blocks.queries
    head = row & (blocks.heads - 1)
    return Rows(query, head, (query < T) & (head < G))


def slots_of(block, blocks: Blocks, S: int):
    """Slots of one block, and which of them are there (None: all)."""
    slot = jnp.arange(blocks.slots, dtype=jnp.int32) + block * blocks.slots
    return slot, None if S % blocks.slots == 0 else slot < S


def load_slots(ref, slot, held):
    """[slots, H] of [S, H], zeros beyond."""
    width = max(SMALLEST, pl.next_power_of_2(ref.shape[1]))
    column = jnp.arange(width, dtype=jnp.int32)[None]
    mask = None if held is None else held[:, None]
    if width != ref.shape[1]:
        inside = jnp.broadcast_to(column < ref.shape[1], (len(slot), width))
        mask = inside if mask is None else mask & inside
    elif mask is not None:
        mask = jnp.broadcast_to(mask, (len(slot), width))
    return plgpu.load(ref.at[slot[:, None], column], mask=mask, other=None if mask is None else 0)


def load_numbers(ref, slot, held):
    """[slots] of [S], -1 beyond."""
    return plgpu.load(ref.at[slot], mask=held, other=None if held is None else -1)


def visible(q_position, k_position, window, q_segment=None, k_segment=None):
    """bool [rows, slots], or [slots, rows] if the queries come in the second axis."""
    found = (k_position >= 0) & (k_position <= q_position)
    if window is not None:
        found &= k_position > q_position - window
    return found if q_segment is None else found & (q_segment == k_segment)


def dot(x, y, transposed: bool = False):
    """x y, or x y^T, summed in float32."""
    return plgpu.dot(x, y, trans_b=transposed, precision=jax.lax.Precision.HIGHEST)


def _attend(q, keys, values, sinks, q_positions, k_positions, first, end, *rest,
            blocks, window, packed):  # fmt: skip
    """Some blocks of slots for one block of queries."""
    segments, out = (rest[:2], rest[2:]) if packed else (None, rest)
    T, G, H = q.shape
    block, split = place(blocks)
    rows = rows_of(block, blocks, T, G)
    query = rows.load(q)
    position = rows.of_query(q_positions, -1)[:, None]
    segment = rows.of_query(segments[0], -1)[:, None] if segments else None
    sink = sink_of(rows.of_head(sinks))

    def read(number):
        slot, held = slots_of(number, blocks, keys.shape[0])
        there = load_numbers(segments[1], slot, held)[None] if segments else None
        known = load_numbers(k_positions, slot, held)[None]
        shown = visible(position, known, window, segment, there)
        return load_slots(keys, slot, held), load_slots(values, slot, held), shown

    found = average(query, sink, first[block], end[block], split, blocks, H, read)
    leave(out, rows, sink, split, blocks, *found)


def place(blocks: Blocks):
    """Which block of queries this program has, and which split."""
    number = pl.program_id(0)
    return number >> (blocks.splits.bit_length() - 1), number & (blocks.splits - 1)


def sink_of(logits):
    """As scores are here: in powers of two, and finite."""
    return jnp.maximum(logits.astype(jnp.float32), LEAST) * LOG2_E


def average(query, sink, first, end, split, blocks: Blocks, H: int, read):
    """Largest score [rows], total [rows] and sums [rows, width] over every `splits`-th block of
    slots from `split` on; sums are scaled as the largest score grows.

    The sink is the first score, so that the largest is finite; it counts in no total.

    Args:
      query: [rows, width].
      sink: [rows], as `sink_of` gives it.
      first, end: Blocks of slots that the queries see.
      split: Number of this program among those that share them.
      blocks: How the work is cut.
      H: Size of a head.
      read: Number of a block -> keys, values [slots, width], and which are visible [rows, slots].
    """
    doublings = blocks.splits.bit_length() - 1
    steps = (jnp.maximum(end - first - split, 0) + blocks.splits - 1) >> doublings

    def step(i, carry):
        largest, total, sums = carry
        key, value, shown = read(first + split + i * blocks.splits)
        scores = dot(query, key, transposed=True) * (H**-0.5 * LOG2_E)
        scores = jnp.where(shown, scores, -jnp.inf)
        new = jnp.maximum(largest, scores.max(1))
        weights, scale = jnp.exp2(scores - new[:, None]), jnp.exp2(largest - new)
        sums = sums * scale[:, None] + dot(weights.astype(value.dtype), value)
        return new, total * scale + weights.sum(1), sums

    empty = jnp.zeros((blocks.rows, blocks.width), jnp.float32)
    return jax.lax.fori_loop(0, steps, step, (sink, jnp.zeros_like(sink), empty))


def leave(out, rows: Rows, sink, split, blocks: Blocks, largest, total, sums):
    """Stores what `results_of` says."""
    at, mask = rows.wide(out[0])
    if blocks.splits == 1:
        total += jnp.exp2(sink - largest)
        plgpu.store(out[0].at[at], (sums / total[:, None]).astype(out[0].dtype), mask=mask)
        if len(out) > 1:
            norm = largest / LOG2_E + jnp.log(total)
            plgpu.store(out[1].at[rows.query, rows.head], norm, mask=rows.held)
        return
    plgpu.store(out[0].at[(split, *at)], sums, mask=mask)
    for result, value in zip(out[1:], (largest, total), strict=True):
        plgpu.store(result.at[split, rows.query, rows.head], value, mask=rows.held)


def combined(sums, largest, total, sinks, dtype, blocks, interpret):
    """The splits of each row together: [B, T, N, H]."""
    splits, B, T, K, G, H = sums.shape
    N = K * G
    sums = sums.reshape(splits, B, T, N, H)
    largest, total = (x.reshape(splits, B, T, N) for x in (largest, total))
    by_head = pl.BlockSpec((splits, None, None, None), lambda n, t, b: (0, b, t, n))
    return pl.pallas_call(
        functools.partial(_combine, blocks=blocks),
        grid=(N, T, B),
        in_specs=[
            pl.BlockSpec((splits, None, None, None, H), lambda n, t, b: (0, b, t, n, 0)),
            by_head,
            by_head,
            pl.BlockSpec((None,), lambda n, t, b: (n,)),
        ],
        out_specs=pl.BlockSpec((None, None, None, H), lambda n, t, b: (b, t, n, 0)),
        out_shape=result_shape((B, T, N, H), dtype, sums, sinks),
        compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="attention_combine",
    )(sums, largest, total, sinks.reshape(N))


def _combine(sums, largest, total, sink, out, *, blocks):
    H = out.shape[0]
    split = jnp.arange(blocks.splits, dtype=jnp.int32)
    column = jnp.arange(blocks.width, dtype=jnp.int32)
    part = plgpu.load(
        sums.at[split[:, None], column[None]],
        mask=jnp.broadcast_to(column[None] < H, (blocks.splits, blocks.width)),
        other=0,
    )
    highest = largest[...]
    most = highest.max(0)
    scale = jnp.exp2(highest - most)
    whole = (total[...] * scale).sum(0) + jnp.exp2(sink_of(sink[...]) - most)
    value = (part * scale[:, None]).sum(0) / whole
    plgpu.store(out.at[column], value.astype(out.dtype), mask=column < H)
