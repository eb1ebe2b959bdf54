"""Rows of the embedding."""

import jax
from jaxtyping import Array, Float, Int

from gptoss_jax import sharding
from gptoss_jax.kernels import cpu
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend


@jax.custom_vjp
def embed(tokens_BT: Int[Array, "B T"], weight_VD: Float[Array, "V D"]) -> Float[Array, "B T D"]:
    """Rows of a table.

    A kernel copies them on CPUs: XLA's compiler gathers no bfloat16 there, and would turn the whole
    table into float32 first (2.3 GB for gpt-oss).

    Args:
      tokens_BT: int32 rows.
      weight_VD: The table.
    """

    def reference(tokens_BT, weight_VD):
        return weight_VD[tokens_BT]

    def kernel(tokens_BT, weight_VD):
        return cpu.table_rows(weight_VD, tokens_BT.reshape(-1)).reshape(*tokens_BT.shape, -1)

    why = "the mesh's partitioner knows gathers only" if sharding.current() else cpu.why_not()
    return backends.run("embed", reference, {"cpu": Backend(kernel, why)}, tokens_BT, weight_VD)


def _forward(tokens_BT, weight_VD):
    return embed(tokens_BT, weight_VD), (tokens_BT, weight_VD)


def _backward(kept, gradient_BTD):
    tokens_BT, weight_VD = kept
    _, pull = jax.vjp(lambda weight_VD: weight_VD[tokens_BT], weight_VD)
    return None, *pull(gradient_BTD)


embed.defvjp(_forward, _backward)
