"""RMSNorm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.kernels import cpu
from gptoss_jax.ops import between


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

    def reference(x, scale):
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (wide * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)

    def forward(x, scale):
        rows, wide = x.reshape(-1, x.shape[-1]), scale.astype(jnp.float32)
        y, inverse_R = cpu.training.norm(rows, wide, eps)
        return y.reshape(x.shape), (rows, wide, scale, inverse_R)

    def backward(kept, gradient):
        rows, wide, scale, inverse_R = kept
        rows, rows_of = (x.astype(jnp.float32) for x in (rows, gradient.reshape(rows.shape)))
        to_x = cpu.training.norm_gradient(rows_of, rows, wide, inverse_R).reshape(gradient.shape)
        to_scale = (rows_of * rows * inverse_R[:, None]).sum(0)
        return to_x.astype(gradient.dtype), to_scale.astype(scale.dtype)

    with jax.named_scope("rms_norm"):
        width = x.shape[-1]
        return between.run("product", reference, forward, backward, x, scale, width=width)
