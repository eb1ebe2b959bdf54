"""The experts' feed-forward on a TPU: two kernels, gate and up with SwiGLU, then down with the
weighted sum.

An expert that some row chose is read from memory once, whatever the number of rows, and the others
not at all: a list of visits (an expert, a block of rows) is prefetched as scalars and says which
block each step of the grid copies. Few rows are one block that every active expert visits; many are
sorted by expert into blocks of one expert each, and an expert is unpacked for the first of them.
Knows arrays, no meshes. Nothing here has been timed: no TPU was there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.tpu.layout import GROUP, LANES, TpuExperts
from gptoss_jax.mxfp4 import BLOCK

TILE = 512  # outputs of a step
FEW_ROWS = 64  # up to so many rows all of them are multiplied with every active expert
SMALLEST_ROWS, LARGEST_ROWS = 16, 256  # of a block; 16 are the sublanes of a bfloat16 tile
VMEM = 48 << 20  # of 128 MB (v5e, v6e) or 64 MB (v5p)


class Visits(NamedTuple):
    """Who meets whom, int32 [G] each; visits to nobody come last.

    Attributes:
      experts: Expert; at a visit to nobody the one before, so that nothing new is copied.
      live: 1, or 0 at a visit to nobody.
      fresh: 1 where the expert is not that of the visit before.
      rows: Block of rows; at a visit to nobody the one before.
      outs: Block of the result, ascending.
    """

    experts: jax.Array
    live: jax.Array
    fresh: jax.Array
    rows: jax.Array
    outs: jax.Array


def mlp(
    x_MD: Float[Array, "M D"],
    weights_MX: Float[Array, "M X"],
    experts_MX: Int[Array, "M X"],
    gate_up: TpuExperts,
    gate_up_bias_EFP: Float[Array, "E F P"],
    down: TpuExperts,
    down_bias_ED: Float[Array, "E D"],
    *,
    alpha: float,
    limit: float,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "M D"]:
    """sum_x weights_x (down_e swiglu(gate_up_e x + bias_e) + bias_e), e = experts_x.

    Args:
      x_MD: Normalised activations, bfloat16 or float32.
      weights_MX: float32 routing weights.
      experts_MX: int32 ids; E is nobody's and adds nothing.
      gate_up: Logical shape [E, F, P, D], packed or folded.
      gate_up_bias_EFP: Bias.
      down: Logical shape [E, D, F].
      down_bias_ED: Bias, added before the weighting.
      alpha: SwiGLU's slope.
      limit: SwiGLU's clamp.
      interpret: As pallas_call's: True or pltpu.InterpretParams to run without a TPU.

    Returns:
      float32 [M, D]. Sums are float32, the hidden activations are cast to x's dtype between the two
      products (ops/experts.py is the definition).
    """
    M, D = x_MD.shape
    E = gate_up.shape[0]
    experts_MX = jnp.where((experts_MX < 0) | (experts_MX > E), E, experts_MX)
    arrange = _together if M <= FEW_ROWS else _sorted
    rows, x, shares, visits, gather = arrange(x_MD, weights_MX.astype(jnp.float32), experts_MX, E)
    biases = [
        jnp.take(b, visits.experts, axis=0).astype(jnp.float32).transpose(0, 2, 1)
        for b in (gate_up_bias_EFP, down_bias_ED[..., None])
    ]
    act = _product(
        functools.partial(_gate_up, outputs=gate_up.outputs, alpha=alpha, limit=limit),
        visits,
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES))),
        gate_up,
        biases[0],
        result=(len(visits.live) * rows, x.dtype),
        rows=rows,
        interpret=interpret,
    )
    out = _product(
        _down,
        visits._replace(rows=jnp.arange(len(visits.live), dtype=jnp.int32)),
        act,
        down,
        biases[1],
        shares,
        result=(len(x), jnp.float32),
        rows=rows,
        interpret=interpret,
    )
    return gather(out)[:, :D]


def _together(x_MD, weights_MX, experts_MX, E):
    """Few rows: one block, visited by every active expert, ascending."""
    M, X = experts_MX.shape
    rows = -(-M // SMALLEST_ROWS) * SMALLEST_ROWS
    ids = jnp.arange(E, dtype=jnp.int32)
    active_E = (experts_MX[..., None] == ids[None, None]).any((0, 1))
    # comparisons and sums: a handful of small fused operations, where a sort would be many
    before_E = (active_E[None, :] & (ids[None, :] < ids[:, None])).sum(1, dtype=jnp.int32)
    count = active_E.sum(dtype=jnp.int32)
    visit_G = jnp.arange(min(E, M * X), dtype=jnp.int32)
    place_G = jnp.minimum(visit_G, jnp.maximum(count - 1, 0))
    found_GE = active_E[None] & (before_E[None] == place_G[:, None])
    experts_G = jnp.where(found_GE, ids[None], 0).sum(1, dtype=jnp.int32)
    live_G = visit_G < count
    chosen_GMX = live_G[:, None, None] & (experts_MX[None] == experts_G[:, None, None])
    shares_GM = jnp.where(chosen_GMX, weights_MX[None], 0.0).sum(2)
    shares = jnp.pad(shares_GM, ((0, 0), (0, rows - M)))[..., None]
    live, none = live_G.astype(jnp.int32), jnp.zeros_like(visit_G)
    visits = Visits(experts_G, live, live, none, none)
    return rows, jnp.pad(x_MD, ((0, rows - M), (0, 0))), shares, visits, lambda out: out[:M]


def _sorted(x_MD, weights_MX, experts_MX, E):
    """Many rows: pairs (row, expert) sorted by expert, blocks of one expert each; the last block is
    nobody's.
    """
    M, X = experts_MX.shape
    R = M * X
    rows = min(LARGEST_ROWS, max(SMALLEST_ROWS, 1 << (R // E - 1).bit_length() if R > E else 1))
    G = R // rows + min(E, R) + 1  # sum of ceil(load / rows) is never more; and nobody's
    experts_R = experts_MX.reshape(-1)
    order = jnp.argsort(experts_R, stable=True)
    loads_E = jnp.zeros(E, jnp.int32).at[experts_R].add(1, mode="drop")
    blocks_E = -(-loads_E // rows)
    ends_E, starts_E = jnp.cumsum(blocks_E), jnp.cumsum(loads_E) - loads_E
    own = experts_R[order]
    clipped = jnp.minimum(own, E - 1)
    slots = (ends_E - blocks_E)[clipped] * rows + jnp.arange(R, dtype=jnp.int32) - starts_E[clipped]
    slots = jnp.where(own < E, slots, G * rows)
    pairs = jnp.full(G * rows, R, jnp.int32).at[slots].set(order.astype(jnp.int32), mode="drop")
    slots_R = jnp.zeros(R, jnp.int32).at[order].set(jnp.minimum(slots, G * rows - 1))
    visit_G = jnp.arange(G, dtype=jnp.int32)
    count = ends_E[-1]
    place_G = jnp.minimum(visit_G, jnp.maximum(count - 1, 0))
    experts_G = jnp.searchsorted(ends_E, place_G, side="right").astype(jnp.int32)
    experts_G = jnp.minimum(experts_G, E - 1)
    before_G = jnp.concatenate([jnp.full(1, -1, jnp.int32), experts_G[:-1]])
    live_G = (visit_G < count).astype(jnp.int32)
    visits = Visits(
        experts_G, live_G, jnp.where(experts_G != before_G, live_G, 0), place_G, visit_G
    )
    x = jnp.take(x_MD, pairs // X, axis=0, mode="fill", fill_value=0)
    shares = jnp.take(weights_MX.reshape(-1), pairs, mode="fill", fill_value=0)

    def gather(out):
        return jnp.take(out, slots_R, axis=0).reshape(M, X, -1).sum(1)

    return rows, x, shares.reshape(G, rows, 1), visits, gather


def _product(kernel, visits, x, weight, bias, *shares, result, rows, interpret):
    """One of the two kernels over (tiles of outputs, visits)."""
    E, P, depth, O = weight.values.shape
    G, inputs, tile, packed = len(visits.live), x.shape[1], min(TILE, O), weight.packed
    by_visit = not shares  # a block of the result for every visit

    def held(n, g, experts, *_):
        return experts[g], 0, 0, n

    scratch = []
    if packed:
        scratch = [
            pltpu.VMEM((P, inputs, tile), x.dtype),
            pltpu.VMEM((weight.scales.shape[2], tile), jnp.int32),
        ]
    # left alone, XLA copies the scales of all experts into fast memory
    values, scales = (in_place(x, interpret) for x in (weight.values, weight.scales))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(O, tile), G),
            in_specs=[
                pl.BlockSpec((rows, inputs), lambda n, g, e, l, f, rows, o: (rows[g], 0)),
                pl.BlockSpec((1, P, depth, tile), held),
                pl.BlockSpec((1, P, weight.scales.shape[2], tile), held),
                pl.BlockSpec((1, P, tile), lambda n, g, *_: (g, 0, n)),
                *(pl.BlockSpec((1, rows, 1), lambda n, g, *_: (g, 0, 0)) for _ in shares),
            ],
            out_specs=pl.BlockSpec(
                (rows, tile), lambda n, g, e, l, f, r, outs: (g if by_visit else outs[g], n)
            ),
            scratch_shapes=scratch,
        ),
        out_shape=result_shape((result[0], O), result[1], x, values, *visits),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * G * rows * inputs * O * P,
            transcendentals=0,
            bytes_accessed=min(G, E) * (weight.nbytes // E),
        ),
        interpret=interpret,
        name="experts_gate_up" if by_visit else "experts_down",
    )(*visits, x, values, scales, jnp.pad(bias, ((0, 0), (0, 0), (0, O - bias.shape[2]))), *shares)


def in_place(x: jax.Array, interpret) -> jax.Array:
    """x, held to the large memory: XLA brings no copy of it into the fast one."""
    return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)


def result_shape(shape: tuple[int, ...], dtype, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that an operand varies over, inside shard_map."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=axes))


def _gate_up(experts, live, fresh, rows, outs, x, values, scales, bias, out, *scratch,
             outputs, alpha, limit):  # fmt: skip
    """act = swiglu(x gate_up + bias) of one visit and tile."""
    n, g = pl.program_id(0), pl.program_id(1)
    read = _reader(g, fresh, values, scales, *scratch)

    @pl.when(live[g] == 1)
    def _():
        gate, up = (read(x[...], p) + bias[0, p : p + 1, :] for p in range(2))
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        act = gate / (1.0 + jnp.exp(-alpha * gate)) * (up + 1.0)
        # what lies beyond the outputs is multiplied with zeros next: it has to be finite
        columns = jax.lax.broadcasted_iota(jnp.int32, act.shape, 1)
        columns += n * act.shape[1]
        out[...] = jnp.where(columns < outputs, act, 0.0).astype(out.dtype)


def _down(experts, live, fresh, rows, outs, act, values, scales, bias, shares, out,
          *scratch):  # fmt: skip
    """out (+)= shares (act down + bias) of one visit and tile."""
    g = pl.program_id(1)
    read = _reader(g, fresh, values, scales, *scratch)

    @pl.when((g == 0) | (outs[g] != outs[jnp.maximum(g - 1, 0)]))
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(live[g] == 1)
    def _():
        share = shares[0]
        added = share * (read(act[...], 0) + bias[0, 0:1, :])
        out[...] += jnp.where(share != 0.0, added, 0.0)


def _reader(g, fresh, values, scales, *scratch):
    """(x, p) -> x times the weights of pair p, float32; unpacks what is packed at a fresh
    expert.
    """
    if not scratch:

        def folded(x, p):
            out = _dot(x, values[0, p])
            return out * scales[0, p]

        return folded
    unpacked, bits = scratch

    @pl.when(fresh[g] == 1)
    def _():
        for p in range(unpacked.shape[0]):
            _unpack(values.at[0, p], scales.at[0, p], unpacked.at[p], bits)

    return lambda x, p: _dot(x, unpacked[p])


def _dot(x, weight):
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if x.dtype == jnp.float32:
        weight = weight.astype(jnp.float32)
    return jax.lax.dot_general(
        x, weight, (((1,), (0,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _unpack(words, scales, out, bits):
    """Words [I / 8, n] and scales [I / 32, n] -> values [I, n], two of a word at once.

    A code's three bits and the scale make a normal bfloat16 by one addition (layout._swap), so that
    nothing passes through a subnormal; zero is masked. A scale of 0 is read as 1: what it scales is
    at most 2^-123.
    """
    exponent = jnp.maximum(scales[...].astype(jnp.int32) - 1, 0)
    bits[...] = (exponent << 7) | (exponent << 23)

    def both(half):
        return jnp.int32((half << 16 | half) - (1 << 32 if half & 0x8000 else 0))

    def group(i, _):
        word = words[pl.ds(pl.multiple_of(8 * i, 8), 8), :]
        for nibble in range(4):
            scale = bits[pl.ds(i * (GROUP // BLOCK) + nibble // 2, 1), :]
            shift = 6 - 4 * nibble
            moved = word << shift if shift > 0 else jax.lax.shift_right_logical(word, -shift)
            code = moved & both(0x01C0)
            # bit 15 of each half: not the code of zero; then 15 bits of ones, or none
            some = ((code ^ both(0x0040)) + both(0x7FC0)) & both(0x8000)
            mask = some - jax.lax.shift_right_logical(some, 15)
            sign = (word << (12 - 4 * nibble)) & both(0x8000)
            value = ((code + scale) & mask) | sign
            row = pl.multiple_of(GROUP * i + 16 * nibble, 16)
            out[pl.ds(row, 16), :] = pltpu.bitcast(value, jnp.bfloat16).astype(out.dtype)
        return 0

    groups = words.shape[0] // 8
    jax.lax.fori_loop(0, groups, group, 0)
    if GROUP * groups < out.shape[0]:
        rest = out.shape[0] - GROUP * groups
        out[pl.ds(GROUP * groups, rest), :] = jnp.zeros((rest, out.shape[1]), out.dtype)
