"""Attention of one new token for each sequence: rotate, store, attend.

One operation because a GPU does it in one kernel where three operations are seven; its definition
is those three.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from gptoss_jax import sharding
from gptoss_jax.ops import backends
from gptoss_jax.ops.attention import attention, why_not_gpu
from gptoss_jax.ops.backends import Backend
from gptoss_jax.ops.rope import rotate

LETTERS = "BTNH", "BTKH", "BTKH", "BTh", "BTh", "BSKH", "BSKH", "B", "N", "BT", "BS"


def attend_one(
    q_B1NH: Float[Array, "B 1 N H"],
    k_B1KH: Float[Array, "B 1 K H"],
    v_B1KH: Float[Array, "B 1 K H"],
    rotation: tuple[Float[Array, "B 1 h"], Float[Array, "B 1 h"]],
    stored: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]],
    slots_B: Int[Array, " B"],
    sinks_N: Float[Array, " N"],
    q_positions_B1: Int[Array, "B 1"],
    k_positions_BS: Int[Array, "B S"],
    window: int | None,
    extent_B: Int[Array, " B"] | None,
    store: Callable[..., jax.Array],
) -> tuple[Float[Array, "B 1 N H"], tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]]:
    """Attention of a token to what is stored and to itself; no gradient.

    Args:
      q_B1NH, k_B1KH, v_B1KH: Of the token, not rotated.
      rotation: cos and sin of its position, as `rotate` takes them.
      stored: Keys and values; written over.
      slots_B: int32, where the token's go.
      sinks_N, q_positions_B1, k_positions_BS, window, extent_B: As `attention`; the positions are
        those after storing.
      store: (stored, new, slots) -> stored; `cache.append`.

    Returns:
      [B, 1, N, H] in q's dtype, and the new keys and values.
    """
    cos, sin = rotation
    parts = q_B1NH, k_B1KH, v_B1KH, cos, sin, *stored, slots_B, sinks_N
    parts = *parts, q_positions_B1, k_positions_BS

    def reference(q, k, v, cos, sin, keys, values, slots, sinks, *positions: Any):
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        keys, values = store(keys, k, slots), store(values, v, slots)
        out = attention(q, keys, values, sinks, *positions, window=window, extent_B=extent_B)
        return out, keys, values

    def on_gpu(*parts):
        from gptoss_jax.kernels.gpu import decode  # Pallas takes 0.2 s to import

        def call(*parts: Any):
            return decode.attend_one(*parts, window=window)

        if sharding.current() is None:
            return call(*parts)
        specs = tuple(map(sharding.activation_spec, LETTERS, [x.shape for x in parts]))
        return jax.shard_map(call, in_specs=specs, out_specs=(specs[0], *specs[5:7]))(*parts)

    others = {name: Backend(reference, None) for name in ("cpu", "tpu")}
    others["gpu"] = Backend(on_gpu, why_not_gpu(q_B1NH, stored[0]))
    with jax.named_scope("attend_one"):
        out, *stored_after = backends.run("attention", reference, others, *parts)
    keys, values = stored_after
    return out, (keys, values)
