"""Dense products with bias."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(
    subscripts: str, x: Float[Array, "..."], weight: Float[Array, "..."], bias=None
) -> Float[Array, "..."]:
    """einsum(subscripts, x, weight) + bias, summed in float32.

    Args:
      subscripts: Letters of x, weight and output, for example "BTD,NHD->BTNH".
      x: Activations.
      weight: Weight in the released layout (outputs first), of x's dtype.
      bias: None, or an array over the output's last axes.

    Returns:
      The product in x's dtype.
    """
    out = jnp.einsum(subscripts, x, weight, preferred_element_type=jnp.float32)
    if bias is not None:
        out = out + jnp.expand_dims(bias.astype(jnp.float32), tuple(range(out.ndim - bias.ndim)))
    return out.astype(x.dtype)
