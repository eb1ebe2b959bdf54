"""Searches the values that the kernels of this device can be tuned by: one after another, each with
the others held, on the shapes of a decode step and of a prefill.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.bench import machine
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.kernels import cpu, tuning
from gptoss_jax.kernels.cpu import library
from gptoss_jax.mxfp4 import BLOCK, BYTES, MxTensor

CANDIDATES = {
    "columns": (16, 32, 64, 128),
    "direct_columns": (32, 64, 128),
    "direct_rows": (1, 2, 4),
    "cache": (256 << 10, 512 << 10, 1 << 20),
}
ROWS = (1, 8, 64, 512)


def tune(
    config: GptOssConfig, repeats: int = 5, rows: Sequence[int] = ROWS, say: Callable = print
) -> dict[str, Any]:
    """Times the candidates of every value and keeps the best in the cache folder.

    A value is taken if the geometric mean of the times over all shapes falls by more than 2 %;
    candidates take turns, so that a slow moment meets all of them.

    Args:
      config: Sizes of an expert.
      repeats: Times each candidate runs, of which the median counts.
      rows: Rows at once.
      say: Told what was chosen.

    Returns:
      The values, the file, and milliseconds before and after for each number of rows.

    Raises:
      GptOssError: The device is not a CPU, or its kernels cannot be built.
    """
    if jax.default_backend() != "cpu" or cpu.why_not():
        why = cpu.why_not() or f"the device is a {jax.default_backend()}"
        raise GptOssError(f"only the CPU's kernels have values to tune, and {why}")
    calls = _calls(config, rows)
    chosen, first = library.Tuning(), None
    try:
        for name, candidates in CANDIDATES.items():
            options = [dataclasses.replace(chosen, **{name: value}) for value in candidates]
            times = _times(options, calls, repeats)
            first = first or times[options.index(chosen)]
            best = min(options, key=lambda option: _mean(times[options.index(option)]))
            if _mean(times[options.index(best)]) < 0.98 * _mean(times[options.index(chosen)]):
                chosen = best
            say(f"{name}: {getattr(chosen, name)}")
        before, after = _times([library.Tuning(), chosen], calls, repeats)
    finally:
        library.tune(chosen)
    found = {"ms before": _ms(rows, before), "ms after": _ms(rows, after)}
    facts = {**machine.describe(), **found}
    file = tuning.save("cpu", chosen, facts)
    return {"tuned": dataclasses.asdict(chosen), "file": str(file), **found}


def _calls(config: GptOssConfig, rows: Sequence[int]) -> list[Callable[[], Any]]:
    """Gate and up of a layer's experts for each number of rows, each row with experts of its own
    choice.
    """
    random = np.random.default_rng(0)
    E, O, I = config.num_experts, 2 * config.intermediate_size, config.hidden_size
    blocks = random.integers(0, 256, (E, O, I // BLOCK, BYTES), np.uint8)
    scales = np.full((E, O, I // BLOCK), 118, np.uint8)
    weight = MxTensor(jnp.asarray(blocks), jnp.asarray(scales))
    product = jax.jit(cpu.grouped_product)

    def call(count: int) -> Callable[[], Any]:
        x_MI = jnp.asarray(random.standard_normal((count, I), np.float32)).astype(jnp.bfloat16)
        choices = [random.permutation(E)[: config.experts_per_token] for _ in range(count)]
        experts_MX = jnp.asarray(np.stack(choices).astype(np.int32))
        return lambda: product(x_MI, experts_MX, weight)

    return [call(count) for count in rows]


def _times(options: Sequence[library.Tuning], calls, repeats: int) -> list[list[float]]:
    """Median seconds of every call with every option."""
    found = [[[] for _ in calls] for _ in options]
    for repeat in range(repeats + 1):
        for option, row in zip(options, found, strict=True):
            library.tune(option)
            for call, seconds in zip(calls, row, strict=True):
                started = time.perf_counter()
                jax.block_until_ready(call())
                if repeat:
                    seconds.append(time.perf_counter() - started)
    return [[statistics.median(seconds) for seconds in row] for row in found]


def _mean(times: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, times)))


def _ms(rows: Sequence[int], times: Sequence[float]) -> dict[str, float]:
    return {str(n): round(1e3 * t, 3) for n, t in zip(rows, times, strict=True)}
