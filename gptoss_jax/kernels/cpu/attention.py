"""Attention with sinks, decode and prefill."""

import jax
from jaxtyping import Array, Float, Int

HEAD_BLOCK = 64  # heads' sizes are multiples of it


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    sinks_N: Float[Array, " N"],
    q_positions_BT: Int[Array, "B T"],
    k_positions_BS: Int[Array, "B S"],
    window: int | None,
) -> Float[Array, "B T N H"]:
    """`ops.attention` without segments; its cost follows the keys that are visible, not S.

    Args:
      q_BTNH: bfloat16 or float32; H a multiple of 64.
      k_BSKH: Of q's dtype, as v_BSKH.
      sinks_N: float32.
      q_positions_BT: int32.
      k_positions_BS: int32, -1 where nothing is.
      window: As there.

    Returns:
      [B, T, N, H] in q's dtype. Weights are rounded to it before they are divided by their sum,
      the reference's after.
    """
    out = jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)
    call = jax.ffi.ffi_call("gptoss_attention", out, vmap_method="sequential")
    parts = q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS
    return call(*parts, window=window or 0)
