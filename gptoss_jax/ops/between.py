"""Parts of the network between its products, which a CPU's kernels compute where a gradient is
taken or rows are wide.

Else XLA computes the definition, which it joins with what is around. But a training step spends
half its time in what XLA leaves as loops of single values, and wide rows are worth a call.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax import sharding
from gptoss_jax.kernels import cpu
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend

WIDE = 512  # values of a row whose loop takes longer than a call


def run(
    operation: str,
    reference: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None,
    *arrays: jax.Array,
    width: int = 0,
) -> Any:
    """reference(*arrays), on one CPU by kernels: with a gradient where the first array is float32,
    without one where rows are wide.

    How many rows there are decides nothing: a row's result does not depend on others.

    Args:
      operation: One of backends.OPERATIONS: forced to the reference, kernels are not taken.
      reference: The definition.
      forward: As for jax.custom_vjp: the result and what is kept.
      backward: Takes what is kept and the gradient of the result; None if it has none.
      *arrays: What is computed with.
      width: Values of a row, if `forward` takes the first array whatever its type.
    """
    call = reference
    wide = width >= WIDE
    first = wide or arrays[0].dtype == jnp.float32
    if first and sharding.current() is None and backends.platform() == "cpu" and not cpu.why_not():
        call = (lambda *arrays: forward(*arrays)[0]) if wide else reference
        if backward is not None:
            call = jax.custom_vjp(call)
            call.defvjp(forward, backward)
    others = {"cpu": Backend(call, None)}
    others |= {name: Backend(reference, None) for name in ("gpu", "tpu")}
    return backends.run(operation, reference, others, *arrays)
