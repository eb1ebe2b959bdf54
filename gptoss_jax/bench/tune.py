"""Searches the values that the kernels of this device can be tuned by: one after another, each with
the others held, on the shapes of a decode step and of a prefill.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.bench import machine
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.kernels import cpu, gpu, tuning
from gptoss_jax.kernels.cpu import library
from gptoss_jax.mxfp4 import BLOCK, BYTES, MxTensor

CPU_CANDIDATES = {
    "columns": (16, 32, 64, 128),
    "cache": (256 << 10, 512 << 10, 1 << 20),
}
GPU_CANDIDATES = {
    "experts": {
        "outputs": (32, 64, 128),
        "depth": (32, 64, 128),
        "warps": (1, 2, 4, 8),
        "stages": (2, 3, 4, 6),
        "many_outputs": (64, 128),
        "many_depth": (32, 64),
        "many_warps": (4, 8),
        "many_stages": (2, 3, 4),
        "most_rows": (64, 128, 256),
        "many": (32, 64, 128),
    },
    "attention": {
        "attention_programs": (128, 256, 512, 1024),
        "attention_slots": (32, 64, 128),
        "attention_rows": (64, 128),
        "attention_warps": (2, 4, 8),
    },
    "dense": {
        "dense_programs": (128, 256, 512),
        "dense_depth": (512, 1024, 2048),
        "dense_outputs": (16, 32, 64),
        "dense_warps": (2, 4, 8),
        "dense_stages": (2, 3, 4, 6),
    },
}
ROWS = {"cpu": (1, 8, 64, 512), "gpu": (1, 8, 64, 512, 4096)}
CONTEXT = 8192  # slots of a full cache that is tuned for
Call = Callable[[], Any]
Case = tuple[str, Callable[..., Any], tuple[Any, ...]]  # name of a call, kernel, operands


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What can be tuned on a kind of device.

    Attributes:
      platform: "cpu" or "gpu".
      start: The values before the search.
      candidates: Field -> values to try.
      calls: Values -> one call for each of `names`; what runs it needs no more preparation.
      names: Of the calls.
    """

    platform: str
    start: Any
    candidates: Mapping[str, Sequence[int]]
    calls: Callable[[Any], list[Call]]
    names: Sequence[str] = ()


def tune(
    config: GptOssConfig,
    repeats: int = 5,
    rows: Sequence[int] | None = None,
    say: Callable = print,
) -> dict[str, Any]:
    """Times the candidates of every value and keeps the best in the cache folder.

    A value is taken if the geometric mean of the times over all shapes falls by more than 2 %;
    candidates take turns, so that a slow moment meets all of them. One that this device cannot
    run (too much shared memory) is named and passed over.

    Args:
      config: Sizes of an expert.
      repeats: Times each candidate runs, of which the median counts.
      rows: Rows at once; by default those of ROWS.
      say: Told what was chosen.

    Returns:
      The values, the file, and milliseconds before and after of each call.

    Raises:
      GptOssError: This device has no kernels that can be tuned.
    """
    platform = jax.default_backend()
    made = {"cpu": _cpu, "gpu": _gpu}
    why = {"cpu": cpu.why_not, "gpu": gpu.why_not}.get(platform, lambda: f"this is a {platform}")()
    if platform not in made or why:
        raise GptOssError(f"only the kernels of CPUs and GPUs have values to tune, and {why}")
    chosen: Any = None
    names, before, after = [], [], []
    for kernels in made[platform](config, rows or ROWS[platform]):
        kernels = dataclasses.replace(kernels, start=chosen or kernels.start)
        chosen, *times = search(kernels, repeats, say)
        for kept, found in zip((names, before, after), (kernels.names, *times), strict=True):
            kept.extend(found)
    if platform == "cpu":
        library.tune(chosen)
    found = {"ms before": _ms(names, before), "ms after": _ms(names, after)}
    facts = {**machine.describe(), **found}
    file = tuning.save(platform, chosen, facts)
    return {"tuned": dataclasses.asdict(chosen), "file": str(file), **found}


def search(
    kernels: Kernels, repeats: int, say: Callable = print
) -> tuple[Any, list[float], list[float]]:
    """The best values, and the seconds of every call before and after."""
    chosen = kernels.start
    for name, candidates in kernels.candidates.items():
        options, calls = [chosen], [_ready(kernels.calls(chosen))]
        for value in candidates:
            option = dataclasses.replace(chosen, **{name: value})
            if option == chosen:
                continue
            try:
                calls.append(_ready(kernels.calls(option)))
            except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as problem:
                # Compilers refuse what does not fit in these ways; that nothing else fails so is
                # what the values at the start show, which raise.
                say(f"{name} {value}: passed over, {str(problem).splitlines()[0]}")
                continue
            options.append(option)
        times = _times(calls, repeats)
        best = min(range(len(options)), key=lambda i: _mean(times[i]))
        if _mean(times[best]) < 0.98 * _mean(times[0]):
            chosen = options[best]
        say(f"{name}: {getattr(chosen, name)}")
    before, after = _times([kernels.calls(v) for v in (kernels.start, chosen)], repeats)
    return chosen, before, after


def _cpu(config: GptOssConfig, rows: Sequence[int]) -> list[Kernels]:
    product = jax.jit(cpu.grouped_product)
    given = _operands(config, rows, lambda weight: cpu.as_cpu_experts(weight) or weight)

    def call(values: library.Tuning, operands) -> Call:
        def run():
            library.tune(values)
            return product(*operands)

        return run

    return [
        Kernels(
            "cpu",
            library.Tuning(),
            CPU_CANDIDATES,
            lambda values: [call(values, operands) for operands in given],
            [f"experts, rows {count}" for count in rows],
        )
    ]


def _gpu(
    config: GptOssConfig,
    rows: Sequence[int],
    interpret: bool = False,
    context: int = CONTEXT,
) -> list[Kernels]:
    """Experts, attention and dense products, each with calls of its own; later ones start with what
    the earlier ones found.
    """
    from gptoss_jax.kernels.gpu import attention, blocks, decode, dense, moe

    dtype, random = jnp.bfloat16, jax.random.key(0)
    N, K, H, D = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size

    def draw(*shape: int) -> jax.Array:
        return jax.random.normal(random, shape, dtype)

    def calls(cases: Sequence[Case], values: blocks.Tuning) -> list[Call]:
        options = {"chosen": values, "interpret": interpret}
        compiled = [jax.jit(functools.partial(kernel, **options)) for _, kernel, _ in cases]
        return [
            functools.partial(run, *operands)
            for run, (_, _, operands) in zip(compiled, cases, strict=True)
        ]

    def cached(count: int) -> tuple[jax.Array, ...]:
        """One token each at the end of full caches."""
        slots = jnp.broadcast_to(jnp.arange(context, dtype=jnp.int32), (count, context))
        cache, angle = draw(count, context, K, H), jnp.ones((count, 1, H // 2), jnp.float32)
        parts = draw(count, 1, N, H), draw(count, 1, K, H), draw(count, 1, K, H), angle, angle
        last = jnp.full((count, 1), context - 1, jnp.int32)
        return *parts, cache, cache, last[:, 0], draw(N), last, slots

    def prompt(length: int) -> tuple[jax.Array, ...]:
        places = jnp.arange(length, dtype=jnp.int32)[None]
        keys = draw(1, length, K, H)
        return draw(1, length, N, H), keys, keys, draw(N), places, places

    def normed(x, weight, bias, norm, **options):
        return dense.products(x, [weight], [bias], norm_D=norm, eps=1e-5, **options)

    few = [count for count in rows if count <= 64]
    length = min(context, 2048)
    outputs = (N + 2 * K) * H
    matrix = draw(outputs, D), draw(outputs), jnp.ones(D, jnp.float32)
    experts = zip(rows, _operands(config, rows), strict=True)
    cases: dict[str, list[Case]] = {
        "experts": [(f"experts, rows {n}", moe.grouped_product, parts) for n, parts in experts],
        "attention": [
            *(
                (f"attention, rows {n}, context {context}", decode.attend_one, cached(n))
                for n in few
                if n <= 8
            ),
            (f"attention, prompt {length}", attention.attention, prompt(length)),
        ],
        "dense": [(f"products, rows {n}", normed, (draw(n, D), *matrix)) for n in few],
    }
    start = blocks.model(jax.devices()[0].device_kind)
    return [
        Kernels(
            "gpu",
            start,
            GPU_CANDIDATES[name],
            functools.partial(calls, own),
            [label for label, _, _ in own],
        )
        for name, own in cases.items()
    ]


def _operands(
    config: GptOssConfig,
    rows: Sequence[int],
    held: Callable[[MxTensor], Any] = lambda weight: weight,
) -> list[tuple[Any, ...]]:
    """Gate and up of a layer's experts, as they are held, for each number of rows, each row with
    experts of its own choice.
    """
    random = np.random.default_rng(0)
    E, O, I = config.num_experts, 2 * config.intermediate_size, config.hidden_size
    blocks = random.integers(0, 256, (E, O, I // BLOCK, BYTES), np.uint8)
    scales = np.full((E, O, I // BLOCK), 118, np.uint8)
    weight = held(MxTensor(jnp.asarray(blocks), jnp.asarray(scales)))

    def some(count: int) -> tuple[Any, ...]:
        x_MI = jnp.asarray(random.standard_normal((count, I), np.float32)).astype(jnp.bfloat16)
        choices = [random.permutation(E)[: config.experts_per_token] for _ in range(count)]
        return x_MI, jnp.asarray(np.stack(choices).astype(np.int32)), weight

    return [some(count) for count in rows]


def _ready(calls: list[Call]) -> list[Call]:
    """The same, compiled."""
    for call in calls:
        jax.block_until_ready(call())
    return calls


def _times(options: Sequence[list[Call]], repeats: int) -> list[list[float]]:
    """Median seconds of every call of every option."""
    found: list[list[list[float]]] = [[[] for _ in calls] for calls in options]
    for repeat in range(repeats + 1):  # the first is not counted
        for calls, row in zip(options, found, strict=True):
            for call, seconds in zip(calls, row, strict=True):
                started = time.perf_counter()
                jax.block_until_ready(call())
                if repeat:
                    seconds.append(time.perf_counter() - started)
    return [[statistics.median(seconds) for seconds in row] for row in found]


def _mean(times: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, times)))


def _ms(names: Sequence[str], times: Sequence[float]) -> dict[str, float]:
    return {name: round(1e3 * t, 3) for name, t in zip(names, times, strict=True)}
