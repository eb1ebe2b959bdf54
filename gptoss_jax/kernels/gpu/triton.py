"""The Pallas back end of the experts' kernels: what they need of it, in one place.

Pallas-Triton is deprecated since jax 0.11; another back end would give the same five names.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import ManualAxisType

load, store = triton.load, triton.store
program_id, ds = pl.program_id, pl.ds


WIDEN = "{ prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342; }"


def call(
    kernel: Callable[..., None],
    *arrays: jax.Array,
    grid: tuple[int, ...],
    result: tuple[tuple[int, ...], Any],
    warps: int,
    stages: int,
    name: str,
    interpret: bool,
) -> jax.Array:
    """kernel(*references to the whole arrays, reference to the result) for every program of a grid.

    Inside shard_map the result varies over the mesh axes that an operand varies over.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    shape = jax.ShapeDtypeStruct(*result, manual_axis_type=ManualAxisType(varying=axes))
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=shape,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*arrays)


def dot(a_NK: jax.Array, b_MK: jax.Array) -> jax.Array:
    """float32 [N, M] by tensor cores; float32 operands by ordinary arithmetic, exact to their
    type.
    """
    exact = jax.lax.Precision.HIGHEST if a_NK.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a_NK, b_MK, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def assembly(text: str, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """bfloat16 of PTX for two 16-bit elements of each operand at once."""
    (out,) = triton.elementwise_inline_asm(
        text,
        args=(codes, scales),
        constraints="=r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)],
    )
    return out


def widened(codes: jax.Array) -> jax.Array:
    """int16 of uint8: one instruction for two of four bytes that lie in a register; the compiler
    makes three.
    """
    (out,) = triton.elementwise_inline_asm(
        WIDEN,
        args=(codes,),
        constraints="=r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int16)],
    )
    return out
