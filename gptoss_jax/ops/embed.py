"""Rows of the embedding."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gptoss_jax import sharding
from gptoss_jax.kernels import cpu
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend


@jax.custom_vjp
def embed(tokens_BT: Int[Array, "B T"], weight_VD: Float[Array, "V D"]) -> Float[Array, "B T D"]:
    """Rows of a table.

    A kernel copies them on CPUs: XLA's compiler gathers no bfloat16 there, and would turn the whole
    table into float32 first (2.3 GB for gpt-oss). Of a table that is spread over several GPUs each
    gives the rows that it holds: XLA's partitioner would gather the table there, 1.2 GB a step.

    Args:
      tokens_BT: int32 rows.
      weight_VD: The table.
    """

    def reference(tokens_BT, weight_VD):
        return weight_VD[tokens_BT]

    def kernel(tokens_BT, weight_VD):
        return cpu.table_rows(weight_VD, tokens_BT.reshape(-1)).reshape(*tokens_BT.shape, -1)

    why = "the mesh's partitioner knows gathers only" if sharding.current() else cpu.why_not()
    others = {"cpu": Backend(kernel, why), "gpu": Backend(_spread, _why_not_spread())}
    return backends.run("embed", reference, others, tokens_BT, weight_VD)


def _why_not_spread() -> str | None:
    mesh = sharding.current()
    if mesh is None or mesh.shape["tensor"] == 1:
        return "every device holds the whole table"
    return "rows are cut over fsdp" if mesh.shape["fsdp"] > 1 else None


def _spread(tokens_BT, weight_VD):
    """Each device's own rows of the table, zeros for the others', added up."""

    def own(tokens_BT, weight_VD):
        size = weight_VD.shape[0]
        at_BT = tokens_BT - size * jax.lax.axis_index("tensor")
        here_BT = (at_BT >= 0) & (at_BT < size)
        rows_BTD = weight_VD[jnp.clip(at_BT, 0, size - 1)]
        rows_BTD = jnp.where(here_BT[..., None], rows_BTD, jnp.zeros_like(rows_BTD))
        return jax.lax.psum(rows_BTD, "tensor")

    by_row = sharding.activation_spec("BT", tokens_BT.shape)
    table = PartitionSpec("tensor")
    return jax.shard_map(own, in_specs=(by_row, table), out_specs=by_row)(tokens_BT, weight_VD)


def _forward(tokens_BT, weight_VD):
    return embed(tokens_BT, weight_VD), (tokens_BT, weight_VD)


def _backward(kept, gradient_BTD):
    tokens_BT, weight_VD = kept
    _, pull = jax.vjp(lambda weight_VD: weight_VD[tokens_BT], weight_VD)
    return None, *pull(gradient_BTD)


embed.defvjp(_forward, _backward)
