"""Pallas-Triton kernels for NVIDIA GPUs: the experts' feed-forward (moe.py) and attention
(attention.py), each imported where it is used. Arrays in, arrays out.

Everything that names a Pallas back end is in this folder. Each kernel has its definition in ops/
and the same numbers: float32 sums, bfloat16 between the products. The experts' released bytes are
read as they lie: there is no layout of its own here.
"""

import jax

from gptoss_jax.mxfp4 import MxTensor

LEAST_CAPABILITY = 8.0  # Ampere: tensor cores that take bfloat16


def why_not(*weights: object) -> str | None:
    """Why `moe` does not take these weights on the GPU at hand; None if it does."""
    if not all(isinstance(weight, MxTensor) for weight in weights):
        return "experts are not packed"
    return _card()


def _card() -> str | None:
    """Why the GPU at hand cannot run the kernels; one that is only compiled for says nothing."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.local_devices(backend="gpu")[0]
    if "rocm" in device.client.platform_version.lower():
        return "the kernels are written for NVIDIA's GPUs"
    capability = float(getattr(device, "compute_capability", LEAST_CAPABILITY))
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability}, and {LEAST_CAPABILITY} is the least"
    return None
