"""The experts' feed-forward on a GPU: two kernels, gate and up with SwiGLU, then down with the
routing weights; their products alone, and transposed for the gradient.

A program has some outputs of one expert. It looks up which pairs (row, choice) chose that expert,
reads its share of the packed bytes once for each block of such pairs, unpacks them in registers and
multiplies by tensor cores. Nothing is sorted for up to `Tuning.together` pairs: of the pairs that
chose the same expert the first one's program does the work of all, the others end at once. Results
of pairs are added up outside, in a fixed order. Knows arrays, no meshes. Nothing here has been
timed: no GPU was there.

Programs of one row of gpt-oss, 4 experts: gate and up 4 * 5760 / 32 = 720, down 4 * 2880 / 32 =
360, on 132 multiprocessors.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.gpu import blocks, triton
from gptoss_jax.kernels.gpu.blocks import LEAST_ROWS, Tile
from gptoss_jax.kernels.gpu.triton import ds, load, program_id, store
from gptoss_jax.kernels.gpu.unpack import BYTES, QUICK, unpack
from gptoss_jax.mxfp4 import MxTensor

QUICK_ROWS = 64  # of a block, at most, whose registers hold two ways


class Pairs(NamedTuple):
    """Pairs (row, choice) in blocks of one expert each, as a kernel looks them up.

    Attributes:
      arrays: Together: int32 experts [R]. Sorted: int32 pair of each slot [G rows], R for none, and
        expert of each block [G], E for none.
      programs: Along the grid's second axis.
      sizes: Number of arrays, of pairs R, and of experts E.
    """

    arrays: tuple[jax.Array, ...]
    programs: int
    sizes: tuple[int, int, int]


def mlp(
    x_MD: Float[Array, "M D"],
    weights_MX: Float[Array, "M X"],
    experts_MX: Int[Array, "M X"],
    gate_up_EFPD: MxTensor,
    gate_up_bias_EFP: Float[Array, "E F P"],
    down_EDF: MxTensor,
    down_bias_ED: Float[Array, "E D"],
    *,
    alpha: float,
    limit: float,
    chosen: blocks.Tuning | None = None,
    interpret: bool = False,
) -> Float[Array, "M D"]:
    """sum_x weights_x (down_e swiglu(gate_up_e x + bias_e) + bias_e), e = experts_x.

    Args:
      x_MD: Normalised activations, bfloat16 or float32.
      weights_MX: float32 routing weights.
      experts_MX: int32 ids; one that no expert has is nobody's and adds nothing.
      gate_up_EFPD: The released bytes.
      gate_up_bias_EFP: Bias.
      down_EDF: The released bytes.
      down_bias_ED: Bias, added before the weighting.
      alpha: SwiGLU's slope.
      limit: SwiGLU's clamp.
      chosen: Block sizes; by default those of the card.
      interpret: Runs without a GPU.

    Returns:
      float32 [M, D]. Sums are float32, the hidden activations are cast to x's dtype between the two
      products (ops/experts.py is the definition).
    """
    X, (E, F, P, D) = experts_MX.shape[1], gate_up_EFPD.shape
    tile, pairs = _arranged(experts_MX, E, x_MD.dtype, chosen)
    gate_up = functools.partial(_swiglu, alpha=alpha, limit=limit)
    act_RF = _product(
        gate_up, pairs, tile, x_MD, gate_up_EFPD.as_rows(), gate_up_bias_EFP.reshape(E, F * P),
        each=X, result=(F, x_MD.dtype), name="experts_gate_up", interpret=interpret,
    )  # fmt: skip
    out_RD = _product(
        _weighted, pairs, tile, act_RF, down_EDF, down_bias_ED,
        weights_MX.reshape(-1).astype(jnp.float32),
        each=1, result=(D, jnp.float32), name="experts_down", interpret=interpret,
    )  # fmt: skip
    return _of_somebody(out_RD, experts_MX, E).sum(1)


def grouped_product(
    x_MI: Float[Array, "M I"],
    experts_MX: Int[Array, "M X"],
    weight_EOI: MxTensor,
    *,
    chosen: blocks.Tuning | None = None,
    interpret: bool = False,
) -> Float[Array, "M X O"]:
    """x times the rows of each chosen expert, float32; zeros where the expert is nobody's."""
    X, (E, O, _) = experts_MX.shape[1], weight_EOI.shape
    tile, pairs = _arranged(experts_MX, E, x_MI.dtype, chosen)
    out_RO = _product(
        _plain, pairs, tile, x_MI, weight_EOI,
        each=X, result=(O, jnp.float32), name="experts_product", interpret=interpret,
    )  # fmt: skip
    return _of_somebody(out_RO, experts_MX, E)


def grouped_product_transposed(
    g_MXO: Float[Array, "M X O"],
    experts_MX: Int[Array, "M X"],
    weight_EOI: MxTensor,
    *,
    chosen: blocks.Tuning | None = None,
    interpret: bool = False,
) -> Float[Array, "M X I"]:
    """g times the columns of each chosen expert, from the packed bytes: the gradient of
    `grouped_product` with respect to x, one for each choice.
    """
    E, O, I = weight_EOI.shape
    tile, pairs = _arranged(experts_MX, E, g_MXO.dtype, chosen)
    # here outputs are the summed axis, and the gradient's rows stand in products as they are
    tile = dataclasses.replace(tile, outputs=min(64, tile.outputs), rows=max(LEAST_ROWS, tile.rows))
    R = experts_MX.size
    out_RI = triton.call(
        functools.partial(_transposed, sizes=pairs.sizes, tile=tile, assembly=not interpret),
        *pairs.arrays, g_MXO.reshape(R, O), *_bytes(weight_EOI),
        grid=(_cdiv(I // 2, tile.depth), pairs.programs),
        result=((R, I), jnp.float32),
        warps=tile.warps, stages=tile.stages, name="experts_transposed", interpret=interpret,
    )  # fmt: skip
    return _of_somebody(out_RI, experts_MX, E)


def _of_somebody(out_RO, experts_MX, E):
    """[M, X, O]; rows of pairs that are nobody's, which no program wrote, are zeros."""
    here_MX = (experts_MX >= 0) & (experts_MX < E)
    return jnp.where(here_MX[..., None], out_RO.reshape(*experts_MX.shape, -1), 0.0)


def _bytes(weight_EOI) -> tuple[Any, Any]:
    E, O, I = weight_EOI.shape
    return weight_EOI.blocks.reshape(E, O, I // 2), weight_EOI.scales


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


# ---- who is with whom


def _arranged(experts_MX, E: int, dtype, chosen: blocks.Tuning | None) -> tuple[Tile, Pairs]:
    chosen = chosen or blocks.at_hand()
    R = experts_MX.size
    tile = blocks.tile(R, E, chosen, exact=dtype == jnp.float32, single=len(experts_MX) == 1)
    experts_R = experts_MX.reshape(-1)
    if R <= chosen.together:
        return tile, Pairs((experts_R,), min(E, R), (1, R, E))
    return tile, _sorted(experts_R, E, tile.rows)


def _sorted(experts_R, E: int, rows: int) -> Pairs:
    """Many pairs, sorted by expert into blocks of one expert each."""
    R = len(experts_R)
    G = R // rows + min(E, R)  # sum of ceil(load / rows) is never more
    experts_R = jnp.where((experts_R < 0) | (experts_R > E), E, experts_R)
    order = jnp.argsort(experts_R, stable=True).astype(jnp.int32)
    loads_E = jnp.zeros(E, jnp.int32).at[experts_R].add(1, mode="drop")
    blocks_E = -(-loads_E // rows)
    ends_E, before_E = jnp.cumsum(blocks_E), jnp.cumsum(loads_E) - loads_E
    first_slot_E = (ends_E - blocks_E) * rows
    own = experts_R[order]
    clipped = jnp.minimum(own, E - 1)
    slots = first_slot_E[clipped] + jnp.arange(R, dtype=jnp.int32) - before_E[clipped]
    slots = jnp.where(own < E, slots, G * rows)
    pair_of_slot = jnp.full(G * rows, R, jnp.int32).at[slots].set(order, mode="drop")
    expert_of_block = jnp.searchsorted(ends_E, jnp.arange(G, dtype=jnp.int32), side="right")
    return Pairs((pair_of_slot, expert_of_block.astype(jnp.int32)), G, (2, R, E))


def _visit(refs, sizes: tuple[int, int, int], rows: int):
    """What this program does: its expert, how many blocks of pairs, and block -> its pairs (R for
    none).
    """
    _, R, E = sizes
    p = program_id(1)
    if len(refs) == 2:
        pair_of_slot, expert_of_block = refs
        expert = expert_of_block[p]
        own = load(pair_of_slot.at[ds(p * rows, rows)])
        live = (expert < E).astype(jnp.int32)
        return jnp.minimum(expert, E - 1), live, lambda block: own
    width = max(16, 1 << (R - 1).bit_length())
    pair = jnp.arange(width, dtype=jnp.int32)
    experts = load(refs[0].at[pair], mask=pair < R, other=-1)
    expert = p
    if R <= E:
        expert = jnp.sum(jnp.where(pair == p, experts, 0))
    same = experts == expert
    if R <= E:  # the first of the pairs that chose it
        earlier = jnp.sum((same & (pair < p)).astype(jnp.int32))
        same &= (earlier == 0) & (expert >= 0) & (expert < E)
    ones = same.astype(jnp.int32)
    place, count = jnp.cumsum(ones) - 1, jnp.sum(ones)

    def pairs_of(block):
        wanted = block * rows + jnp.arange(rows, dtype=jnp.int32)
        found = (same[None, :] & (place[None, :] == wanted[:, None])).astype(jnp.int32)
        return jnp.sum(found * (pair[None, :] - R), axis=1) + R

    return jnp.clip(expert, 0, E - 1), (count + rows - 1) // rows, pairs_of


# ---- the kernels


def _product(finish, pairs, tile, x, weight, *others, each, result, name, interpret):
    """finish(x weight^T) of every pair; `each` pairs share a row of x."""
    O = weight.shape[1]
    kernel = functools.partial(
        _forward,
        finish=finish,
        sizes=pairs.sizes,
        tile=tile,
        each=each,
        width=result[0],
        assembly=not interpret,
    )
    return triton.call(
        kernel, *pairs.arrays, x, *_bytes(weight), *others,
        grid=(_cdiv(O, tile.outputs), pairs.programs),
        result=((pairs.sizes[1], result[0]), result[1]),
        warps=tile.warps, stages=tile.stages, name=name, interpret=interpret,
    )  # fmt: skip


def _forward(*refs, finish, sizes, tile, each, width, assembly):
    x, packed, scales, *others, out = refs[sizes[0] :]
    expert, count, pairs_of = _visit(refs[: sizes[0]], sizes, tile.rows)
    held = _Held(packed, scales, expert, tile, assembly)
    n, R = program_id(0), sizes[1]

    def block(i, _):
        own = pairs_of(i)
        rows = own if each == 1 else jax.lax.div(own, jnp.int32(each))
        sums_NM = _multiply(x, rows, held, n * tile.outputs)
        values = finish(sums_NM, expert, n, own, R, *others)  # [pairs, outputs]
        columns = n * values.shape[1] + jnp.arange(values.shape[1], dtype=jnp.int32)
        mask = (own < R)[:, None] & (columns < width)[None, :]
        store(out.at[own[:, None], columns[None, :]], values.astype(out.dtype), mask=mask)

    jax.lax.fori_loop(0, count, block, None)


class _Held(NamedTuple):
    """One expert's packed weight as a kernel reads it: references, and how."""

    packed: Any
    scales: Any
    expert: Any
    tile: Tile
    assembly: bool

    def codes(self, first, at):
        """uint8 [outputs, depth] of outputs from `first` and bytes from `at` on; 0 beyond them."""
        return self._load(self.packed, first, at, self.tile.depth)

    def exponents(self, first, at):
        """uint8 [outputs, depth / 16]: their scales. Too narrow to be copied asynchronously: a loop
        asks for them one step ahead.
        """
        return self._load(self.scales, first, at // BYTES, self.tile.depth // BYTES)

    def _load(self, ref, first, at, width):
        outputs = first + jnp.arange(self.tile.outputs, dtype=jnp.int32)
        columns = at + jnp.arange(width, dtype=jnp.int32)
        mask = (columns < ref.shape[2])[None, :]
        if ref.shape[1] % self.tile.outputs:
            mask = (outputs < ref.shape[1])[:, None] & mask
        mask = jnp.broadcast_to(mask, (self.tile.outputs, width))
        return load(
            ref.at[self.expert, outputs[:, None], columns[None, :]],
            mask=mask,
            other=jnp.uint8(0),
        )


def _multiply(x, rows, held, first):
    """Outputs of an expert from `first` on times rows of x: float32 [outputs, rows].

    The quick way where all scales allow it, which is known after it was gone: a program that met
    a larger one goes the other way then. A block of most rows, whose sums fill the registers and
    whose tensor cores have more to do than what feeds them, goes the other way at once.
    """
    if x.dtype != jnp.bfloat16 or len(rows) > QUICK_ROWS:
        return _summed(x, rows, held, first, False)[0]
    sums, largest = _summed(x, rows, held, first, True)
    again = functools.partial(_summed, x, rows, held, first, False)
    return jax.lax.cond(jnp.max(largest) > QUICK, lambda: again()[0], lambda: sums)


def _summed(x, rows, held, first, quick):
    """`_multiply` in one way; also the largest scales, int32 [outputs, depth / 16]."""
    depth, inputs = held.tile.depth, 2 * held.packed.shape[2]

    def step(k, carried):
        sums, exponents, largest = carried
        codes = held.codes(first, k * depth)
        low, high = unpack(codes, exponents, x.dtype, held.assembly, quick)
        even, odd = _taken(x, rows, k * (2 * depth), 2 * depth)
        sums = sums + triton.dot(low, even) + triton.dot(high, odd)
        largest = jnp.maximum(largest, exponents.astype(jnp.int32))
        return sums, held.exponents(first, (k + 1) * depth), largest

    sums = jnp.zeros((held.tile.outputs, max(LEAST_ROWS, len(rows))), jnp.float32)
    exponents = held.exponents(first, 0)
    steps = _cdiv(inputs, 2 * depth)
    largest = jnp.zeros(exponents.shape, jnp.int32)
    sums, _, largest = jax.lax.fori_loop(0, steps, step, (sums, exponents, largest))
    if len(rows) == 1:
        sums = jnp.max(sums, axis=1, keepdims=True)  # all columns are the same
    return sums, largest


def _taken(x, rows, start, width):
    """Even and odd columns of rows of x, [rows, width / 2] each, 0 beyond it. A single row stands
    there LEAST_ROWS times, which takes half the instructions of a row among zeros.
    """
    columns = start + jnp.arange(width, dtype=jnp.int32)
    inside = columns < x.shape[1]
    if len(rows) == 1:
        row = jnp.max(rows)
        part = load(x.at[row, columns], mask=inside & (row < x.shape[0]), other=0.0)
        both = jnp.unstack(part.reshape(width // 2, 2), axis=-1)
        return tuple(jnp.broadcast_to(one[None], (LEAST_ROWS, width // 2)) for one in both)
    mask = (rows < x.shape[0])[:, None] & inside[None, :]
    part = load(x.at[rows[:, None], columns[None, :]], mask=mask, other=0.0)
    return jnp.unstack(part.reshape(len(rows), width // 2, 2), axis=-1)


def _plain(sums_NM, expert, n, own, R):
    return sums_NM.T


def _biased(sums_NM, expert, n, bias):
    outputs = n * sums_NM.shape[0] + jnp.arange(sums_NM.shape[0], dtype=jnp.int32)
    added = load(bias.at[expert, outputs], mask=outputs < bias.shape[1], other=0.0)
    return sums_NM + added.astype(jnp.float32)[:, None]


def _swiglu(sums_NM, expert, n, own, R, bias, *, alpha, limit):
    """Outputs lie in pairs (gate, up)."""
    h = _biased(sums_NM, expert, n, bias).T
    gate, up = jnp.unstack(h.reshape(h.shape[0], h.shape[1] // 2, 2), axis=-1)
    gate, up = jnp.minimum(gate, limit), jnp.minimum(jnp.maximum(up, -limit), limit)
    return gate / (1.0 + jnp.exp(-alpha * gate)) * (up + 1.0)


def _weighted(sums_NM, expert, n, own, R, bias, weights):
    share = load(weights.at[own], mask=own < R, other=0.0)
    return _biased(sums_NM, expert, n, bias).T * share[:, None]


def _transposed(*refs, sizes, tile, assembly):
    """Pairs' gradients times some columns of an expert."""
    *who, g, packed, scales, out = refs
    expert, count, pairs_of = _visit(who, sizes, tile.rows)
    held = _Held(packed, scales, expert, tile, assembly)
    k, (_, O, B), R = program_id(0), packed.shape, sizes[1]
    depth, size = tile.depth, tile.outputs

    def block(i, _):
        own = pairs_of(i)
        some = (own < R)[:, None]

        def step(n, carried):
            low, high, exponents = carried
            parts = unpack(held.codes(n * size, k * depth), exponents, g.dtype, assembly)
            outputs = n * size + jnp.arange(size, dtype=jnp.int32)
            mask = some & (outputs < O)[None, :]
            part = load(g.at[own[:, None], outputs[None, :]], mask=mask, other=0.0)
            low, high = low + triton.dot(part, parts[0].T), high + triton.dot(part, parts[1].T)
            return low, high, held.exponents((n + 1) * size, k * depth)

        zeros = jnp.zeros((tile.rows, depth), jnp.float32)
        first = zeros, zeros, held.exponents(0, k * depth)
        low, high, _ = jax.lax.fori_loop(0, _cdiv(O, size), step, first)
        both = jnp.stack([low, high], axis=-1).reshape(tile.rows, 2 * depth)
        columns = k * (2 * depth) + jnp.arange(2 * depth, dtype=jnp.int32)
        mask = some & (columns < 2 * B)[None, :]
        store(out.at[own[:, None], columns[None, :]], both, mask=mask)

    jax.lax.fori_loop(0, count, block, None)
