"""The figures as tables for people."""

from typing import Any

from rich.console import Console
from rich.table import Table

MB, GB, GIGA, TERA = 1e6, 1e9, 1e9, 1e12


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    return console


def _table(*heads: str) -> Table:
    table = Table(*heads, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _machine(found: dict[str, Any]) -> str:
    device, versions = found["device"], found["versions"]
    on = f"{device['count']} x {device['kind']}, " if device["platform"] != "cpu" else ""
    on += f"{device['cores']} cores of {device['processor']}"
    return f"{on}; jax {versions['jax']}, Python {versions['python']}; {found['date']}"


def show_measured(found: dict[str, Any], name: str) -> None:
    """Prints a model's figures.

    Args:
      found: As `report.report` gives them, with `memory` and `machine.describe()`.
      name: Of the model.
    """
    console = _console()
    console.print(
        f"{name}, {found['layers']} layers, {found['dtype']}, prompt {found['prompt']}, "
        f"{found['new']} new, batch {found['batch']}, median of {found['repeats']}",
        markup=False,
    )
    console.print(f"{_machine(found)}; kernels: {found['kernels']}", markup=False, style="dim")
    table = _table("", "prefill", "decode")
    prefill, step = found["prefill_s"], found["decode_step_s"]
    table.add_row("tokens/s", _rate(found["prefill_tok_s"]), _rate(found["decode_tok_s"]))
    table.add_row("ms: the prompts, a step", _rate(prefill * 1e3), _rate(step * 1e3))
    fastest, slowest = zip(
        found["range"]["prefill_s"], found["range"]["decode_step_s"], strict=True
    )
    table.add_row("  fastest", *(_rate(x * 1e3) for x in fastest))
    table.add_row("  slowest", *(_rate(x * 1e3) for x in slowest))
    work = [found["work"]["prefill"], found["work"]["decode"]]
    table.add_row("MB to read, at least", *(_rate(one["bytes"] / MB) for one in work))
    table.add_row("GFLOP, at least", *(_rate(one["flops"] / GIGA) for one in work))
    if found["share"]:
        share = found["share"]
        for kind, text in (("bandwidth", "of the bandwidth"), ("matrix", "of the matrix rate")):
            parts = (f"{share[f'{step}_{kind}']:.1%}" for step in ("prefill", "decode"))
            table.add_row(text, *parts)
    compiled = found["compile_s"]
    table.add_row("s to compile", _rate(compiled["prefill"]), _rate(compiled["decode"]))
    console.print(table)
    cache = found["compilation_cache"]
    if cache["hits"]:
        console.print(
            f"{cache['hits']} of {cache['hits'] + cache['misses']} programs came from the "
            "compilation cache.",
            style="dim",
        )
    rest = _table("", "")
    rest.add_row("load, s", f"{found['load_s']:.1f}")
    rest.add_row("first token, compiled, s", f"{found['first_token_s']:.3f}")
    rest.add_row("weights, MB", _rate(found["weights_bytes"] / MB))
    rest.add_row("peak memory, MB", _rate(found["memory"]["resident"] / MB))
    if found["memory"]["device"]:
        rest.add_row("peak of a device, MB", _rate(found["memory"]["device"] / MB))
    if found["machine"]:
        machine = found["machine"]
        rest.add_row("this device reads, GB/s", f"{machine['read_bytes_s'] / GB:,.1f}")
        rest.add_row("  changes in place", f"{machine['copy_bytes_s'] / GB:,.1f}")
        rest.add_row("  multiplies, bfloat16, TFLOP/s", f"{machine['bfloat16_flops'] / TERA:,.2f}")
    console.print()
    console.print(rest)


def show_compared(found: dict[str, Any]) -> None:
    """Prints what `compare.compare` found, with `model`, `processor` and `date`."""
    console = _console()
    console.print(
        f"{found['model']}, random weights, {found['layers']} layers, prompt {found['prompt']}, "
        f"{found['new']} new, batch {found['batch']}, {found['threads']} threads, "
        f"median of {found['rounds']} rounds",
        markup=False,
    )
    console.print(f"{found['processor']}; {found['date']}", markup=False, style="dim")
    table = _table(
        "",
        "prefill, tokens/s",
        "decode, tokens/s",
        "ours: prefill",
        "decode",
        "load, s",
        "peak, GB",
    )
    for name, one in found["systems"].items():
        ratio = found["ratios"].get(name)
        shown = one["versions"] if ratio else {name: one["versions"].get(name, "")}
        table.add_row(
            ", ".join(f"{package} {version}" for package, version in shown.items()),
            _spread(one, "prefill_tok_s"),
            _spread(one, "decode_tok_s"),
            *(f"{ratio[k]:.2f} x" if ratio else "" for k in ("prefill_tok_s", "decode_tok_s")),
            f"{one['load_s']:.1f}",
            f"{one['resident'] / GB:.1f}",
        )
    console.print(table)
    for text in (*found["missing"].values(), *found["failed"].values()):
        console.print(text, style="yellow", markup=False)


def show_startup(found: dict[str, Any], name: str) -> None:
    """Prints what `startup.startup` found, with the machine and versions.

    Args:
      found: The figures.
      name: Of the model.
    """
    console = _console()
    layers = f", {found['layers']} layers" if found["layers"] else ""
    console.print(f"{name}{layers}, prompt {found['prompt']}", markup=False)
    console.print(
        f"{found['cores']} cores of {found['processor']}; jax {found['versions']['jax']}; "
        f"{found['date']}",
        markup=False,
        style="dim",
    )
    table = _table("seconds", "empty cache", f"filled, median of {found['repeats']}")
    names = {
        "start": "Python",
        "import": "imports, devices",
        "load": "load",
        "first_token": "first token",
        "compile": "  of which compiling, or reading programs",
        "total": "process start to first token",
    }
    for part, text in names.items():
        table.add_row(text, *(f"{found[kind][part]:.2f}" for kind in ("cold", "warm")))
    console.print(table)
    console.print(f"compilation cache: {found['cache_bytes'] / 1e6:.1f} MB", style="dim")


def show_growth(found: dict[str, Any]) -> None:
    """Prints what `growth.growth` found, with `machine.describe()`."""
    console = _console()
    console.print(_machine(found), markup=False, style="dim")
    heads = ("as released", "only sliding", "only full")
    for name, xs, ys in (
        ("ms a decode step at a context of", found["contexts"], found["decode_step_s"]),
        ("ms to read a prompt of", found["lengths"], found["prefill_s"]),
    ):
        table = _table(name, *heads)
        for i, x in enumerate(xs):
            table.add_row(f"{x:,}", *(_milliseconds(ys[kind][i]) for kind in ys))
        console.print(table)
        console.print()
    table = _table(f"rows, at a context of {found['context']:,}", "ms a decode step", "tokens/s")
    for batch, seconds in zip(found["batches"], found["batch_step_s"], strict=True):
        pace = "no room" if seconds is None else _rate(batch / seconds)
        table.add_row(str(batch), _milliseconds(seconds), pace)
    console.print(table)


def show_suite(found: dict[str, Any]) -> None:
    """Prints what `suite.run` found, with `suite`."""
    console = _console()
    reports = [row["report"] for row in found["rows"] if "report" in row]
    machines = [one for one in reports if "device" in one]
    console.print(f"suite {found['suite']}, random weights, {found['seconds']:.0f} s", markup=False)
    if machines:
        console.print(_machine(machines[0]), markup=False, style="dim")
    table = _table("", "model", "figure", "goal", "prefill", "decode, tokens/s", "GB", "s to load")
    rest = []
    for row in found["rows"]:
        if "missing" in row:
            rest.append(f"{row['model']}, {row['name']}: {row['missing']}")
            continue
        one = row["report"]
        memory = (one.get("memory") or {}).get("device")
        measured = (
            *(_rate(one[key]) if key in one else "" for key in ("prefill_tok_s", "decode_tok_s")),
            f"{memory / GB:.1f}" if memory else "",
            f"{one['load_s']:.1f}" if "load_s" in one else "",
        )
        goals = [
            (
                "not known" if goal["value"] is None else _rate(goal["value"]),
                f"{key} {goal['sign']} {_rate(goal['goal'])}: {_MET[goal['met']]}",
            )
            for key, goal in row["goals"].items()
        ] or [("", "")]
        table.add_row(row["name"], row["model"], *goals[0], *measured)
        for more in goals[1:]:
            table.add_row("", "", *more, *[""] * 4)
    console.print(table)
    for text in rest:
        console.print(text, style="yellow", markup=False)


_MET = {True: "met", False: "not met", None: "not known"}


def _spread(one: dict[str, Any], figure: str) -> str:
    found = [line[figure] for line in one["rounds"]]
    return f"{_rate(one[figure])} ({_rate(min(found))} to {_rate(max(found))})"


def _milliseconds(seconds: float | None) -> str:
    return "no room" if seconds is None else _rate(seconds * 1e3)


def _rate(value: float) -> str:
    """About three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
