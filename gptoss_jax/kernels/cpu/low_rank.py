"""Low-rank additions to products with the weights of the experts that each row names."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def add_low_rank(
    y_MXO: Float[Array, "M X O"],
    x_MI: Float[Array, "M I"],
    experts_MX: Int[Array, "M X"],
    a_ERI: Float[Array, "E R I"],
    b_EOR: Float[Array, "E O R"],
    gain_MR: Float[Array, "M R"],
    bias_O: Float[Array, " O"] | None = None,
) -> tuple[Float[Array, "M X O"], Float[Array, "M X R"]]:
    """y + b (gain * (a x)) + bias of every chosen expert, float32 inside.

    A row's result does not depend on which other rows come with it; nothing is added where the
    expert is nobody's (E or more).

    Args:
      y_MXO: float32.
      x_MI: bfloat16 or float32.
      experts_MX: int32.
      a_ERI: bfloat16 or float32.
      b_EOR: As a.
      gain_MR: float32.
      bias_O: float32, the same for all experts.

    Returns:
      The sum, and a x, which the gradient takes; float32.
    """
    out = (
        jax.ShapeDtypeStruct(y_MXO.shape, jnp.float32),
        jax.ShapeDtypeStruct((*experts_MX.shape, a_ERI.shape[1]), jnp.float32),
    )
    # Not in place: XLA would copy y first.
    call: Any = jax.ffi.ffi_call("gptoss_low_rank", out, vmap_method="sequential")
    bias = jnp.zeros(0, jnp.float32) if bias_O is None else bias_O
    return call(y_MXO, x_MI, experts_MX, a_ERI, b_EOR, gain_MR, bias)


def add_low_rank_gradient(
    d_MXO: Float[Array, "M X O"],
    x_MI: Float[Array, "M I"],
    experts_MX: Int[Array, "M X"],
    a_ERI: Float[Array, "E R I"],
    b_EOR: Float[Array, "E O R"],
    gain_MR: Float[Array, "M R"],
    h_MXR: Float[Array, "M X R"],
    through_y_MXI: Float[Array, "M X I"],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of x, a, b and gain, float32; those of x and gain one for each choice, [M, X, I]
    and [M, X, R].

    Args:
      d_MXO: Gradient of the result, float32.
      x_MI: And what follows: as `add_low_rank`.
      h_MXR: Its second result.
      through_y_MXI: The gradient of x that comes through y, float32; what is found is added.
    """
    choices = experts_MX.shape
    shapes = (*choices, x_MI.shape[1]), a_ERI.shape, b_EOR.shape, (*choices, a_ERI.shape[1])
    out = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    call: Any = jax.ffi.ffi_call("gptoss_low_rank_gradient", out, vmap_method="sequential")
    return call(d_MXO, x_MI, experts_MX, a_ERI, b_EOR, gain_MR, h_MXR, through_y_MXI)
