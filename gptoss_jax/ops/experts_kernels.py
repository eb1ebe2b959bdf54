"""The experts' feed-forward on one device by each platform's kernels (experts.py is the
definition), and their gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import cpu
from gptoss_jax.ops import backends, between
from gptoss_jax.ops.experts import additions_of, group, in_blocks, swiglu
from gptoss_jax.ops.linear import PACKED, LowRank, adapted_product, low_rank_product
from gptoss_jax.ops.product import packed_product

LOW_RANK_BLOCK = 16  # rows of one expert in a batch of low-rank products


def mlp_on_tpu(*parts, alpha, limit):
    from gptoss_jax.kernels.tpu.moe import mlp  # Pallas takes 0.2 s to import

    return mlp(*parts[:7], alpha=alpha, limit=limit)


def mlp_on_cpu(
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
):
    """`experts.mlp` by the kernel's products and additions, which find the rows of an expert
    themselves.
    """
    M, X = experts_MX.shape
    E, F, P, D = gate_up_EFPD.shape
    flat = experts_MX.reshape(-1)

    def times(name, rows_RI, experts_RX, weight):
        """Rows, each with its experts -> those of every pair [M X, O], float32."""
        if name in low_rank:
            a, b, gain_MR = low_rank[name]
            gain = jnp.repeat(gain_MR, len(rows_RI) // M, axis=0)
            addition = a, b.reshape(E, -1, a.shape[1]), gain
            out: Any = adapted_product(PACKED, rows_RI, experts_RX, weight, *addition)
        else:
            out = packed_product(rows_RI, experts_RX, weight)
        return out.reshape(M * X, -1)

    h = times("gate_up", x_MD, experts_MX, gate_up_EFPD.as_rows())
    bias = gate_up_bias_EFP.reshape(E, F * P)
    act = _biased_swiglu(h, bias, flat, alpha, limit, x_MD.dtype)
    out = times("down", act, flat[:, None], down_EDF)
    # What came out for nobody's rows is biases alone.
    weights_MX = jnp.where(experts_MX < E, weights_MX, 0.0)
    return _weighted_sum(out.reshape(M, X, D), weights_MX, down_bias_ED, experts_MX)


def _biased_swiglu(h_PO, bias_EO, experts_P, alpha, limit, dtype):
    """`swiglu` of rows and their experts' biases, in `dtype`; O are pairs (gate, up)."""

    def reference(h, bias, experts):
        h = h + jnp.take(bias, experts, axis=0, mode="clip").astype(jnp.float32)
        return swiglu(h.reshape(len(h), -1, 2), alpha, limit).astype(dtype)

    def forward(h, bias, experts):
        wide = bias.astype(jnp.float32)
        return cpu.training.swiglu(h, experts, wide, alpha, limit, dtype), (h, bias, experts)

    def backward(kept, gradient):
        h, bias, experts = kept
        wide, gradient = bias.astype(jnp.float32), gradient.astype(jnp.float32)
        to_h = cpu.training.swiglu_gradient(gradient, h, experts, wide, alpha, limit)
        to_bias = jnp.zeros_like(wide).at[experts].add(to_h, mode="drop")
        return to_h, to_bias.astype(bias.dtype), None

    parts, width = (h_PO, bias_EO, experts_P), h_PO.shape[1]
    return between.run("experts", reference, forward, backward, *parts, width=width)


def _weighted_sum(y_MXD, weights_MX, bias_ED, experts_MX):
    """sum_x weights_x (y_x + bias of expert x)."""
    X = experts_MX.shape[1]

    def reference(y, weights, bias, experts):
        y = y + jnp.take(bias, experts, axis=0, mode="clip").astype(jnp.float32)
        # One by one: XLA's CPU reduction over X calls its thread pool, 80 microseconds for one row.
        return sum(y[:, x] * weights[:, x, None] for x in range(X))

    def forward(y, weights, bias, experts):
        wide = bias.astype(jnp.float32)
        return cpu.training.weighted(y, experts, wide, weights), (y, weights, bias, experts)

    def backward(kept, gradient):
        y, weights, bias, experts = kept
        wide = bias.astype(jnp.float32)
        to_y, to_weights = cpu.training.weighted_gradient(gradient, y, experts, wide, weights)
        to_bias = jnp.zeros_like(wide).at[experts].add(to_y, mode="drop")
        return to_y, to_weights, to_bias.astype(bias.dtype), None

    parts = y_MXD, weights_MX, bias_ED, experts_MX
    return between.run("experts", reference, forward, backward, *parts, width=y_MXD.shape[2])


def mlp_on_gpu(*parts, alpha, limit):
    from gptoss_jax.kernels.gpu import moe  # Pallas takes 0.2 s to import

    *arrays, low_rank = parts
    by_products = functools.partial(_mlp_by_products, alpha=alpha, limit=limit)
    if low_rank:
        return by_products(*parts)

    @jax.custom_vjp
    def fused(x, weights, gate_up_bias, down_bias, experts, gate_up, down):
        parts = x, weights, experts, gate_up, gate_up_bias, down, down_bias
        return moe.mlp(*parts, alpha=alpha, limit=limit)

    def backward(kept, gradient):
        """Of the products one by one: they are computed again, and nothing of them was kept."""
        x, weights, gate_up_bias, down_bias, experts, gate_up, down = kept
        arrays = x, weights, gate_up_bias, down_bias

        def again(x, weights, gate_up_bias, down_bias):
            parts = x, weights, experts, gate_up, gate_up_bias, down, down_bias
            return by_products(*parts, {})

        return *jax.vjp(again, *arrays)[1](gradient), None, None, None

    fused.defvjp(lambda *parts: (fused(*parts), parts), backward)
    x, weights, experts, gate_up, gate_up_bias, down, down_bias = arrays
    return fused(x, weights, gate_up_bias, down_bias, experts, gate_up, down)


def _mlp_by_products(
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
):
    """`experts.mlp` by the GPU kernels' products, which find the rows of an expert themselves."""
    from gptoss_jax.kernels.gpu import moe  # Pallas takes 0.2 s to import

    M, X = experts_MX.shape
    E, F, P, D = gate_up_EFPD.shape
    gate_up_EOD, gate_up_bias_EO = gate_up_EFPD.as_rows(), gate_up_bias_EFP.reshape(E, F * P)

    def layer(rows_RD, experts_RX, bias, added):
        """Rows [R, D], each with its experts -> [R X, D]; `bias` and `added` know the experts."""
        h: Any = packed_product(rows_RD, experts_RX, gate_up_EOD, moe)
        h = added("gate_up", rows_RD, h.reshape(-1, F * P) + bias(gate_up_bias_EO))
        act = swiglu(h.reshape(-1, F, P), alpha, limit).astype(x_MD.dtype)
        out: Any = packed_product(act, experts_RX.reshape(-1, 1), down_EDF, moe)
        return added("down", act, out.reshape(-1, D) + bias(down_bias_ED))

    if not low_rank:
        flat = experts_MX.reshape(-1)
        out = layer(
            x_MD,
            experts_MX,
            lambda b_EO: jnp.take(b_EO, flat, axis=0, mode="clip").astype(jnp.float32),
            lambda name, rows, out: out,
        )
    else:
        out = _low_rank_in_blocks(layer, x_MD, experts_MX, low_rank, E)
    # What came out for nobody's rows is biases alone.
    weights_MX = jnp.where(experts_MX < E, weights_MX, 0.0)
    return (out.reshape(M, X, D) * weights_MX[..., None]).sum(1)


def _low_rank_in_blocks(layer, x_MD, experts_MX, low_rank, count):
    """`layer` with low-rank additions: rows lie in blocks of one expert, so that the gradients of
    its additions are products over blocks.
    """
    (M, X), block = experts_MX.shape, LOW_RANK_BLOCK
    slots, sources, block_experts = group(experts_MX.reshape(-1), count + 1, block)
    gathered = functools.partial(in_blocks, sources=sources // X, block=block)
    rows_RD = gathered(x_MD).reshape(-1, x_MD.shape[1])
    experts_R = jnp.where(sources < M * X, jnp.repeat(block_experts, block), count)
    additions = additions_of(low_rank, block_experts, gathered)

    def bias(b_EO):
        chosen = jnp.take(b_EO, block_experts, axis=0, mode="clip").astype(jnp.float32)
        return jnp.repeat(chosen, block, axis=0)

    def added(name, rows_RI, out_RO):
        if name not in additions:
            return out_RO
        a, b, gain = additions[name]
        pair = LowRank(a, b.reshape(len(b), -1, b.shape[-1]), gain)
        with backends.use(product=backends.REFERENCE):  # a batch of small products
            more = jax.vmap(functools.partial(low_rank_product, "bI,OI->bO"))(
                rows_RI.reshape(-1, block, rows_RI.shape[-1]), pair
            )
        return out_RO + more.reshape(out_RO.shape)

    return jnp.take(layer(rows_RD, experts_R[:, None], bias, added), slots, axis=0)
