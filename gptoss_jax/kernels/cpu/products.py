"""Products of rows with the weights of the experts that each row names."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels.cpu.experts import CpuExperts
from gptoss_jax.mxfp4 import BLOCK, MxTensor


def grouped_product(
    x_MI: Float[Array, "M I"],
    experts_MX: Int[Array, "M X"],
    weight: MxTensor | CpuExperts | Float[Array, "E O I"],
) -> Float[Array, "M X O"]:
    """x times the rows of each chosen expert, float32 sums; zeros where the expert is nobody's (E
    or more).

    Packed weights are read once for each expert that is chosen, and unpacked in a core's own cache,
    those of `CpuExperts` in registers. A row's result does not depend on which other rows
    come with it.

    Args:
      x_MI: bfloat16 or float32; I a multiple of 32.
      experts_MX: int32.
      weight: Packed [E, O, I], or plain in x's dtype.

    Returns:
      float32.
    """
    return _call(x_MI, experts_MX, weight, weight.shape[1], transposed=False)


def grouped_product_transposed(
    g_MXO: Float[Array, "M X O"],
    experts_MX: Int[Array, "M X"],
    weight: MxTensor | CpuExperts | Float[Array, "E O I"],
) -> Float[Array, "M X I"]:
    """g times the columns of each chosen expert: the gradient of `grouped_product` with respect to
    x, one for each choice; O even. Arguments and result as there.
    """
    weight = weight.released() if isinstance(weight, CpuExperts) else weight
    return _call(g_MXO, experts_MX, weight, weight.shape[2], transposed=True)


def _call(x, experts_MX, weight, outputs: int, transposed: bool):
    if isinstance(weight, MxTensor | CpuExperts):
        assert weight.shape[-1] % BLOCK == 0
        parts = weight.blocks, weight.scales
    else:
        assert weight.dtype == x.dtype, "plain weights have the activations' dtype"
        parts = weight, jnp.zeros(1, jnp.uint8)
    out = jax.ShapeDtypeStruct((*experts_MX.shape, outputs), jnp.float32)
    call = jax.ffi.ffi_call("gptoss_product", out, vmap_method="sequential")
    return call(x, experts_MX, *parts, transposed=transposed)
