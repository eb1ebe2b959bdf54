"""The mixture of experts: router and expert feed-forward, dropless, on packed MXFP4 or plain
weights.

On a mesh (the context's) experts stay where they are, packed, and tokens travel. What one device
computes is in experts.py and, by kernels, in experts_kernels.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import sharding
from gptoss_jax.kernels import cpu, gpu, tpu
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend
from gptoss_jax.ops.experts import Addition, Weight, mlp
from gptoss_jax.ops.experts_kernels import mlp_on_cpu, mlp_on_gpu, mlp_on_tpu
from gptoss_jax.ops.linear import Rounded


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
    axes = tuple(dict.fromkeys((*rows, *spread)))

    def varying(x):
        """As the result varies, so that gradients add up over the others' axes once and here: in a
        branch that not all devices take they would wait for each other for ever.
        """
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        more = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, more, to="varying") if more else x

    @jax.named_scope("expert_mlp")
    def local(x_MD, weights_MX, experts_MX, *held: Any):
        if "expert" in rows:
            x_MD, weights_MX, experts_MX = gather(x_MD), gather(weights_MX), gather(experts_MX)
            low_rank = {
                name: pair._replace(gain_BR=gather(pair.gain_BR)) for name, pair in held[-1].items()
            }
            held = (*held[:-1], low_rank)
        x_MD, weights_MX, held = jax.tree.map(varying, (x_MD, weights_MX, held))
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
            spread=axes,
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
    """`experts.mlp` by the back end of the platform."""
    gate_up, down, low_rank = parts[3], parts[5], parts[7]

    def why_not_cpu():
        if not all(isinstance(weight, MxTensor | cpu.CpuExperts) for weight in (gate_up, down)):
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

    reference = functools.partial(mlp, alpha=alpha, limit=limit, spread=spread, some=some)
    others = {
        "cpu": Backend(functools.partial(mlp_on_cpu, alpha=alpha, limit=limit), why_not_cpu()),
        "gpu": Backend(functools.partial(mlp_on_gpu, alpha=alpha, limit=limit), why_not_gpu()),
        "tpu": Backend(
            functools.partial(mlp_on_tpu, alpha=alpha, limit=limit),
            tpu.why_not(gate_up, down) or ("low-rank additions" if low_rank else None),
        ),
    }
    return backends.run("experts", reference, others, *parts)
