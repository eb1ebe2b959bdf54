"""What lies between products and after the last, and of a training step in float32 dense products
and gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def dense(x_MK: Float[Array, "M K"], weight_NK: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """x times the rows of the weight."""
    call = _call("gptoss_dense", (len(x_MK), len(weight_NK)))
    return call(x_MK, weight_NK, transposed=False)


def dense_transposed(g_MN: Float[Array, "M N"], weight_NK: Float[Array, "N K"]):
    """g times the columns of the weight, [M, K]: the gradient of `dense` with respect to x."""
    call = _call("gptoss_dense", (len(g_MN), weight_NK.shape[1]))
    return call(g_MN, weight_NK, transposed=True)


def swiglu(
    h_PO: Float[Array, "P O"],
    experts_P: Int[Array, " P"],
    bias_EO: Float[Array, "E O"],
    alpha: float,
    limit: float,
    dtype: Any = jnp.float32,
) -> Float[Array, "P F"]:
    """`ops.experts.swiglu` of h and its experts' biases; O = 2 F in pairs (gate, up), F a multiple
    of 16. `dtype` is that of the result, float32 or bfloat16.
    """
    P, O = h_PO.shape
    result = jax.ShapeDtypeStruct((P, O // 2), dtype)
    call: Any = jax.ffi.ffi_call("gptoss_swiglu", result, vmap_method="sequential")
    return call(h_PO, experts_P, bias_EO, alpha=np.float32(alpha), limit=np.float32(limit))


def swiglu_gradient(d_PF, h_PO, experts_P, bias_EO, alpha: float, limit: float):
    """The gradient of h; d is that of the result."""
    call = _call("gptoss_swiglu_gradient", h_PO.shape)
    return call(d_PF, h_PO, experts_P, bias_EO, alpha=np.float32(alpha), limit=np.float32(limit))


def weighted(
    y_MXD: Float[Array, "M X D"],
    experts_MX: Int[Array, "M X"],
    bias_ED: Float[Array, "E D"],
    weights_MX: Float[Array, "M X"],
) -> Float[Array, "M D"]:
    """sum_x weights_x (y_x + bias of expert x)."""
    M, _, D = y_MXD.shape
    return _call("gptoss_weighted", (M, D))(y_MXD, experts_MX, bias_ED, weights_MX)


def weighted_gradient(d_MD, y_MXD, experts_MX, bias_ED, weights_MX):
    """The gradients of y and weights; d is that of the result."""
    call = _call("gptoss_weighted_gradient", y_MXD.shape, weights_MX.shape)
    return call(d_MD, y_MXD, experts_MX, bias_ED, weights_MX)


def rotate(
    x_RNH: Float[Array, "R N H"],
    cos_Rh: Float[Array, "R h"],
    sin_Rh: Float[Array, "R h"],
    back: bool = False,
) -> Float[Array, "R N H"]:
    """`ops.rotate` of float32 or bfloat16, or the other way round, which is its gradient."""
    result = jax.ShapeDtypeStruct(x_RNH.shape, x_RNH.dtype)
    call: Any = jax.ffi.ffi_call("gptoss_rotate", result, vmap_method="sequential")
    return call(x_RNH, cos_Rh, sin_Rh, sign=np.float32(-1 if back else 1))


def norm(
    x_RD: Float[Array, "R D"], scale_D: Float[Array, " D"], eps: float
) -> tuple[Float[Array, "R D"], Float[Array, " R"]]:
    """`ops.rms_norm` of float32 or bfloat16, and what it multiplies each row with before the
    scale, float32.
    """
    results = (
        jax.ShapeDtypeStruct(x_RD.shape, x_RD.dtype),
        jax.ShapeDtypeStruct(x_RD.shape[:1], jnp.float32),
    )
    call: Any = jax.ffi.ffi_call("gptoss_norm", results, vmap_method="sequential")
    return call(x_RD, scale_D, eps=np.float32(eps))


def norm_gradient(d_RD, x_RD, scale_D, inverse_R):
    """The gradient of x; d is that of the first result."""
    return _call("gptoss_norm_gradient", x_RD.shape)(d_RD, x_RD, scale_D, inverse_R)


def cross_entropy(
    logits_RV: Float[Array, "R V"], targets_R: Int[Array, " R"], weights_R: Float[Array, " R"]
) -> tuple[Float[Array, "R V"], Float[Array, " R"]]:
    """weight (log sum exp(logits) - logit of the target) of every row, second; first its gradient,
    in the place of the logits where XLA lets them go.
    """
    call = _call(
        "gptoss_cross_entropy", logits_RV.shape, targets_R.shape, input_output_aliases={0: 0}
    )
    return call(logits_RV, targets_R, weights_R)


def first_largest(x_RV: Float[Array, "R V"]) -> Int[Array, " R"]:
    """First place of each row's largest, int32; all are numbers."""
    result = jax.ShapeDtypeStruct(x_RV.shape[:1], jnp.int32)
    call: Any = jax.ffi.ffi_call("gptoss_first_largest", result, vmap_method="sequential")
    return call(x_RV)


def _call(name: str, *shapes: tuple[int, ...], **keywords) -> Any:
    """An operation with float32 results of these shapes."""
    results: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    result = results if len(results) > 1 else results[0]
    return jax.ffi.ffi_call(name, result, vmap_method="sequential", **keywords)
