"""A model's figures: what was measured, beside the least work of each step and what the device
could do, so that a share of the limit can be named.

Knows arithmetic and plain data; measures nothing itself.
"""

import os
import statistics
from collections.abc import Mapping
from typing import Any

import jax

from gptoss_jax import bounds
from gptoss_jax.bench.measure import Timing
from gptoss_jax.bounds import Work
from gptoss_jax.engine import Model
from gptoss_jax.kernels import cpu
from gptoss_jax.kernels.cpu import library
from gptoss_jax.ops import backends


def least(model: Model, prompt: int, new: int, batch: int) -> dict[str, Work]:
    """Least work of the prefill and of a decode step in the middle of the output, on the busiest
    device.

    Args:
      model: The model.
      prompt: Tokens of a prompt.
      new: Tokens generated for each.
      batch: Rows.
    """
    sizes = {} if model.mesh is None else dict(model.mesh.shape)
    # the fewest bytes are the released ones in whatever layout kernels read them, but for matrices
    # that are held in less
    spared = sum(x.size * x.dtype.itemsize - x.nbytes for x in cpu.compact_matrices(model.params))
    packed = not isinstance(model.params["layers"][0]["mlp"]["gate_up"], jax.Array)
    dtype = model.params["embedding"].dtype
    context = prompt + 1 + new // 2
    found = {
        "prefill": bounds.step(model.config, sizes, batch, prompt, prompt, packed, dtype),
        "decode": bounds.step(model.config, sizes, batch, 1, context, packed, dtype),
    }
    return {step: Work(one.bytes - spared, one.flops) for step, one in found.items()}


def shares(
    work: Mapping[str, Work], seconds: Mapping[str, float], limits: Mapping[str, float]
) -> dict[str, float]:
    """The part of the device's bandwidth and matrix rate that each step uses: `decode_bandwidth`,
    `decode_matrix`, `prefill_bandwidth`, `prefill_matrix`.

    Args:
      work: Step -> least work.
      seconds: Step -> measured time.
      limits: As `machine.limits` gives them; of reading and copying the faster counts.
    """
    bandwidth = max(limits["read_bytes_s"], limits["copy_bytes_s"])
    found = {}
    for step, one in work.items():
        found[f"{step}_bandwidth"] = one.bytes / seconds[step] / bandwidth
        found[f"{step}_matrix"] = one.flops / seconds[step] / limits["bfloat16_flops"]
    return found


def kernels() -> str:
    """What computes: the back ends forced by name, or the default platform's own."""
    if forced := os.environ.get(backends.VARIABLE):
        return forced
    if jax.default_backend() != "cpu":
        return "auto"
    if why := library.why_not():
        return f"xla ({why})"
    return f"cpu ({library.arithmetics()[0]})"


def report(
    model: Model,
    timing: Timing,
    *,
    prompt: int,
    new: int,
    batch: int,
    load: float,
    limits: Mapping[str, float] | None,
) -> dict[str, Any]:
    """All figures of a model as plain data: seconds, bytes, operations, tokens a second.

    Args:
      model: The model.
      timing: What was measured.
      prompt: Tokens of a prompt.
      new: Tokens generated for each.
      batch: Rows.
      load: Seconds until the model was ready.
      limits: As `machine.limits` gives them; None where they were not measured, and then there
        are no shares.
    """
    work = least(model, prompt, new, batch)
    seconds = {
        "prefill": statistics.median(timing.prefill),
        "decode": statistics.median(timing.step),
    }
    return {
        "layers": model.config.num_layers,
        "prompt": prompt,
        "new": new,
        "batch": batch,
        "repeats": len(timing.prefill),
        "capacity": timing.capacity,
        "dtype": model.params["embedding"].dtype.name,
        "mesh": {} if model.mesh is None else dict(model.mesh.shape),
        "kernels": kernels(),
        "prefill_tok_s": batch * prompt / seconds["prefill"],
        "decode_tok_s": batch / seconds["decode"],
        "prefill_s": seconds["prefill"],
        "decode_step_s": seconds["decode"],
        "first_token_s": statistics.median(timing.first_token),
        "range": {
            "prefill_s": [min(timing.prefill), max(timing.prefill)],
            "decode_step_s": [min(timing.step), max(timing.step)],
        },
        "load_s": load,
        "compile_s": {"prefill": timing.compile_prefill, "decode": timing.compile_decode},
        "compilation_cache": {"hits": timing.programs_read, "misses": timing.programs_compiled},
        "weights_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "work": {step: {"bytes": one.bytes, "flops": one.flops} for step, one in work.items()},
        "machine": None if limits is None else dict(limits),
        "share": None if limits is None else shares(work, seconds, limits),
    }
