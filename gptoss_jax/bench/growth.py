"""How cost grows: a decode step against context and batch, prefill against length, for each kind of
layer alone too.

Long contexts are not read: the cache says that it holds them (steps.state_at).
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.bench import steps
from gptoss_jax.bench.machine import free_memory
from gptoss_jax.bench.measure import check
from gptoss_jax.cache import cache_bytes
from gptoss_jax.config import FULL, SLIDING
from gptoss_jax.engine import Model

CALLS, STEPS = 5, 2  # timed calls of a point, and decode steps in each
KINDS = ("released", "sliding", "full")
ROOM = 2.5  # caches that have to fit: XLA may keep a second one


def growth(
    model: Model,
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    lengths: Sequence[int],
    context: int,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Medians in seconds over the three axes.

    Args:
      model: The model; its parameters serve any arrangement of sliding and full layers.
      contexts: Tokens in the cache after a decode step of one row.
      batches: Rows.
      lengths: Tokens of a prompt.
      context: Tokens in the cache where rows vary.
      say: Told what is being done, and what is left out for want of memory.

    Returns:
      `contexts` with `decode_step_s` (kind of layers -> seconds, None where there was no room),
      `batches` with `batch_step_s`, `lengths` with `prefill_s`; "released" is the model as it is.
    """
    for name, values in (("contexts", contexts), ("batches", batches), ("lengths", lengths)):
        for value in values:
            check(**{name: value})
    models = {kind: _only(model, kind) for kind in KINDS}
    by_context, by_length = {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
    by_batch = []
    for kind, one in models.items():
        for total in contexts:
            say(f"decode at a context of {total:,}, {kind}")
            by_context[kind].append(_decode(one, 1, total, say))
    for batch in batches:
        say(f"decode of {batch} rows")
        by_batch.append(_decode(model, batch, context, say))
    for kind, one in models.items():
        for length in lengths:
            say(f"prefill of {length:,} tokens, {kind}")
            by_length[kind].append(_prefill(one, length))
    return {
        "contexts": list(contexts),
        "decode_step_s": by_context,
        "context": context,
        "batches": list(batches),
        "batch_step_s": by_batch,
        "lengths": list(lengths),
        "prefill_s": by_length,
    }


def _only(model: Model, kind: str) -> Model:
    if kind == "released":
        return model
    layers = ({"sliding": SLIDING, "full": FULL}[kind],) * model.config.num_layers
    return dataclasses.replace(model, config=dataclasses.replace(model.config, layer_types=layers))


def _decode(model: Model, batch: int, context: int, say) -> float | None:
    made = 1 + CALLS * STEPS
    capacity = steps.capacity_for(model, context)
    needed = cache_bytes(model.config, batch, capacity, model.params["embedding"].dtype.itemsize)
    if (room := free_memory()) is not None and ROOM * needed > room:
        say(f"left out: {ROOM:g} caches of {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB are free")
        return None
    settings = steps.greedy(model, batch)
    state = steps.state_at(model, batch, max(0, context - made), capacity)
    state, out = steps.decode(model, state, settings, 1)
    jax.block_until_ready((state, out))
    found = []
    for _ in range(CALLS):
        started = time.perf_counter()
        state, out = steps.decode(model, state, settings, STEPS)
        jax.block_until_ready((state, out))
        found.append((time.perf_counter() - started) / STEPS)
    return statistics.median(found)


def _prefill(model: Model, length: int) -> float:
    tokens_BT = steps.prompts(model, 1, length)
    capacity = steps.capacity_for(model, length + 1)
    found = []
    for _ in range(4):
        started = time.perf_counter()
        jax.block_until_ready(steps.prefill(model, tokens_BT, capacity))
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def plot(report: dict[str, Any], path: Path, title: str) -> None:
    """Draws what `growth` found.

    Args:
      report: Its result.
      path: Picture to write (PNG, or what its suffix says).
      title: Of the picture: model, device, date.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    by_context, by_batch, by_length = figure.subplots(1, 3)
    names = {"released": "as released", "sliding": "only sliding", "full": "only full"}
    colours = {"released": "#4477aa", "sliding": "#228833", "full": "#cc6677"}

    def curves(axes, xs, found, scale):
        for kind, ys in found.items():
            shown = [(x, y * scale) for x, y in zip(xs, ys, strict=True) if y is not None]
            axes.plot(*zip(*shown, strict=True), "o-", color=colours[kind], label=names[kind], ms=4)
        axes.legend(title="layers", frameon=False)

    curves(by_context, report["contexts"], report["decode_step_s"], 1e3)
    by_context.set(title="Decode, one row", xlabel="tokens in the cache", ylabel="ms a step")
    shown = [
        (batch, seconds)
        for batch, seconds in zip(report["batches"], report["batch_step_s"], strict=True)
        if seconds is not None
    ]
    rows, seconds = zip(*shown, strict=True)
    pace = by_batch.twinx()
    steps_line = by_batch.plot(rows, [s * 1e3 for s in seconds], "o-", color="#4477aa", ms=4)
    paces = [batch / s for batch, s in shown]
    pace_line = pace.plot(rows, paces, "s--", color="#aa3377", ms=4)
    pace.set(ylabel="tokens/s, all rows", ylim=(0, 1.05 * max(paces)))
    pace.spines["top"].set_visible(False)
    by_batch.legend([*steps_line, *pace_line], ["ms a step", "tokens/s"], frameon=False)
    by_batch.set(title=f"Decode at {report['context']:,} tokens", xlabel="rows", ylabel="ms a step")
    each = {
        kind: [s / length for s, length in zip(found, report["lengths"], strict=True)]
        for kind, found in report["prefill_s"].items()
    }
    curves(by_length, report["lengths"], each, 1e3)
    by_length.set(title="Prefill, one row", xlabel="tokens of the prompt", ylabel="ms a token")
    for axes in (by_context, by_batch, by_length):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def _short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"
