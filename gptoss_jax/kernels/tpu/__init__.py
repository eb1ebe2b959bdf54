"""Pallas kernels for TPUs: the experts' feed-forward (moe.py) and attention (attention.py), each
imported where it is used. Arrays in, arrays out.

Each has its definition in ops/ and the same numbers: float32 sums, bfloat16 between the products.
Dense bfloat16 projections have no kernel: XLA streams such weights at 80 to 90 % of a TPU's
bandwidth (kernel timings in tokamax's autotuning caches), which leaves nothing to win.
"""

from gptoss_jax.kernels.tpu.layout import Storage as Storage
from gptoss_jax.kernels.tpu.layout import TpuExperts as TpuExperts
from gptoss_jax.kernels.tpu.layout import shapes as shapes
from gptoss_jax.kernels.tpu.layout import storage as storage
from gptoss_jax.kernels.tpu.layout import to_tpu as to_tpu


def why_not(*weights: object) -> str | None:
    """Why `moe.mlp` does not take these weights; None if it does."""
    if all(isinstance(weight, TpuExperts) for weight in weights):
        return None
    return "the experts do not lie as the kernel reads them (to_tpu; done at load)"
