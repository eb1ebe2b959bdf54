"""Rotary position embedding with YaRN, as gpt-oss uses it: bounds not rounded, concentration on cos
and sin.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels import cpu
from gptoss_jax.ops import between


@functools.lru_cache
def frequencies(
    head_dim: int,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_context: int,
) -> tuple[np.ndarray, float]:
    """Inverse frequencies and the concentration.

    Frequencies that turn more than beta_fast times in the original context are kept, those that
    turn less than beta_slow times are divided by the factor, between them a linear ramp; the bounds
    are not rounded (truncate: false).

    Args:
      head_dim: Size of a head, even.
      theta: Base.
      factor: Extension; 1 or less means plain rotary embedding.
      beta_fast: Upper bound, in rotations.
      beta_slow: Lower bound, in rotations.
      original_context: Context before the extension, in tokens.

    Returns:
      float32 [head_dim / 2] in radians a position, and the factor of both cos and sin.

    Source: Peng et al. 2023 (YaRN), section 3.2; openai/gpt-oss gpt_oss/torch/model.py
    RotaryEmbedding.
    """
    half = head_dim // 2
    base = theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if factor <= 1:
        return (1 / base).astype(np.float32), 1.0

    def bound(rotations: float) -> float:
        return half * math.log(original_context / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = bound(beta_fast), bound(beta_slow)
    keep = 1 - np.clip((np.arange(half) - low) / (high - low), 0, 1)
    mixed = (1 / (factor * base)) * (1 - keep) + (1 / base) * keep
    return mixed.astype(np.float32), 0.1 * math.log(factor) + 1.0


def rotation(
    positions_BT: Int[Array, "B T"], inverse: np.ndarray, concentration: float
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """cos and sin of every position, times the concentration.

    Args:
      positions_BT: Positions, int32.
      inverse: Inverse frequencies, float32 [H / 2].
      concentration: YaRN's factor.

    Returns:
      Two float32 arrays [B, T, H / 2].
    """
    angles = positions_BT.astype(jnp.float32)[..., None] * jnp.asarray(inverse)[None, None]
    return jnp.cos(angles) * concentration, jnp.sin(angles) * concentration


def rotate(
    x: Float[Array, "B T n H"], cos: Float[Array, "B T h"], sin: Float[Array, "B T h"]
) -> Float[Array, "B T n H"]:
    """Rotates the first half of every head against the second (NeoX order), in float32.

    Args:
      x: Queries or keys [B, T, heads, H].
      cos: float32 [B, T, H / 2].
      sin: float32 [B, T, H / 2]; angles have no gradient.

    Returns:
      [B, T, heads, H] in x's dtype.
    """

    def reference(x, cos, sin):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = cos[:, :, None], sin[:, :, None]
        return jnp.concatenate(
            [first * cos - second * sin, second * cos + first * sin], axis=-1
        ).astype(x.dtype)

    def turned(x, cos, sin, back=False):
        cos, sin = (angle.reshape(-1, angle.shape[-1]) for angle in (cos, sin))
        return cpu.training.rotate(x.reshape(-1, *x.shape[2:]), cos, sin, back).reshape(x.shape)

    def forward(x, cos, sin):
        return turned(x, cos, sin), (cos, sin)

    def backward(kept, gradient):
        return turned(gradient, *kept, back=True), None, None

    with jax.named_scope("rotate"):
        width = x.shape[2] * x.shape[3]
        return between.run("attention", reference, forward, backward, x, cos, sin, width=width)
