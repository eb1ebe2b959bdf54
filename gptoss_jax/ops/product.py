"""Products of activations with weights: float32 sums, and gradients in the activations' type."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptoss_jax import sharding
from gptoss_jax.kernels import cpu
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend

Weight = jax.Array | cpu.CompactMatrix
COLUMNS = 32  # inputs of a product come in such blocks where a kernel computes it


def product(subscripts: str, x: jax.Array, weight: Weight) -> jax.Array:
    """einsum(subscripts, x, weight) with float32 sums and a float32 result.

    The gradient of the result is rounded to x's dtype before it is multiplied, as training in
    bfloat16 is done everywhere: left alone it stays float32, and the backward products run at the
    float32 rate (on CPUs 2.4 times slower; on GPUs without the bfloat16 tensor cores). In float32
    nothing changes.

    Args:
      subscripts: Every letter stands in two of x, weight and result.
      x: Activations.
      weight: Of x's dtype; a compact one is frozen.
    """
    return _product(subscripts, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(subscripts: str, x: jax.Array, weight: Weight) -> jax.Array:
    return computed(subscripts, x, weight, trained=False)


def computed(subscripts: str, x: jax.Array, weight: Weight, trained: bool) -> jax.Array:
    """`product`, whose gradient is somebody else's.

    Args:
      subscripts: And what follows: as there.
      trained: Whether a gradient is taken: float32 rows then take the CPU's kernel too, whose sums
        have another order than XLA's.
    """
    form = form_of(subscripts)
    size = dict(zip(form.x + form.weight, x.shape + weight.shape, strict=True))
    M, N, K = form.matrix(size)
    shape = [size[letter] for letter in form.result]

    def reference(x, weight):
        weight = _plain(weight)
        times = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if not form.as_matrices():
            return times(subscripts, x, weight)
        return times("MK,NK->MN", x.reshape(M, K), weight.reshape(N, K)).reshape(shape)

    def kernel(x, weight):
        if x.dtype == jnp.float32:
            return cpu.training.dense(x.reshape(M, K), weight.reshape(N, K)).reshape(shape)
        if isinstance(weight, cpu.CompactMatrix):
            return cpu.compact_product(x.reshape(M, K), weight.reshape(N, K)).reshape(shape)
        out = cpu.grouped_product(x.reshape(M, K), _first(M), weight.reshape(1, N, K))
        return out.reshape(shape)

    why = _why_no_kernel(form, x, weight, trained)
    if why is None and x.dtype == jnp.bfloat16 and K % COLUMNS:
        why = f"inputs are no multiple of {COLUMNS}"
    return backends.run("product", reference, {"cpu": Backend(kernel, why)}, x, weight)


class Form(NamedTuple):
    """An einsum that is a product of matrices, in letters: of operands and result, and of what the
    matrices' axes are.
    """

    x: str
    weight: str
    result: str
    rows: str
    outputs: str
    inputs: str

    def matrix(self, size: Mapping[str, int]) -> tuple[int, ...]:
        """Rows, outputs and inputs; sizes are those of the letters."""
        parts = self.rows, self.outputs, self.inputs
        return tuple(math.prod(size[letter] for letter in part) for part in parts)

    def plain(self) -> bool:
        """Whether operands and result are matrices as they lie: rows of x times rows of weights."""
        lie = self.rows + self.inputs, self.outputs + self.inputs, self.rows + self.outputs
        return (self.x, self.weight, self.result) == lie

    def as_matrices(self) -> bool:
        """Whether the reference takes them so: XLA's CPU compiler turns an operand over in memory
        to sum over two of its axes.
        """
        return self.plain() and sharding.current() is None and backends.platform() == "cpu"


def form_of(subscripts: str) -> Form:
    """The form of an einsum of x and weight, every letter of which stands in two places."""
    given, result = subscripts.split("->")
    x, weight = given.split(",")
    rows, inputs = ("".join(i for i in x if (i in result) == where) for where in (True, False))
    return Form(x, weight, result, rows, "".join(i for i in weight if i in result), inputs)


def _plain(weight: Weight) -> jax.Array:
    return weight.released() if isinstance(weight, cpu.CompactMatrix) else weight


def _first(rows: int) -> jax.Array:
    """The only expert for every row."""
    return jnp.zeros((rows, 1), jnp.int32)


def _why_no_kernel(form: Form, x: jax.Array, weight: Weight, trained: bool) -> str | None:
    """Why kernels/cpu does not compute a plain product of these."""
    if x.dtype == weight.dtype == jnp.float32:
        if not trained:
            return "XLA's own float32 products are as fast"
        if any(jax.typeof(part).manual_axis_type.varying for part in (x, weight)):
            return "rows or weights are spread over a mesh"
    if x.dtype != weight.dtype or x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"activations are {x.dtype}, weights {weight.dtype}"
    if sharding.current() is not None:
        return "the mesh's partitioner knows einsums only"
    if not form.plain():
        return f"{form.x},{form.weight}->{form.result} is not rows times rows of weights"
    return cpu.why_not()


def _forward(subscripts, x, weight):
    return computed(subscripts, x, weight, trained=True), (x, weight)


def _backward(subscripts, kept, gradient):
    x, weight = kept
    form, gradient = form_of(subscripts), gradient.astype(x.dtype)
    if isinstance(weight, cpu.CompactMatrix):
        return product_transposed(subscripts, gradient, weight).astype(x.dtype), None
    to_weight = jnp.einsum(
        f"{form.x},{form.result}->{form.weight}", x, gradient, preferred_element_type=jnp.float32
    )
    to_x = product_transposed(subscripts, gradient, weight)
    return to_x.astype(x.dtype), to_weight.astype(weight.dtype)


def product_transposed(subscripts: str, gradient: jax.Array, weight: Weight) -> jax.Array:
    """The gradient of `product` with respect to x, float32; `gradient` in x's dtype."""
    weight = _plain(weight)
    form = form_of(subscripts)
    size = dict(zip(form.result + form.weight, gradient.shape + weight.shape, strict=True))
    M, N, K = form.matrix(size)
    shape = [size[letter] for letter in form.x]

    def reference(gradient, weight):
        times = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if not form.as_matrices():
            return times(f"{form.result},{form.weight}->{form.x}", gradient, weight)
        return times("MN,NK->MK", gradient.reshape(M, N), weight.reshape(N, K)).reshape(shape)

    def kernel(gradient, weight):
        if gradient.dtype == jnp.float32:
            out = cpu.training.dense_transposed(gradient.reshape(M, N), weight.reshape(N, K))
        else:
            out = cpu.grouped_product_transposed(
                gradient.reshape(M, 1, N), _first(M), weight.reshape(1, N, K)
            )
        return out.reshape(shape)

    why = _why_no_kernel(form, gradient, weight, trained=True)
    if why is None and gradient.dtype == jnp.bfloat16 and (K % COLUMNS or N % 2):
        why = f"inputs are no multiple of {COLUMNS}, or outputs odd"
    return backends.run("product", reference, {"cpu": Backend(kernel, why)}, gradient, weight)


_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def packed_product(
    x_MI: jax.Array, experts_MX: jax.Array, weight: MxTensor | cpu.CpuExperts, kernels: Any = cpu
) -> jax.Array:
    """`kernels.cpu.grouped_product` with packed weights, and its gradient for x; the weights are
    frozen. `kernels` is the room that has the product and its transpose.
    """
    return kernels.grouped_product(x_MI, experts_MX, weight)


def _packed_forward(x_MI, experts_MX, weight, kernels):
    return packed_product(x_MI, experts_MX, weight, kernels), (experts_MX, weight, x_MI)


def _packed_backward(kernels, kept, gradient):
    experts_MX, weight, x_MI = kept
    out = kernels.grouped_product_transposed(gradient.astype(x_MI.dtype), experts_MX, weight)
    return out.sum(1).astype(x_MI.dtype), None, None


packed_product.defvjp(_packed_forward, _packed_backward)
