"""The loss of training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels import cpu
from gptoss_jax.ops import between


def cross_entropy(
    logits: Float[Array, "*batch V"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
) -> Float[Array, ""]:
    """sum weights (log sum exp(logits) - logits[target]), float32.

    Args:
      logits: float32.
      targets: int32.
      weights: float32; they have no gradient.
    """

    def reference(logits, targets, weights):
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        chosen = jnp.where(targets[..., None] == ids, logits, 0).sum(-1)
        return (weights * (jax.nn.logsumexp(logits, axis=-1) - chosen)).sum()

    def forward(logits, targets, weights):
        rows = logits.reshape(-1, logits.shape[-1])
        found, loss = cpu.training.cross_entropy(rows, targets.reshape(-1), weights.reshape(-1))
        return loss.sum(), found.reshape(logits.shape)

    def backward(found, gradient):
        return found * gradient, None, None

    with jax.named_scope("cross_entropy"):
        return between.run("product", reference, forward, backward, logits, targets, weights)
