"""Does a model fit on devices that you have not rented yet, how fast could it be, on which mesh?

Compiles the real prefill and decode steps for the topology, without having it.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import tyro

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss plan`."""

    model: tyro.conf.Positional[str]
    """gpt-oss-20b or gpt-oss-120b (no files needed), or a checkpoint's folder."""
    topology: str
    """TPU slices by chips along each axis (v5e:2x4, v6e:2x2, v5p:2x2x1), GPUs by number (h100:1,
    h200:8; also a100, a100-40, l4, 4090, b200).
    """
    context: int | None = None
    """Tokens of a row, prompt and answer; by default the model's longest, for finetune 2048."""
    batch: int = 1
    """Rows at the same time."""
    mesh: str | None = None
    """Such as expert=4,data=2; by default the sensible ones are tried."""
    task: Literal["generate", "finetune"] = "generate"
    """finetune compiles LoRA's update instead of prefill and decode; minutes."""
    rank: int = 8
    """Of the adapter, for finetune."""
    targets: str = "attention,experts"
    """What the adapter adds to, for finetune."""
    tried: int = 1
    """How many meshes are compiled, the best by arithmetic first; the others are judged by
    arithmetic.
    """
    json: bool = False
    """Print one JSON object, for programs."""
    plot: Path | None = None
    """Draw the memory of a device as a stacked bar for every mesh that was tried (PNG)."""


def run(arguments: Arguments) -> int:
    """Plans and prints; 1 if it does not fit."""
    # compiling for devices that are not there needs none of those that are
    os.environ["JAX_PLATFORMS"] = "cpu"
    from gptoss_jax.cli.loading import note
    from gptoss_jax.plan import plan

    config, packed = _config(arguments.model)
    training = None
    if arguments.task == "finetune":
        from gptoss_jax.lora import LoraConfig

        targets = tuple(arguments.targets.replace(" ", "").split(","))
        training = _training(config, LoraConfig(rank=arguments.rank, targets=targets))
    found = plan(
        config,
        arguments.topology,
        context=arguments.context,
        batch=arguments.batch,
        mesh=arguments.mesh,
        packed=packed,
        training=training,
        tried=arguments.tried,
        say=(lambda text: None) if arguments.json else note,
    )
    report = {**describe(found, arguments.model), "task": arguments.task}
    if arguments.plot:
        _plot(report, arguments.plot)
    if arguments.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0 if report["fits"] else 1


def _config(name: str) -> tuple[Any, bool]:
    from gptoss_jax import checkpoint, hub
    from gptoss_jax.config import GptOssConfig
    from gptoss_jax.errors import GptOssError

    if not Path(name).is_dir() and name != hub.TINY:
        try:
            return GptOssConfig.preset(name), True
        except GptOssError:
            raise GptOssError(
                f"model {name!r}: expected gpt-oss-20b, gpt-oss-120b or a checkpoint's folder"
            ) from None
    opened = checkpoint.open_checkpoint(hub.resolve(name))
    return opened.config, any(leaf.packed for leaf in opened.leaves)


def _training(config, lora):
    """LoRA's update as the planner takes it."""
    import jax
    import jax.numpy as jnp

    from gptoss_jax import lora as adapters
    from gptoss_jax.plan.programs import Training
    from gptoss_jax.train.settings import Settings
    from gptoss_jax.train.step import make_step, new_state
    from gptoss_jax.train.trainable import state_like

    settings = Settings(lora=lora)
    shapes = adapters.shapes(config, lora)

    def state(mesh, everywhere):
        where = None if mesh is None else adapters.shardings(config, lora, mesh)
        found = jax.eval_shape(lambda tree: new_state(tree, settings), shapes)
        return state_like(found, where, everywhere, settings)

    def step(mesh):
        where = None if mesh is None else adapters.shardings(config, lora, mesh)
        return make_step(config, settings, 1000, jnp.bfloat16, where)

    return Training(adapters.count(shapes), state, step)


def describe(found, model: str) -> dict[str, Any]:
    """A plan as plain data: bytes, operations, tokens a second, seconds."""
    device, best = found.topology.device, found.best
    return {
        "model": model,
        "topology": found.topology.name,
        "devices": found.topology.count,
        "device": {
            "name": device.name,
            "memory": int(device.memory),
            "bandwidth": device.bandwidth,
            "bfloat16_flops": device.flops,
            "link": device.link,
        },
        "context": found.context,
        "batch": found.batch,
        "fits": best.fits,
        "verdict": verdict(found),
        "compiler": found.compiler,
        "compiled": bool(best.programs),
        "largest_context": found.largest_context,
        "largest_batch": found.largest_batch,
        "fewest_devices": found.fewest_devices,
        **_candidate(best),
        "tried": [_candidate(one) for one in found.tried],
    }


def _candidate(one) -> dict[str, Any]:
    return {
        "mesh": one.mesh,
        "fits": one.fits,
        "memory": {**dataclasses.asdict(one.memory), "peak": one.memory.peak},
        "needed": one.needed if one.needed != float("inf") else None,
        "programs": {name: dataclasses.asdict(program) for name, program in one.programs.items()},
        "least": {name: dataclasses.asdict(work) for name, work in one.least.items()},
        **{f"{name}_tokens_per_second": pace for name, pace in one.tokens.items()},
    }


def verdict(found) -> str:
    """One sentence: whether it fits, and what would."""
    best, asked = found.best, f"context {found.context:,}, batch {found.batch}"
    mesh = ",".join(f"{axis}={size}" for axis, size in best.mesh.items())
    use = f" with --mesh {mesh}" if mesh else ""
    if best.fits:
        room = best.memory.peak / best.memory.available
        text = f"fits{use}: {room:.0%} of each {found.topology.device.name}'s memory"
        if found.topology.device.platform == "gpu" and room > 0.75:
            text += "; JAX takes 75 % by default: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.97"
        return text
    text = f"does not fit ({asked}){use}"
    if found.largest_context:
        text += f": by arithmetic, at batch {found.batch} the largest context is "
        text += f"{found.largest_context:,}"
        if found.largest_batch:
            text += f", at this context the largest batch is {found.largest_batch}"
        return text
    more = found.fewest_devices
    if more:
        return f"{text}: the weights alone are too many; {more} of these devices would do"
    return f"{text}: no number of these devices up to 2,048 would do"


ROWS = ("weights", "cache", "rest", "temporaries", "code")
NAMES = {
    "weights": "weights",
    "cache": "KV cache",
    "rest": "state, padding",
    "temporaries": "temporaries",
    "code": "code",
}


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    device = report["device"]
    console.print(
        f"{report['model']} on {report['topology']} ({report['devices']} x {device['name']}), "
        f"context {report['context']:,}, batch {report['batch']}; {report['compiler']}",
        markup=False,
    )
    style = "green" if report["fits"] else "red"
    console.print(report["verdict"], style=style, markup=False)

    memory = Table("GB on each device", *map(_mesh, report["tried"]), box=None, pad_edge=False)
    for column in memory.columns[1:]:
        column.justify = "right"
    for name in ROWS:
        memory.add_row(NAMES[name], *(f"{one['memory'][name] / GB:.2f}" for one in report["tried"]))
    peaks = [one["needed"] or one["memory"]["peak"] for one in report["tried"]]
    memory.add_row(f"peak, of {device['memory'] / GB:.1f}", *(f"{peak / GB:.2f}" for peak in peaks))
    memory.add_row("fits", *("yes" if one["fits"] else "no" for one in report["tried"]))
    for name in report["least"]:
        paces = (f"{one[f'{name}_tokens_per_second']:,.0f}" for one in report["tried"])
        memory.add_row(f"{name} tokens/s at most", *paces)
    judged = ("compiled" if one["programs"] else "arithmetic" for one in report["tried"])
    memory.add_row("judged by", *judged)
    console.print()
    console.print(memory, markup=False)
    if report["programs"]:
        console.print()
        console.print(_programs(report), markup=False)
        console.print(
            "XLA counts an operand of which a step reads a part, such as all experts, as read "
            "whole.",
            style="dim",
        )


def _programs(report: dict[str, Any]):
    from rich.table import Table

    names = list(report["programs"])
    table = Table(f"a step, {_mesh(report)}", *names, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(label: str, value) -> None:
        table.add_row(label, *(value(report["programs"][name], name) for name in names))

    row("GB read, at least", lambda _, name: f"{report['least'][name]['bytes'] / GB:.2f}")
    row("GB read, XLA's count", lambda one, _: _number(one["bytes_accessed"], GB))
    row("GFLOP, at least", lambda _, name: f"{report['least'][name]['flops'] / GB:,.1f}")
    row("GFLOP, XLA's count", lambda one, _: _number(one["flops"], GB))
    kinds = sorted(
        {kind for one in report["programs"].values() for kind in one["collectives"] or {}}
    )
    for kind in kinds:

        def sent(one, _, kind=kind):
            if one["collectives"] is None:
                return "?"
            found = one["collectives"].get(kind)
            return f"{found['count']} x, {found['bytes'] / 1e6:,.2f} MB" if found else "none"

        row(kind, sent)
    if any(one["started"] for one in report["programs"].values()):
        row("kernels started", lambda one, _: f"{sum((one['started'] or {}).values()) or '?'}")
    row("seconds to compile", lambda one, _: f"{one['seconds']:.0f}")
    return table


def _number(value: float | None, unit: float) -> str:
    return "?" if value is None else f"{value / unit:,.2f}"


def _mesh(one: dict[str, Any]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in one["mesh"].items()) or "one device"


def _plot(report: dict[str, Any], path: Path) -> None:
    from gptoss_jax.errors import GptOssError

    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise GptOssError("--plot needs matplotlib: pip install 'gptoss_jax[notebook]'") from None
    shown = report["tried"][:8]
    figure = Figure(figsize=(7.2, 1.6 + 0.5 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    labels = [_mesh(one) for one in shown]
    left = [0.0] * len(shown)
    colours = ("#4477aa", "#66ccee", "#bbbbbb", "#ccbb44", "#aa3377")
    for name, colour in zip(ROWS, colours, strict=True):
        sizes = [one["memory"][name] / GB for one in shown]
        axes.barh(labels, sizes, left=left, label=NAMES[name], color=colour, height=0.6)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    limit = report["device"]["memory"] / GB
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.text(
        limit,
        1.01,
        f"{limit:.1f} GB",
        ha="center",
        fontsize=9,
        transform=axes.get_xaxis_transform(),
    )
    axes.invert_yaxis()
    axes.set_xlim(0, max(*left, limit) * 1.12)
    axes.set_xlabel("GB on each device")
    axes.set_title(
        f"{report['model']} on {report['topology']}, context {report['context']:,}, "
        f"batch {report['batch']}",
        fontsize=11,
        pad=20,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(ROWS), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
