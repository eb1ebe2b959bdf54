"""Parts of the network that a kernel computes only where a gradient is taken.

Without one XLA computes the definition, which it joins with what is around; a training step on a
CPU spends half its time in what XLA leaves as loops of single values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax import sharding
from gptoss_jax.kernels import cpu
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend


def run(
    operation: str,
    reference: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *arrays: jax.Array,
) -> Any:
    """reference(*arrays), its gradient by the CPU's kernels where the first array is float32, on
    one device.

    Args:
      operation: One of backends.OPERATIONS: forced to the reference, kernels are not taken.
      reference: The definition.
      forward: As for jax.custom_vjp: the result and what is kept.
      backward: Takes what is kept and the gradient of the result.
      *arrays: What is computed with.
    """
    call = reference
    first = arrays[0].dtype == jnp.float32
    if first and sharding.current() is None and backends.platform() == "cpu" and not cpu.why_not():
        call = jax.custom_vjp(reference)
        call.defvjp(forward, backward)
    others = {"cpu": Backend(call, None)}
    others |= {name: Backend(reference, None) for name in ("gpu", "tpu")}
    return backends.run(operation, reference, others, *arrays)
