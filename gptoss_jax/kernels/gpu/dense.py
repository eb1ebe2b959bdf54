"""Dense products of a few rows on a GPU, with what stands before and after them in the same kernel:
RMSNorm before, bias and residual after, several weights at once.

For one row the weights are multiplied and summed in ordinary arithmetic: two instructions for each
bfloat16 weight, where an H200 has twelve for what its memory delivers. More rows take tensor cores.
Every program makes the norm of its rows again: that reads them twice more, from the cache. Also the
choice of experts, one program a row. Nothing here has been timed: no GPU was there.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.gpu.attention import result_shape
from gptoss_jax.kernels.gpu.blocks import Tuning, at_hand

MOST_ROWS = 64
SMALLEST = 16  # rows and columns that tensor cores take
NORM_DEPTH = 4096  # inputs of a step of one row's norm
ROWS_DEPTH = 128  # inputs of a step for more rows


def products(
    x_MD: Float[Array, "M D"],
    weights: Sequence[Float[Array, "O D"]],
    biases: Sequence[Float[Array, " O"]],
    *,
    norm_D: Float[Array, " D"] | None = None,
    eps: float = 0.0,
    residual_MO: Float[Array, "M O"] | None = None,
    dtype=None,
    keep: bool = False,
    chosen: Tuning | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """rms_norm(x) weight^T + bias for every weight, with float32 sums.

    Args:
      x_MD: Activations, at most MOST_ROWS.
      weights: [O, D] each, of x's dtype.
      biases: One each.
      norm_D: RMSNorm's scale; None multiplies x itself.
      eps: RMSNorm's.
      residual_MO: Added to the first result after it is cast.
      dtype: Of the results; by default x's.
      keep: Also give rms_norm(x), last.
      chosen: Block sizes; by default those of the card.
      interpret: Run without a GPU.

    Returns:
      [M, O] each.
    """
    M, D = x_MD.shape
    dtype, chosen = dtype or x_MD.dtype, chosen or at_hand()
    if M == 1:  # enough programs for every multiprocessor, and 5 MB of weights in flight
        rows, depth = 1, chosen.dense_depth
        each = -(-sum(map(len, weights)) // chosen.dense_programs)
        outputs = min(8, pl.next_power_of_2(each))
    else:
        rows, depth = max(SMALLEST, pl.next_power_of_2(M)), ROWS_DEPTH
        outputs = chosen.dense_outputs
    depth = min(depth, max(SMALLEST, pl.next_power_of_2(D)))
    tiles = [-(-len(weight) // outputs) for weight in weights]
    results = [((M, len(weight)), dtype) for weight in weights]
    results += [((M, D), x_MD.dtype)] * keep
    inputs = [x_MD, *weights, *biases]
    inputs += [x for x in (norm_D, residual_MO) if x is not None]
    return pl.pallas_call(
        functools.partial(
            _products, tiles=tiles, sizes=(rows, outputs, depth), eps=eps,
            normed=norm_D is not None, added=residual_MO is not None, keep=keep,
        ),
        grid=(sum(tiles),),
        out_shape=[result_shape(*result, *inputs) for result in results],
        compiler_params=plgpu.CompilerParams(
            num_warps=chosen.dense_warps, num_stages=chosen.dense_stages
        ),
        interpret=interpret,
        name="products",
    )(*inputs)  # fmt: skip


def _products(x, *refs, tiles, sizes, eps, normed, added, keep):
    rows, outputs, depth = sizes
    count = len(tiles)
    weights, biases, rest = refs[:count], refs[count : 2 * count], list(refs[2 * count :])
    scale = rest.pop(0) if normed else None
    residual = rest.pop(0) if added else None
    M, D = x.shape
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    whole = D % depth == 0
    steps = -(-D // depth)

    def columns(i):
        return i * depth + jnp.arange(depth, dtype=jnp.int32)[None]

    def load(ref, at, mask):
        return plgpu.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)

    def given(i):
        at = columns(i)
        return load(x, (row, at), (row < M) & (at < D))

    share = None
    if normed:
        wide = depth if rows > 1 else min(NORM_DEPTH, pl.next_power_of_2(D))

        def squares(i, total):
            at = i * wide + jnp.arange(wide, dtype=jnp.int32)[None]
            return total + (load(x, (row, at), (row < M) & (at < D)) ** 2).sum(1)

        empty = jnp.zeros(rows, jnp.float32)
        total = jax.lax.fori_loop(0, -(-D // wide), squares, empty)
        share = jax.lax.rsqrt(total / D + eps)[:, None]

    def taken(i):
        """float32, but rounded as rms_norm rounds."""
        if share is None:
            return given(i)
        at = columns(i)
        own = given(i) * share * load(scale, (at,), at < D)
        return own.astype(x.dtype).astype(jnp.float32)

    def tile(number, weight, bias, out, residual):
        O = weight.shape[0]
        output = number * outputs + jnp.arange(outputs, dtype=jnp.int32)
        inside = output < O

        def weights_of(i):
            at = columns(i)
            mask = None
            if O % outputs or not whole:
                mask = inside[:, None] & (at < D)
            other = None if mask is None else 0
            return plgpu.load(weight.at[output[:, None], at], mask=mask, other=other)

        if rows == 1:

            def step(i, sums):
                return sums + weights_of(i).astype(jnp.float32) * taken(i)

            empty = jnp.zeros((outputs, depth), jnp.float32)
            sums = jax.lax.fori_loop(0, steps, step, empty).sum(1)[None]
        else:

            def step(i, sums):
                return sums + plgpu.dot(
                    taken(i).astype(weight.dtype), weights_of(i), trans_b=True,
                    precision=jax.lax.Precision.HIGHEST,
                )  # fmt: skip

            sums = jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, outputs), jnp.float32))
        at, mask = (row, output[None]), (row < M) & inside[None]
        value = (sums + load(bias, (output,), inside)[None]).astype(out.dtype)
        if residual is not None:
            value = (value.astype(jnp.float32) + load(residual, at, mask)).astype(out.dtype)
        plgpu.store(out.at[at], value, mask=mask)

    number = pl.program_id(0)
    start = 0
    for i, size in enumerate(tiles):
        own = residual if i == 0 else None
        call = functools.partial(tile, number - start, weights[i], biases[i], rest[i], own)
        if count == 1:
            call()
        else:
            pl.when((number >= start) & (number < start + size))(call)
        start += size
    if keep:

        @pl.when(number == 0)
        def _():
            def step(i, _):
                at = columns(i)
                mask = (row < M) & (at < D)
                plgpu.store(rest[-1].at[row, at], taken(i).astype(x.dtype), mask=mask)
                return 0

            jax.lax.fori_loop(0, steps, step, 0)


def choose(
    logits_ME: Float[Array, "M E"], chosen: int, *, interpret: bool = False
) -> tuple[Float[Array, "M X"], Int[Array, "M X"]]:
    """The `chosen` largest of each row and their softmax: float32 weights, int32 ids; of equal ones
    the first.
    """
    M, E = logits_ME.shape
    results = ((M, chosen), jnp.float32), ((M, chosen), jnp.int32)
    weights, ids = pl.pallas_call(
        functools.partial(_choose, chosen=chosen),
        grid=(M,),
        in_specs=[pl.BlockSpec((None, E), lambda m: (m, 0))],
        out_specs=[pl.BlockSpec((None, chosen), lambda m: (m, 0)) for _ in results],
        out_shape=[result_shape(*result, logits_ME) for result in results],
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="choose",
    )(logits_ME)
    return weights, ids


def _choose(logits, weights, ids, *, chosen):
    E = logits.shape[0]
    expert = jnp.arange(pl.next_power_of_2(E), dtype=jnp.int32)
    rest = plgpu.load(logits.at[expert], mask=expert < E, other=-jnp.inf)
    place = jnp.arange(pl.next_power_of_2(chosen), dtype=jnp.int32)
    found = jnp.zeros_like(place)
    values = jnp.full(place.shape, -jnp.inf, jnp.float32)
    for x in range(chosen):
        best = rest.max(0)
        own = jnp.where(rest == best, expert, E - 1).min(0)
        found, values = jnp.where(place == x, own, found), jnp.where(place == x, best, values)
        rest = jnp.where(expert == own, -jnp.inf, rest)
    shares = jnp.exp(values - values.max(0))
    for result, value in ((weights, shares / shares.sum(0)), (ids, found)):
        plgpu.store(result.at[place], value, mask=place < chosen)
