"""Dense products with bias, and low-rank additions to them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax import sharding
from gptoss_jax.kernels import cpu
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend
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
    if addition is not None:
        with jax.named_scope("low_rank"):
            out = add_low_rank(subscripts, out, x, addition)
    if bias is not None:
        out = out + jnp.expand_dims(bias.astype(jnp.float32), tuple(range(out.ndim - bias.ndim)))
    return out.astype(x.dtype)


def add_low_rank(
    subscripts: str, out: jax.Array, x: jax.Array, addition: LowRank
) -> Float[Array, "..."]:
    """out + `low_rank_product`, float32; arguments as there."""
    rows = _letters(subscripts)[0]

    def reference(out, x, addition):
        return out + low_rank_product(subscripts, x, addition)

    def kernel(out, x, addition):
        M, R = math.prod(x.shape[: len(rows)]), addition.a.shape[0]
        gain_BR = addition.gain_BR
        repeated = (len(gain_BR), M // len(gain_BR), R)
        gain_MR = jnp.broadcast_to(gain_BR[:, None], repeated).reshape(M, R)
        return grouped_low_rank(
            out.reshape(M, 1, -1),
            x.reshape(M, -1),
            jnp.zeros((M, 1), jnp.int32),
            addition.a.reshape(1, R, -1),
            addition.b.reshape(1, -1, R),
            gain_MR,
        ).reshape(out.shape)

    why = "the mesh's partitioner knows einsums only" if sharding.current() else cpu.why_not()
    return backends.run("product", reference, {"cpu": Backend(kernel, why)}, out, x, addition)


@jax.custom_vjp
def grouped_low_rank(y_MXO, x_MI, experts_MX, a_ERI, b_EOR, gain_MR) -> Float[Array, "M X O"]:
    """`kernels.cpu.add_low_rank` and its gradient."""
    return cpu.add_low_rank(y_MXO, x_MI, experts_MX, a_ERI, b_EOR, gain_MR)[0]


def _forward(y_MXO, *parts):
    out, h = cpu.add_low_rank(y_MXO, *parts)
    return out, (parts, h)


def _backward(kept, gradient):
    (x, experts, a, b, gain), h = kept
    to_x, to_a, to_b, to_gain = cpu.add_low_rank_gradient(gradient, x, experts, a, b, gain, h)
    to_x = to_x.sum(1).astype(x.dtype)
    return gradient, to_x, None, to_a.astype(a.dtype), to_b.astype(b.dtype), to_gain.sum(1)


grouped_low_rank.defvjp(_forward, _backward)


def low_rank_product(subscripts: str, x: jax.Array, addition: LowRank) -> jax.Array:
    """What an addition adds to einsum(subscripts, x, weight), float32.

    Args:
      subscripts: Letters of x, weight and result; x and result begin with the rows' letters, the
        first of which the gains follow.
      x: Activations.
      addition: b (gain * (a x)), computed in x's dtype.
    """
    rows, inputs, outputs = _letters(subscripts)
    a, b, gain = addition
    h = product(f"{rows}{inputs},R{inputs}->{rows}R", x, a.astype(x.dtype))
    gain = jnp.expand_dims(gain, tuple(range(1, len(rows))))
    h = (h * gain).astype(x.dtype)
    return product(f"{rows}R,{outputs}R->{rows}{outputs}", h, b.astype(x.dtype))


def _letters(subscripts: str) -> tuple[str, str, str]:
    """Letters of rows, inputs and outputs."""
    given, result = subscripts.split("->")
    letters, weight = given.split(",")
    rows = "".join(letter for letter in letters if letter not in weight)
    return rows, letters[len(rows) :], result[len(rows) :]
