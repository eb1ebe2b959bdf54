"""Products of activations with weights: float32 sums, and gradients in the activations' type."""

import functools

import jax
import jax.numpy as jnp


def product(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum(subscripts, x, weight) with float32 sums and a float32 result.

    The gradient of the result is rounded to x's dtype before it is multiplied, as training in
    bfloat16 is done everywhere: left alone it stays float32, and the backward products run at the
    float32 rate (on CPUs 2.4 times slower; on GPUs without the bfloat16 tensor cores). In float32
    nothing changes.

    Args:
      subscripts: Every letter stands in two of x, weight and result.
      x: Activations.
      weight: Of x's dtype.
    """
    return _product(subscripts, *_alike(x, weight))


def _alike(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, varying over the same axes of a mesh inside shard_map; outside as they are."""
    axes = [getattr(jax.typeof(array), "vma", frozenset()) for array in (x, weight)]
    both = axes[0] | axes[1]
    x, weight = (
        jax.lax.pcast(array, tuple(both - own), to="varying") if both - own else array
        for array, own in zip((x, weight), axes, strict=True)
    )
    return x, weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, weight, preferred_element_type=jnp.float32)


def _forward(subscripts, x, weight):
    return _product(subscripts, x, weight), (x, weight)


def _backward(subscripts, kept, gradient):
    x, weight = kept
    given, result = subscripts.split("->")
    a, b = given.split(",")
    gradient = gradient.astype(x.dtype)
    to_x = jnp.einsum(f"{result},{b}->{a}", gradient, weight, preferred_element_type=jnp.float32)
    to_weight = jnp.einsum(f"{a},{result}->{b}", x, gradient, preferred_element_type=jnp.float32)
    return to_x.astype(x.dtype), to_weight.astype(weight.dtype)


_product.defvjp(_forward, _backward)
