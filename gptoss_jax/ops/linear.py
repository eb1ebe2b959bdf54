"""Dense products with bias, and low-rank additions to them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.ops.product import product


class LowRank(NamedTuple):
    """A low-rank addition to a weight, each row of the batch with its own gains: y += b (gain * (a
    x)).

    Attributes:
      a: [R, inputs], of experts [E, R, inputs].
      b: [outputs, R], of experts [E, outputs, R].
      gain_BR: float32, [B, R] or [1, R] for all rows. A LoRA's alpha / rank; with several adapters
        stacked along R, zero for those that a row does not use.
    """

    a: jax.Array
    b: jax.Array
    gain_BR: jax.Array


class Rounded(NamedTuple):
    """A low-rank addition to experts' weights that are then rounded to MXFP4: W' = round(W + b a),
    the gradient as if nothing were rounded. What a merged MXFP4 checkpoint computes.

    Attributes:
      a, b: As LowRank, b with the scale in it.
      gain_BR: Not used; rows cannot differ.
    """

    a: jax.Array
    b: jax.Array
    gain_BR: jax.Array


def linear(
    subscripts: str,
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    bias=None,
    low_rank: LowRank | None = None,
) -> Float[Array, "..."]:
    """einsum(subscripts, x, weight) + bias, summed in float32.

    Args:
      subscripts: Letters of x, weight and output, for example "BTD,NHD->BTNH"; x and output begin
        with BT.
      x: Activations.
      weight: Weight in the released layout (outputs first), of x's dtype.
      bias: None, or an array over the output's last axes.
      low_rank: Added to the weight; computed in x's dtype, summed in float32.

    Returns:
      The product in x's dtype.
    """
    out = product(subscripts, x, weight)
    if bias is not None:
        out = out + jnp.expand_dims(bias.astype(jnp.float32), tuple(range(out.ndim - bias.ndim)))
    if low_rank is not None:
        with jax.named_scope("low_rank"):
            out = out + _added(subscripts, x, low_rank)
    return out.astype(x.dtype)


def _added(subscripts: str, x: jax.Array, low_rank: LowRank) -> jax.Array:
    given, result = subscripts.split("->")
    inputs = given.split(",")[0][2:]
    a, b, gain_BR = low_rank
    h_BTR = product(f"BT{inputs},R{inputs}->BTR", x, a.astype(x.dtype))
    h_BTR = (h_BTR * gain_BR[:, None]).astype(x.dtype)
    return product(f"BTR,{result[2:]}R->{result}", h_BTR, b.astype(x.dtype))
