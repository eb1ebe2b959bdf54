"""The experts' feed-forward on one device: its definition, by XLA alone.

Never does all experts' work for one token, and never holds more unpacked experts than one step of
its loop needs. Knows no mesh's layout and no kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.kernels import cpu, tpu
from gptoss_jax.mxfp4 import MxTensor, nearest
from gptoss_jax.ops.linear import LowRank, Rounded, low_rank_product
from gptoss_jax.ops.product import product

UNPACKED_LIMIT = (
    1 << 24
)  # weights unpacked at once (64 MB in float32); above it experts go one after another
# Rows of one expert that share one unpacking in the grouped path: unpacking costs a CPU about as
# much as 25 rows.
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256
SMALLEST_PART = 8  # of a batch in which not all rows count

Weight = MxTensor | cpu.CpuExperts | tpu.TpuExperts | jax.Array
Addition = LowRank | Rounded


def mlp(
    x_MD,
    weights_MX,
    experts_MX,
    gate_up_EFPD,
    gate_up_bias_EFP,
    down_EDF,
    down_bias_ED,
    low_rank,
    *,
    alpha,
    limit,
    spread=(),
    some=False,
):
    """`moe.expert_mlp` on one device, float32; `spread` over mesh axes or with `some`, expert E is
    nobody's.
    """
    M, X = experts_MX.shape
    E, F, P, D = gate_up_EFPD.shape
    pairs = M * X

    def one(x_bD, expert, added):
        """Rows of one expert: [b, D] -> float32 [b, D]."""
        gate_up = _weight(gate_up_EFPD[expert], added.get("gate_up"), "FPR,RD->FPD", x_bD.dtype)
        h = product("bD,FPD->bFP", x_bD, gate_up)
        h = h + gate_up_bias_EFP[expert].astype(jnp.float32)[None]
        if isinstance(added.get("gate_up"), LowRank):
            h = h + low_rank_product("bD,FPD->bFP", x_bD, added["gate_up"])
        act = swiglu(h, alpha, limit).astype(x_bD.dtype)
        down = _weight(down_EDF[expert], added.get("down"), "DR,RF->DF", x_bD.dtype)
        out = product("bF,DF->bD", act, down)
        out = out + down_bias_ED[expert].astype(jnp.float32)[None]
        if isinstance(added.get("down"), LowRank):
            out = out + low_rank_product("bF,DF->bD", act, added["down"])
        return out

    run = functools.partial(_for_each, unpacked=F * P * D + D * F, count=E, spread=spread)
    if some:
        block = min(LARGEST_BLOCK, max(SMALLEST_PART, 1 << (pairs // E - 1).bit_length()))
        slots, sources, block_experts = group(experts_MX.reshape(-1), E + 1, block)
        out = _for_those(one, x_MD, sources // X, block_experts, low_rank, E, block)
        out = jnp.take(out, slots, axis=0)
    elif pairs <= max(E, SMALLEST_BLOCK):
        rows = jnp.repeat(x_MD, X, axis=0)[:, None]  # [M X, 1, D]
        chosen = experts_MX.reshape(-1)
        added = additions_of(low_rank, chosen, lambda g_MR: jnp.repeat(g_MR, X, axis=0)[:, None])
        out = run(one, rows, chosen, added)[:, 0]
    else:
        block = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (pairs // (8 * E)).bit_length()))
        slots, sources, block_experts = group(experts_MX.reshape(-1), E + bool(spread), block)
        gathered = functools.partial(in_blocks, sources=sources // X, block=block)
        added = additions_of(low_rank, block_experts, gathered)
        out = run(one, gathered(x_MD), block_experts, added).reshape(-1, D)[slots]
    return (out.reshape(M, X, D) * weights_MX[..., None]).sum(1)


def swiglu(
    h_FP: Float[Array, "*batch F P"], alpha: float, limit: float
) -> Float[Array, "*batch F"]:
    """Clamped SwiGLU: g sigmoid(alpha g) (u + 1) with g = min(gate, limit), u = clip(up, -limit,
    limit).

    Source: openai/gpt-oss gpt_oss/torch/model.py swiglu.
    """
    gate, up = h_FP[..., 0], h_FP[..., 1]
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1.0)


def _for_those(one, x_MD, sources, experts, low_rank, count, block):
    """one(rows, expert, added) for the blocks of experts below `count`, which come first; zeros for
    the others.
    """
    rows = in_blocks(x_MD, sources, block)
    gains = {name: in_blocks(pair.gain_BR, sources, block) for name, pair in low_rank.items()}

    def body(i, out):
        expert = experts[i]
        added = {
            name: type(pair)(pair.a[expert], pair.b[expert], gains[name][i])
            for name, pair in low_rank.items()
        }
        return out.at[i].set(one(rows[i], expert, added))

    out = jnp.zeros(rows.shape, jnp.float32)
    used = (experts < count).sum(dtype=jnp.int32)
    return jax.lax.fori_loop(0, used, body, out).reshape(-1, x_MD.shape[1])


def in_blocks(x_MI, sources, block):
    """Rows of each slot, [blocks, block, I]; zeros for an empty one."""
    rows = jnp.take(x_MI, sources, axis=0, mode="fill", fill_value=0)
    return rows.reshape(-1, block, x_MI.shape[-1])


def group(
    experts_R: Int[Array, " R"], count: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts rows by expert into blocks of `block` slots, each of one expert; nothing is dropped,
    whatever the load.

    Args:
      experts_R: Expert of each row.
      count: Number of experts.
      block: Slots a block.

    Returns:
      slot of each row [R]; row of each slot [blocks * block], R * large for an empty one; expert of
      each block, `count` for an empty one.
    """
    R = experts_R.shape[0]
    blocks = R // block + min(count, R)  # sum of ceil(c_e / block) is never more
    order = jnp.argsort(experts_R, stable=True)
    loads = jnp.zeros(count, jnp.int32).at[experts_R].add(1)
    starts = jnp.cumsum(loads) - loads
    block_ends = jnp.cumsum(-(-loads // block))
    block_starts = block_ends - -(-loads // block)
    sorted_experts = experts_R[order]
    sorted_slots = (
        block_starts[sorted_experts] * block
        + jnp.arange(R, dtype=jnp.int32)
        - starts[sorted_experts]
    )
    slots = jnp.zeros(R, jnp.int32).at[order].set(sorted_slots)
    empty = jnp.iinfo(jnp.int32).max
    sources = (
        jnp.full(blocks * block, empty, jnp.int32).at[sorted_slots].set(order.astype(jnp.int32))
    )
    block_experts = jnp.searchsorted(block_ends, jnp.arange(blocks, dtype=jnp.int32), side="right")
    return slots, sources, block_experts.astype(jnp.int32)


def additions_of(low_rank, experts, gains) -> dict[str, Addition]:
    """Low-rank additions of every step: those of its expert. Gathered ahead, so that their
    gradients are scattered once and not added up whole at every step.
    """

    def chosen(x):
        return jnp.take(x, experts, axis=0, mode="clip")

    return {
        name: type(pair)(chosen(pair.a), chosen(pair.b), gains(pair.gain_BR))
        for name, pair in low_rank.items()
    }


def _for_each(one, rows, experts, added, *, unpacked, count, spread):
    """one(rows[i], experts[i], added[i]) for every i: all at once if the unpacked weights are few,
    else one after another. Where the expert is nobody's (`count` or more) the result is of no use:
    one after another it is not computed, but zeros.
    """
    if not spread and rows.shape[0] * unpacked <= UNPACKED_LIMIT:
        return jax.vmap(one)(rows, jnp.minimum(experts, count - 1), added)

    def absent(rows, *_):
        zeros = jnp.zeros(rows.shape, jnp.float32)
        return jax.lax.pcast(zeros, spread, to="varying") if spread else zeros

    @jax.checkpoint
    def step(given):
        present, parts = given
        return jax.lax.cond(present, one, absent, *parts)

    return jax.lax.map(step, (experts < count, (rows, experts, added)))


def _weight(weight: Weight, added: Addition | None, subscripts: str, dtype) -> jax.Array:
    """An expert's weight, unpacked; merged and rounded if what is added is `Rounded`."""
    if not isinstance(added, Rounded):
        return _unpack(weight, dtype)
    whole: Any = nearest(merged(_unpack(weight, jnp.float32), added.a, added.b, subscripts))
    return whole.astype(dtype)


def merged(weight: jax.Array, a: jax.Array, b: jax.Array, subscripts: str) -> jax.Array:
    """weight + b a in float32; `subscripts` are the einsum's of b and a."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return weight.astype(jnp.float32) + jnp.einsum(subscripts, b, a)


def _unpack(weight: Weight, dtype) -> jax.Array:
    return weight if isinstance(weight, jax.Array) else weight.dequantize(dtype)
