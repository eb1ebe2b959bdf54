"""Dense products with bias, and low-rank additions to them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax import sharding
from gptoss_jax.kernels import cpu
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend
from gptoss_jax.ops.product import Weight, computed, form_of, product, product_transposed


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
    weight: Weight,
    bias=None,
    addition: LowRank | None = None,
) -> Float[Array, "..."]:
    """einsum(subscripts, x, weight) + bias, summed in float32.

    Args:
      subscripts: Letters of x, weight and output, for example "BTD,NHD->BTNH"; x and output begin
        with BT.
      x: Activations.
      weight: Weight in the released layout (outputs first), of x's dtype; compact ones are frozen.
      bias: None, or an array over the output's last axes.
      addition: Added to the weight.

    Returns:
      The product in x's dtype.
    """
    if addition is None:
        out = product(subscripts, x, weight)
        return (out if bias is None else out + _as(bias, out)).astype(x.dtype)
    form = form_of(subscripts)
    rows = form.rows

    def reference(x, weight, bias, addition):
        out = product(subscripts, x, weight) + low_rank_product(subscripts, x, addition)
        return out if bias is None else out + _as(bias, out)

    def kernel(x, weight, bias, addition):
        M, R = math.prod(x.shape[: len(rows)]), addition.a.shape[0]
        inputs, gain_BR = math.prod(x.shape[len(rows) :]), addition.gain_BR
        repeated = (len(gain_BR), M // len(gain_BR), R)
        out: Any = adapted_product(
            DENSE,
            x.reshape(M, inputs),
            jnp.zeros((M, 1), jnp.int32),
            weight.reshape(-1, inputs),
            addition.a.reshape(1, R, inputs),
            addition.b.reshape(1, -1, R),
            jnp.broadcast_to(gain_BR[:, None], repeated).reshape(M, R),
            None if bias is None else bias.reshape(-1).astype(jnp.float32),
        )
        return out.reshape(*x.shape[: len(rows)], *addition.b.shape[:-1])

    why = "the mesh's partitioner knows einsums only" if sharding.current() else cpu.why_not()
    if not form.plain():
        why = f"{subscripts} is not rows times rows of weights"
    parts = x, weight, bias, addition
    with jax.named_scope("low_rank"):
        out = backends.run("product", reference, {"cpu": Backend(kernel, why)}, *parts)
    return out.astype(x.dtype)


def _as(bias: jax.Array, out: jax.Array) -> jax.Array:
    """A bias over the last axes of `out`."""
    return jnp.expand_dims(bias.astype(jnp.float32), tuple(range(out.ndim - bias.ndim)))


class Base(NamedTuple):
    """A product that something is added to.

    Attributes:
      product: Of x [M, I], experts [M, X], the weight, and whether a gradient is taken: float32
        [M, X, O].
      to_x: Of its gradient [M, X, O], experts and the weight: that of x for each choice, float32
        [M, X, I].
      to_weight: Of its gradient, x and the weight: that of the weight, or None if it is frozen.
    """

    product: Callable[..., Any]
    to_x: Callable[..., Any]
    to_weight: Callable[..., Any]


DENSE = Base(
    lambda x, experts, weight, trained: computed("MI,OI->MO", x, weight, trained)[:, None],
    lambda g, experts, weight: product_transposed("MI,OI->MO", g[:, 0], weight)[:, None],
    lambda g, x, weight: (
        None
        if isinstance(weight, cpu.CompactMatrix)
        else jnp.einsum("MO,MI->OI", g[:, 0], x, preferred_element_type=jnp.float32).astype(
            weight.dtype
        )
    ),
)
PACKED = Base(
    lambda x, experts, weight, trained: cpu.grouped_product(x, experts, weight),
    cpu.grouped_product_transposed,
    lambda g, x, weight: None,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def adapted_product(
    base: Base,
    x_MI: Float[Array, "M I"],
    experts_MX: Int[Array, "M X"],
    weight: Any,
    a_ERI: Float[Array, "E R I"],
    b_EOR: Float[Array, "E O R"],
    gain_MR: Float[Array, "M R"],
    bias_O: Float[Array, " O"] | None = None,
) -> Float[Array, "M X O"]:
    """A product with the weights of the experts that each row names, a low-rank addition to them by
    the CPU's kernel, and a bias; float32. Nothing is added where the expert is nobody's (E or
    more).

    Args:
      base: Computes the product.
      x_MI: Activations.
      experts_MX: int32.
      weight: What `base` multiplies with.
      a_ERI: Of LowRank.
      b_EOR: Of LowRank.
      gain_MR: float32.
      bias_O: float32.
    """
    out_MXO = base.product(x_MI, experts_MX, weight, False)
    return cpu.add_low_rank(out_MXO, x_MI, experts_MX, a_ERI, b_EOR, gain_MR, bias_O)[0]


def _adapted_forward(base, x, experts, weight, a, b, gain, bias):
    out = base.product(x, experts, weight, True)
    out, h = cpu.add_low_rank(out, x, experts, a, b, gain, bias)
    return out, ((x, experts, weight, a, b, gain, bias), h)


def _adapted_backward(base, kept, gradient):
    (x, experts, weight, a, b, gain, bias), h = kept
    rounded = gradient.astype(x.dtype)  # as in ops/product.py
    through = base.to_x(rounded, experts, weight)
    to_x, to_a, to_b, to_gain = cpu.add_low_rank_gradient(
        gradient, x, experts, a, b, gain, h, through
    )
    to_weight = base.to_weight(rounded, x, weight)
    here = ((experts >= 0) & (experts < len(a)))[..., None]
    to_bias = None if bias is None else jnp.where(here, gradient, 0).sum((0, 1))
    parts = to_a.astype(a.dtype), to_b.astype(b.dtype), to_gain.sum(1), to_bias
    return to_x.sum(1).astype(x.dtype), None, to_weight, *parts


adapted_product.defvjp(_adapted_forward, _adapted_backward)


def low_rank_product(subscripts: str, x: jax.Array, addition: LowRank) -> jax.Array:
    """What an addition adds to einsum(subscripts, x, weight), float32.

    Args:
      subscripts: Letters of x, weight and result; x and result begin with the rows' letters, the
        first of which the gains follow.
      x: Activations.
      addition: b (gain * (a x)), computed in x's dtype.
    """
    form = form_of(subscripts)
    rows, inputs, outputs = form.rows, form.inputs, form.outputs
    a, b, gain = addition
    h = product(f"{rows}{inputs},R{inputs}->{rows}R", x, a.astype(x.dtype))
    gain = jnp.expand_dims(gain, tuple(range(1, len(rows))))
    h = (h * gain).astype(x.dtype)
    return product(f"{rows}R,{outputs}R->{rows}{outputs}", h, b.astype(x.dtype))
