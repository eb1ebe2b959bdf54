"""The mixture of experts: router and expert feed-forward, dropless, on packed MXFP4 or plain
weights.

Never does all experts' work for one token, and never holds more unpacked experts than one step of
its loop needs. On a mesh (the context's) experts stay where they are, packed, and tokens travel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import sharding
from gptoss_jax.kernels import cpu, gpu, tpu
from gptoss_jax.mxfp4 import MxTensor, nearest
from gptoss_jax.ops import backends, trained
from gptoss_jax.ops.backends import Backend
from gptoss_jax.ops.linear import LowRank, Rounded, grouped_low_rank, low_rank_product
from gptoss_jax.ops.product import packed_product, product

UNPACKED_LIMIT = (
    1 << 24
)  # weights unpacked at once (64 MB in float32); above it experts go one after another
# Rows of one expert that share one unpacking in the grouped path: unpacking costs a CPU about as
# much as 25 rows.
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256
SMALLEST_PART = 8  # of a batch in which not all rows count
LOW_RANK_BLOCK = 16  # rows of one expert in a batch of low-rank products

Weight = MxTensor | tpu.TpuExperts | jax.Array
Addition = LowRank | Rounded


def route(
    x_MD: Float[Array, "M D"],
    weight_ED: Float[Array, "E D"],
    bias_E: Float[Array, " E"],
    chosen: int,
    rows: tuple[str, ...] = (),
) -> tuple[Float[Array, "M X"], Int[Array, "M X"]]:
    """Chooses experts by the largest logits and weighs them by a softmax over the chosen ones.

    Args:
      x_MD: Normalised activations.
      weight_ED: Router weight.
      bias_E: Router bias, part of the logits.
      chosen: Experts a token (X).
      rows: Mesh axes over which M is spread (`sharding.batch_axes`); () without a mesh.

    Returns:
      float32 weights [M, X] that sum to 1, and int32 expert ids [M, X].

    Source: openai/gpt-oss gpt_oss/torch/model.py MLPBlock.forward (softmax after top-k).
    """

    @jax.named_scope("route")
    def local(x_MD, weight_ED, bias_E):
        logits = jnp.einsum("MD,ED->ME", x_MD, weight_ED, preferred_element_type=jnp.float32)
        logits = logits + bias_E.astype(jnp.float32)[None]
        top, experts = jax.lax.top_k(logits, chosen)
        return jax.nn.softmax(top, axis=-1), experts.astype(jnp.int32)

    if rows:  # left alone, the partitioner gathers what top_k takes
        by_row, whole = PartitionSpec(rows), PartitionSpec()
        local = jax.shard_map(local, in_specs=(by_row, whole, whole), out_specs=by_row)
    return local(x_MD, weight_ED, bias_E)


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


def expert_mlp(
    x_MD: Float[Array, "M D"],
    weights_MX: Float[Array, "M X"],
    experts_MX: Int[Array, "M X"],
    gate_up_EFPD: Weight,
    gate_up_bias_EFP: Float[Array, "E F P"],
    down_EDF: Weight,
    down_bias_ED: Float[Array, "E D"],
    *,
    alpha: float,
    limit: float,
    rows: tuple[str, ...] = (),
    low_rank: dict[str, Addition] | None = None,
    counted_M: Bool[Array, " M"] | None = None,
) -> Float[Array, "M D"]:
    """sum_x weights_x (down_e swiglu(gate_up_e x + bias_e) + bias_e), e = experts_x: the chosen
    experts only.

    Few rows: one matrix-vector product for each (row, expert) pair. Many: pairs are sorted by
    expert into blocks of at most 64 rows, and every block unpacks its expert once.

    Args:
      x_MD: Normalised activations.
      weights_MX: float32 routing weights.
      experts_MX: int32 ids.
      gate_up_EFPD: MxTensor, a kernel's own layout of it, or an array of x's dtype; P is the
        interleaved (gate, up) pair.
      gate_up_bias_EFP: Bias.
      down_EDF: As gate_up.
      down_bias_ED: Bias, added before the weighting.
      alpha: SwiGLU's slope.
      limit: SwiGLU's clamp.
      rows: Mesh axes over which M is spread (`sharding.batch_axes`); () without a mesh.
      low_rank: Additions to the weights, "gate_up" (a [E, R, D], b [E, F, P, R]) and "down" (a [E,
        R, F], b [E, D, R]), either or both; gains [M, R] or [1, R]. With `Rounded` a block of rows
        makes the merged weight of its expert, rounded to MXFP4.
      counted_M: Rows that matter: the others give zeros, and their experts are not computed (no
        gradient). A row's result does not depend on which others count. None counts all.

    Returns:
      [M, D] in x's dtype.
    """
    if counted_M is not None:
        experts_MX = jnp.where(counted_M[:, None], experts_MX, gate_up_EFPD.shape[0])
    low_rank = {
        name: pair._replace(
            gain_BR=jnp.broadcast_to(pair.gain_BR, (x_MD.shape[0], pair.gain_BR.shape[1]))
        )
        for name, pair in (low_rank or {}).items()
    }
    parts = x_MD, weights_MX, experts_MX, gate_up_EFPD, gate_up_bias_EFP, down_EDF, down_bias_ED
    if sharding.current() is not None:
        return _spread_mlp(*parts, low_rank, alpha=alpha, limit=limit, rows=rows)
    with jax.named_scope("expert_mlp"):
        some = counted_M is not None
        out_MD = _computed(*parts, low_rank, alpha=alpha, limit=limit, some=some)
        return out_MD.astype(x_MD.dtype)


def _spread_mlp(
    x_MD,
    weights_MX,
    experts_MX,
    gate_up,
    gate_up_bias,
    down,
    down_bias,
    low_rank,
    *,
    alpha,
    limit,
    rows,
):
    """`expert_mlp` on a mesh: a device computes the pairs whose experts it holds; drops nothing.

    Rows that are not spread over the expert axis (decode of small batches) are on all its devices:
    each adds its experts' share, one psum. Rows that are (prefill, training) are all-gathered over
    it, and the shares go back by psum_scatter: M D (2 + 4) bytes a device and layer for M rows of
    the whole axis, whatever the load. All-to-all would move M X D (2 + 4) / size, which is less
    only on axes larger than X = 4; and, to drop nothing, its buffers must hold the worst load, all
    M X pairs on one device. Weights travel over fsdp only, as packed bytes.
    """

    mesh = sharding.current()
    assert mesh is not None
    shape = mesh.shape
    spread = tuple(axis for axis in sharding.EXPERT_AXES if shape[axis] > 1)
    by_row, by_expert = PartitionSpec(rows or None), PartitionSpec(spread or None)
    gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    scatter = functools.partial(jax.lax.psum_scatter, axis_name="expert", tiled=True)
    rest = tuple(axis for axis in spread if axis not in rows)

    @jax.named_scope("expert_mlp")
    def local(x_MD, weights_MX, experts_MX, *held: Any):
        if "expert" in rows:
            x_MD, weights_MX, experts_MX = gather(x_MD), gather(weights_MX), gather(experts_MX)
            low_rank = {
                name: pair._replace(gain_BR=gather(pair.gain_BR)) for name, pair in held[-1].items()
            }
            held = (*held[:-1], low_rank)
        count = held[0].shape[0]
        experts_MX = experts_MX - count * (jax.lax.axis_index(spread) if spread else 0)
        here_MX = (experts_MX >= 0) & (experts_MX < count)
        out_MD = _computed(
            x_MD,
            jnp.where(here_MX, weights_MX, 0.0),
            jnp.where(here_MX, experts_MX, count),
            *held,
            alpha=alpha,
            limit=limit,
            spread=tuple(dict.fromkeys((*rows, *spread))),
        )
        if "expert" in rows:
            out_MD = scatter(out_MD)
        return (jax.lax.psum(out_MD, rest) if rest else out_MD).astype(x_MD.dtype)

    additions = {name: type(pair)(by_expert, by_expert, by_row) for name, pair in low_rank.items()}
    specs = (*(by_row,) * 3, *(by_expert,) * 4, additions)
    return jax.shard_map(local, in_specs=specs, out_specs=by_row)(
        x_MD, weights_MX, experts_MX, gate_up, gate_up_bias, down, down_bias, low_rank
    )


def _computed(*parts, alpha, limit, spread=(), some=False):
    """`_mlp` by the back end of the platform."""
    gate_up, down, low_rank = parts[3], parts[5], parts[7]

    def why_not_cpu():
        if not (isinstance(gate_up, MxTensor) and isinstance(down, MxTensor)):
            return "experts are not packed"
        if any(isinstance(pair, Rounded) for pair in low_rank.values()):
            return "merged experts are rounded one after another"
        if spread:
            return "experts are spread over a mesh"
        return cpu.why_not()

    def why_not_gpu():
        if any(isinstance(pair, Rounded) for pair in low_rank.values()):
            return "merged experts are rounded one after another"
        if spread and low_rank:
            return "low-rank additions to experts that are spread over a mesh"
        return gpu.why_not(gate_up, down)

    reference = functools.partial(_mlp, alpha=alpha, limit=limit, spread=spread, some=some)
    others = {
        "cpu": Backend(functools.partial(_mlp_on_cpu, alpha=alpha, limit=limit), why_not_cpu()),
        "gpu": Backend(
            functools.partial(_mlp_on_gpu, alpha=alpha, limit=limit, spread=spread), why_not_gpu()
        ),
        "tpu": Backend(
            functools.partial(_mlp_on_tpu, alpha=alpha, limit=limit),
            tpu.why_not(gate_up, down) or ("low-rank additions" if low_rank else None),
        ),
    }
    return backends.run("experts", reference, others, *parts)


def _mlp_on_tpu(*parts, alpha, limit):
    from gptoss_jax.kernels.tpu.moe import mlp  # Pallas takes 0.2 s to import

    return mlp(*parts[:7], alpha=alpha, limit=limit)


def _mlp_on_cpu(
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
    """`_mlp` by the kernel's products and additions, which find the rows of an expert
    themselves.
    """
    M, X = experts_MX.shape
    E, F, P, D = gate_up_EFPD.shape
    blocks, scales = gate_up_EFPD.blocks, gate_up_EFPD.scales
    gate_up_EOD = MxTensor(
        blocks.reshape(E, F * P, *blocks.shape[3:]), scales.reshape(E, F * P, -1)
    )
    flat = experts_MX.reshape(-1)

    def times(name, rows_RI, experts_RX, weight):
        """Rows, each with its experts -> those of every pair [M X, O], float32."""
        out: Any = packed_product(rows_RI, experts_RX, weight)
        if name in low_rank:
            a, b, gain_MR = low_rank[name]
            gain = jnp.repeat(gain_MR, len(rows_RI) // M, axis=0)
            out = grouped_low_rank(out, rows_RI, experts_RX, a, b.reshape(E, -1, a.shape[1]), gain)
        return out.reshape(M * X, -1)

    h = times("gate_up", x_MD, experts_MX, gate_up_EOD)
    act = _biased_swiglu(h, gate_up_bias_EFP.reshape(E, F * P), flat, alpha, limit)
    out = times("down", act.astype(x_MD.dtype), flat[:, None], down_EDF)
    # What came out for nobody's rows is biases alone.
    weights_MX = jnp.where(experts_MX < E, weights_MX, 0.0)
    return _weighted_sum(out.reshape(M, X, D), weights_MX, down_bias_ED, experts_MX)


def _biased_swiglu(h_PO, bias_EO, experts_P, alpha, limit):
    """`swiglu` of rows and their experts' biases; O are pairs (gate, up)."""

    def reference(h, bias, experts):
        h = h + jnp.take(bias, experts, axis=0, mode="clip").astype(jnp.float32)
        return swiglu(h.reshape(len(h), -1, 2), alpha, limit)

    def forward(h, bias, experts):
        wide = bias.astype(jnp.float32)
        return cpu.training.swiglu(h, experts, wide, alpha, limit), (h, bias, experts)

    def backward(kept, gradient):
        h, bias, experts = kept
        wide = bias.astype(jnp.float32)
        to_h = cpu.training.swiglu_gradient(gradient, h, experts, wide, alpha, limit)
        to_bias = jnp.zeros_like(wide).at[experts].add(to_h, mode="drop")
        return to_h, to_bias.astype(bias.dtype), None

    return trained.run("experts", reference, forward, backward, h_PO, bias_EO, experts_P)


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
    return trained.run("experts", reference, forward, backward, *parts)


def _mlp_on_gpu(*parts, alpha, limit, spread):
    from gptoss_jax.kernels.gpu import moe  # Pallas takes 0.2 s to import

    *arrays, low_rank = parts
    by_products = functools.partial(_mlp_by_products, kernels=moe, alpha=alpha, limit=limit)
    if low_rank:
        return by_products(*parts)

    def varying(x):
        """As the result varies over a mesh, so that its gradient adds up over the others' axes."""
        if isinstance(x, MxTensor) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        rest = tuple(a for a in spread if a not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, rest, to="varying") if rest else x

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
    x, weights, experts, gate_up, gate_up_bias, down, down_bias = map(varying, arrays)
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
    kernels,
    alpha,
    limit,
):
    """`_mlp` by a kernel's products, which find the rows of an expert themselves."""
    M, X = experts_MX.shape
    E, F, P, D = gate_up_EFPD.shape
    blocks, scales = gate_up_EFPD.blocks, gate_up_EFPD.scales
    gate_up_EOD = MxTensor(
        blocks.reshape(E, F * P, *blocks.shape[3:]), scales.reshape(E, F * P, -1)
    )
    gate_up_bias_EO = gate_up_bias_EFP.reshape(E, F * P)

    def layer(rows_RD, experts_RX, bias, added):
        """Rows [R, D], each with its experts -> [R X, D]; `bias` and `added` know the experts."""
        h: Any = packed_product(rows_RD, experts_RX, gate_up_EOD, kernels)
        h = added("gate_up", rows_RD, h.reshape(-1, F * P) + bias(gate_up_bias_EO))
        act = swiglu(h.reshape(-1, F, P), alpha, limit).astype(x_MD.dtype)
        out: Any = packed_product(act, experts_RX.reshape(-1, 1), down_EDF, kernels)
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
    out_MXD = out.reshape(M, X, D)
    # One by one: XLA's CPU reduction over X calls its thread pool, 80 microseconds for one row.
    return sum(out_MXD[:, x] * weights_MX[:, x, None] for x in range(X))


def _low_rank_in_blocks(layer, x_MD, experts_MX, low_rank, count):
    """`layer` with low-rank additions: rows lie in blocks of one expert, so that the gradients of
    its additions are products over blocks.
    """
    (M, X), block = experts_MX.shape, LOW_RANK_BLOCK
    slots, sources, block_experts = group(experts_MX.reshape(-1), count + 1, block)
    gathered = functools.partial(_in_blocks, sources=sources // X, block=block)
    rows_RD = gathered(x_MD).reshape(-1, x_MD.shape[1])
    experts_R = jnp.where(sources < M * X, jnp.repeat(block_experts, block), count)
    additions = _added(low_rank, block_experts, gathered)

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


def _mlp(
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
    """`expert_mlp` on one device, float32; `spread` over mesh axes or with `some`, expert E is
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
        added = _added(low_rank, chosen, lambda g_MR: jnp.repeat(g_MR, X, axis=0)[:, None])
        out = run(one, rows, chosen, added)[:, 0]
    else:
        block = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (pairs // (8 * E)).bit_length()))
        slots, sources, block_experts = group(experts_MX.reshape(-1), E + bool(spread), block)
        gathered = functools.partial(_in_blocks, sources=sources // X, block=block)
        added = _added(low_rank, block_experts, gathered)
        out = run(one, gathered(x_MD), block_experts, added).reshape(-1, D)[slots]
    return (out.reshape(M, X, D) * weights_MX[..., None]).sum(1)


def _for_those(one, x_MD, sources, experts, low_rank, count, block):
    """one(rows, expert, added) for the blocks of experts below `count`, which come first; zeros for
    the others.
    """
    rows = _in_blocks(x_MD, sources, block)
    gains = {name: _in_blocks(pair.gain_BR, sources, block) for name, pair in low_rank.items()}

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


def _in_blocks(x_MI, sources, block):
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


def _added(low_rank, experts, gains) -> dict[str, Addition]:
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
