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
    addition: LowRank | None = None,
) -> Float[Array, "..."]:
    """einsum(subscripts, x, weight) + bias, summed in float32.

    Args:
      subscripts: Letters of x, weight and output, for example "BTD,NHD->BTNH"; x and output begin
        with BT.
      x: Activations.
      weight: Weight in the released layout (outputs first), of x's dtype.
      bias: None, or an array over the output's last axes.
      addition: Added to the weight.

    Returns:
      The product in x's dtype.
    """
    out = product(subscripts, x, weight)
    if bias is not None:
        out = out + jnp.expand_dims(bias.astype(jnp.float32), tuple(range(out.ndim - bias.ndim)))
    if addition is not None:
        with jax.named_scope("low_rank"):
            out = out + low_rank_product(subscripts, x, addition)
    return out.astype(x.dtype)


def low_rank_product(subscripts: str, x: jax.Array, addition: LowRank) -> jax.Array:
    """What an addition adds to einsum(subscripts, x, weight), float32.

    Args:
      subscripts: Letters of x, weight and result; x and result begin with the rows' letters, the
        first of which the gains follow.
      x: Activations.
      addition: b (gain * (a x)), computed in x's dtype.
    """
    given, result = subscripts.split("->")
    letters, weight = given.split(",")
    rows = "".join(letter for letter in letters if letter not in weight)
    a, b, gain = addition
    h = product(f"{letters},R{letters[len(rows) :]}->{rows}R", x, a.astype(x.dtype))
    gain = jnp.expand_dims(gain, tuple(range(1, len(rows))))
    h = (h * gain).astype(x.dtype)
    return product(f"{rows}R,{result[len(rows) :]}R->{result}", h, b.astype(x.dtype))
