"""Attention with sinks, and its gradient."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

HEAD_BLOCK = 32  # heads' sizes are multiples of it

Segments = tuple[Int[Array, "B T"], Int[Array, "B S"]] | None


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    sinks_N: Float[Array, " N"],
    q_positions_BT: Int[Array, "B T"],
    k_positions_BS: Int[Array, "B S"],
    window: int | None,
    segments: Segments = None,
) -> Float[Array, "B T N H"]:
    """`ops.attention`; its cost follows the keys that are visible, not S.

    Args:
      q_BTNH: bfloat16 or float32; H a multiple of 32.
      k_BSKH: Of q's dtype, as v_BSKH.
      sinks_N: float32.
      q_positions_BT: int32.
      k_positions_BS: int32, -1 where nothing is.
      window: As there.
      segments: As there, int32.

    Returns:
      [B, T, N, H] in q's dtype. Weights are rounded to it before they are divided by their sum,
      the reference's after.
    """
    parts = q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS
    return attention_and_norm(*parts, window, segments)[0]


def attention_and_norm(
    q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS, window, segments=None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`attention`, and float32 log(exp(sink) + sum_j exp(q.k_j / sqrt(H))), which its gradient
    takes.
    """
    out = (
        jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        jax.ShapeDtypeStruct(q_BTNH.shape[:3], jnp.float32),
    )
    call: Any = jax.ffi.ffi_call("gptoss_attention", out, vmap_method="sequential")
    parts = q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS
    return call(*parts, *_arrays(segments), window=window or 0)


def attention_gradient(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    sinks_N,
    q_positions_BT,
    k_positions_BS,
    window,
    segments,
    out_BTNH: Float[Array, "B T N H"],
    norm_BTN: Float[Array, "B T N"],
    d_out_BTNH: Float[Array, "B T N H"],
) -> tuple[jax.Array, jax.Array, jax.Array, Float[Array, " N"]]:
    """Gradients of q, k, v and sinks; weights are made again, none are held.

    Args:
      q_BTNH: And what follows: as `attention_and_norm`.
      out_BTNH: Its results.
      norm_BTN: As out.
      d_out_BTNH: Gradient of out, in its dtype.

    Returns:
      In q's dtype, rounded once; that of the sinks in float32.

    Source: Dao, FlashAttention-2, 2023, algorithm 2.
    """
    results = (
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BTNH, k_BSKH, v_BSKH)),
        (jax.ShapeDtypeStruct(sinks_N.shape, jnp.float32)),
    )
    call: Any = jax.ffi.ffi_call("gptoss_attention_gradient", results, vmap_method="sequential")
    parts = q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS, *_arrays(segments)
    return call(*parts, out_BTNH, norm_BTN, d_out_BTNH, window=window or 0)


def _arrays(segments: Segments) -> tuple[jax.Array, jax.Array]:
    """Empty ones for none."""
    none = jnp.zeros(0, jnp.int32)
    return (none, none) if segments is None else segments
