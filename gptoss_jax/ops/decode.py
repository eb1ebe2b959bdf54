"""Products of a few rows together with their neighbours: norm, bias, residual, choice of experts.

One operation each because a GPU does it in one kernel where the parts are several; the definition
is the parts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax import sharding
from gptoss_jax.kernels import gpu
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend
from gptoss_jax.ops.linear import linear
from gptoss_jax.ops.moe import route
from gptoss_jax.ops.norm import rms_norm
from gptoss_jax.ops.product import Weight

MOST_ROWS = 64  # above it the products are large enough to be kernels of their own


def norm_linears(
    x_BTD: Float[Array, "B T D"],
    norm_D: Float[Array, " D"],
    eps: float,
    subscripts: Sequence[str],
    weights: Sequence[Weight],
    biases: Sequence[Float[Array, "..."]],
) -> tuple[jax.Array, ...]:
    """linear(rms_norm(x), weight, bias) for every weight.

    Args:
      x_BTD: Activations.
      norm_D: RMSNorm's scale.
      eps: RMSNorm's.
      subscripts: As `linear`, one for each weight.
      weights, biases: As `linear`.
    """
    count = len(weights)

    def reference(x, scale, *parts):
        norm = rms_norm(x, scale, eps)
        each = zip(subscripts, parts[:count], parts[count:], strict=True)
        return tuple(linear(text, norm, weight, bias) for text, weight, bias in each)

    def on_gpu(x, scale, *parts):
        found = _dense().products(
            _rows(x), list(map(_matrix, parts[:count])), [b.reshape(-1) for b in parts[count:]],
            norm_D=scale, eps=eps,
        )  # fmt: skip
        shapes = (weight.shape[:-1] for weight in parts[:count])
        return tuple(
            y.reshape(*x.shape[:-1], *shape) for y, shape in zip(found, shapes, strict=True)
        )

    return _run(reference, on_gpu, x_BTD, norm_D, *weights, *biases)


def add_linear(
    x_BTD: Float[Array, "B T D"],
    out_BTNH: Float[Array, "B T N H"],
    weight_DNH: Weight,
    bias_D: Float[Array, " D"],
) -> Float[Array, "B T D"]:
    """x + linear(out, weight, bias)."""

    def reference(x, out, weight, bias):
        return x + linear("BTNH,DNH->BTD", out, weight, bias)

    def on_gpu(x, out, weight, bias):
        flat = out.reshape(-1, weight.shape[1] * weight.shape[2])
        (found,) = _dense().products(
            flat, [weight.reshape(len(weight), -1)], [bias], residual_MO=_rows(x)
        )
        return found.reshape(x.shape)

    return _run(reference, on_gpu, x_BTD, out_BTNH, weight_DNH, bias_D)


def norm_route(
    x_MD: Float[Array, "M D"],
    norm_D: Float[Array, " D"],
    eps: float,
    weight_ED: Float[Array, "E D"],
    bias_E: Float[Array, " E"],
    chosen: int,
    rows: tuple[str, ...] = (),
) -> tuple[Float[Array, "M D"], Float[Array, "M X"], Int[Array, "M X"]]:
    """rms_norm(x), and what `route` says of it."""

    def reference(x, scale, weight, bias):
        norm = rms_norm(x, scale, eps)
        return norm, *route(norm, weight, bias, chosen, rows)

    def on_gpu(x, scale, weight, bias):
        dense = _dense()
        logits, norm = dense.products(
            x, [weight], [bias], norm_D=scale, eps=eps, dtype=jnp.float32, keep=True
        )
        return norm, *dense.choose(logits, chosen)

    with jax.named_scope("norm_route"):
        return _run(reference, on_gpu, x_MD, norm_D, weight_ED, bias_E)


def _run(
    reference: Callable[..., Any], on_gpu: Callable[..., Any], x: jax.Array, *others: Weight
) -> Any:
    """By the back end of "product"; on other platforms than GPUs its own of each part."""
    kernel = jax.custom_vjp(on_gpu)
    kernel.defvjp(
        lambda *arrays: (kernel(*arrays), arrays),
        lambda arrays, gradient: jax.vjp(reference, *arrays)[1](gradient),
    )
    rooms = {name: Backend(reference, None) for name in ("cpu", "tpu")}
    rooms["gpu"] = Backend(kernel, _why_not(x, *others))
    return backends.run("product", reference, rooms, x, *others)


def _why_not(x: jax.Array, *others: Weight) -> str | None:
    if sharding.current() is not None:
        return "the mesh's partitioner knows einsums only"
    if _rows(x).shape[0] > MOST_ROWS:
        return f"more than {MOST_ROWS} rows"
    if any(other.dtype != x.dtype for other in others):
        return "activations and weights are of different types"
    return gpu.why_not()


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


_matrix = _rows  # outputs first, inputs last


def _dense():
    from gptoss_jax.kernels.gpu import dense  # Pallas takes 0.2 s to import

    return dense
