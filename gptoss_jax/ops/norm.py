"""RMSNorm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * scale, in float32, cast back after the scale.

    Args:
      x: Activations [..., D].
      scale: Learned scale [D].
      eps: Added to the mean square.

    Returns:
      [..., D] in x's dtype.

    Source: openai/gpt-oss gpt_oss/torch/model.py RMSNorm; Zhang and Sennrich 2019.
    """
    with jax.named_scope("rms_norm"):
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (wide * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)
