"""Prefill and decode of one model, timed: every time ends when the devices are done, compiling is
apart, figures are medians.
"""

import dataclasses
import statistics
import time

import jax

from gptoss_jax.bench import steps
from gptoss_jax.engine import DECODE, Model
from gptoss_jax.errors import GptOssError

HITS, MISSES = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_events = {HITS: 0, MISSES: 0}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds, one entry a repeat.

    Attributes:
      prefill: Of the prompts, up to the logits of the next token.
      step: Of one decode step, the mean of a repeat's.
      first_token: From ids on the host to the first token on the host.
      compile_prefill: The first prefill less a later one: compiling, or reading from the cache.
      compile_decode: The same for decode.
      programs_read: Compiled programs that came from the compilation cache.
      programs_compiled: That were compiled.
      capacity: Slots of the KV cache.
    """

    prefill: list[float]
    step: list[float]
    first_token: list[float]
    compile_prefill: float
    compile_decode: float
    programs_read: int
    programs_compiled: int
    capacity: int


def measure(model: Model, *, prompt: int, new: int, batch: int, repeats: int = 5) -> Timing:
    """Times `repeats` runs of prefill and decode after one that compiles.

    Args:
      model: The model.
      prompt: Tokens of a prompt.
      new: Tokens generated for each, 2 or more: the first is counted with the prompt.
      batch: Rows.
      repeats: Runs.

    Raises:
      GptOssError: A number is too small, or the rows do not fit into the context.
    """
    check(prompt=prompt, batch=batch, repeats=repeats)
    if new < 2:
        raise GptOssError(f"new is {new}: expected 2 or more, the first is counted with the prompt")
    tokens_BT = steps.prompts(model, batch, prompt)
    capacity = steps.capacity_for(model, prompt + new)
    settings = steps.greedy(model, batch)
    listen()
    before = dict(_events)
    runs = [_run(model, tokens_BT, new, capacity, settings) for _ in range(repeats + 1)]
    first, *rest = runs
    prefill, one, step = (list(column) for column in zip(*rest, strict=True))
    return Timing(
        prefill=prefill,
        step=step,
        first_token=[a + b for a, b in zip(prefill, one, strict=True)],
        compile_prefill=max(0.0, first[0] - statistics.median(prefill)),
        compile_decode=max(0.0, first[1] - statistics.median(one)),
        programs_read=_events[HITS] - before[HITS],
        programs_compiled=_events[MISSES] - before[MISSES],
        capacity=capacity,
    )


def _run(model, tokens_BT, new, capacity, settings) -> tuple[float, float, float]:
    """Seconds of prefill, of the first decode step, of one of the others."""
    started = time.perf_counter()
    state = jax.block_until_ready(steps.prefill(model, tokens_BT, capacity))
    read = time.perf_counter()
    state, out = steps.decode(model, state, settings, 1)
    jax.device_get(out.tokens_Bn)
    one = time.perf_counter()
    left = new - 1
    while left:
        count = min(left, DECODE)
        state, out = steps.decode(model, state, settings, count)
        left -= count
    jax.block_until_ready((state, out))
    done = time.perf_counter()
    return read - started, one - read, (done - one) / (new - 1)


def check(**numbers: int) -> None:
    """Refuses what is not positive.

    Raises:
      GptOssError: With the number's name.
    """
    for name, value in numbers.items():
        if value < 1:
            raise GptOssError(f"{name} is {value}: expected 1 or more")


def listen() -> None:
    """Counts from now on which programs come from the compilation cache."""
    if not _listening:
        _listening.append(True)
        jax.monitoring.register_event_listener(_count)


_listening: list[bool] = []


def _count(event: str, **_) -> None:
    if event in _events:
        _events[event] += 1
