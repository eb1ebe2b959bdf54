"""How fast is the model on this machine, and what share of what the machine allows is that?

Times prefill and decode through the steps that generation takes: medians over repeats, compiling
apart, every time ending when the devices are done. --random-weights needs no files: the real
format and sizes. Other questions, one at a time: --compare (other systems on this CPU), --startup
(where the time to a first token goes), --tune (what the kernels can be tuned by), --plot (growth
with context, batch and length), --profile (a trace).
"""

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gptoss_jax.cli.loading import TINY, ModelArguments, note, working

Peer = Literal["transformers", "llama.cpp"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss bench`."""

    model: Annotated[ModelArguments, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ModelArguments
    )
    random_weights: bool = False
    """Random parameters of the real format and sizes: --model gpt-oss-20b or gpt-oss-120b without
    any files.
    """
    layers: int | None = None
    """With --random-weights: only so many layers."""
    prompt: int = 512
    """Tokens of a prompt."""
    new: int = 32
    """Tokens generated for each prompt."""
    batch: int = 1
    """Rows at the same time."""
    repeats: int = 5
    """Runs that count; one more comes first, and compiles."""
    threads: int | None = None
    """Cores to use, on Linux; by default all that this process may."""
    machine: bool = True
    """Measure what the device allows too: its memory's bandwidth and its matrix rate."""
    compare: tuple[Peer, ...] = ()
    """Other systems to run in turn with this one on the CPU, each in a process of its own."""
    rounds: int = 3
    """With --compare: how often each system runs."""
    startup: bool = False
    """Take the time from a process' start to its first token apart, with the compilation cache
    empty and filled.
    """
    tune: bool = False
    """Search what the kernels of this device can be tuned by, and keep it in the cache folder."""
    plot: Path | None = None
    """Draw how cost grows with context, batch and length, for each kind of layer alone (PNG)."""
    contexts: tuple[int, ...] = tuple(1 << n for n in range(10, 18))
    """With --plot: tokens in the cache."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """With --plot: rows."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    """With --plot: tokens of a prompt."""
    suite: Literal["h200"] | None = None
    """All that is to be known of a kind of device, each figure in a process of its own beside its
    goal, in under 10 minutes; with --layers only so many layers, to try it out.
    """
    profile: Path | None = None
    """Write a trace of one prefill and of the decode steps to this folder, for xprof."""
    json: bool = False
    """Also print one JSON object, as the last line, for programs."""


def run(arguments: Arguments) -> int:
    """Measures what is asked, prints a table, with --json the figures as the last line."""
    modes = {
        "--compare": bool(arguments.compare),
        "--startup": arguments.startup,
        "--tune": arguments.tune,
        "--plot": arguments.plot is not None,
        "--profile": arguments.profile is not None,
        "--suite": arguments.suite is not None,
    }
    asked = [name for name, wanted in modes.items() if wanted]
    if len(asked) > 1:
        print(f"gptoss bench: {' and '.join(asked)}: one at a time", file=sys.stderr)
        return 2
    _check(arguments)
    if arguments.threads is not None:
        from gptoss_jax.bench.process import use_cores

        use_cores(arguments.threads)
    call = {
        "--compare": _compare,
        "--startup": _startup,
        "--tune": _tune,
        "--plot": _plot,
        "--profile": _profile,
        "--suite": _suite,
    }.get(asked[0] if asked else "", _measure)
    report = {"system": "gptoss_jax", "model": arguments.model.model or TINY, **call(arguments)}
    report |= {"random_weights": arguments.random_weights or bool(arguments.compare)}
    report["command"] = shlex.join(["gptoss", *sys.argv[1:]])
    if arguments.json:
        print(json.dumps(report))
    return 0


def _check(arguments: Arguments) -> None:
    from gptoss_jax.bench.measure import check

    names = ("prompt", "new", "batch", "repeats", "rounds")
    check(**{name: getattr(arguments, name) for name in names})


def _open(arguments: Arguments) -> tuple[Any, float]:
    """The model, and the seconds until its parameters are on the devices."""
    import jax

    from gptoss_jax.bench.model import open_model

    jax.devices()  # starting the devices is no part of loading
    started = time.perf_counter()
    name = arguments.model.model or TINY
    with working(f"loading {name}"):
        model = open_model(**_model(arguments), revision=arguments.model.revision)
        jax.block_until_ready(model.params)
    return model, time.perf_counter() - started


def _model(arguments: Arguments) -> dict[str, Any]:
    given = arguments.model
    return {
        "source": given.model,
        "random_weights": arguments.random_weights,
        "layers": arguments.layers,
        "mesh": given.mesh,
        "dtype": given.dtype,
        "max_context": given.max_context,
        "offline": given.offline or None,
    }


def _measure(arguments: Arguments) -> dict[str, Any]:
    from gptoss_jax.bench import machine, measure, process, report, tables

    limits = None
    if arguments.machine:  # first: its arrays are gone when the model comes
        with working("measuring the machine"):
            limits = machine.limits()
    model, load = _open(arguments)
    sizes = {"prompt": arguments.prompt, "new": arguments.new, "batch": arguments.batch}
    with working("measuring the model"):
        timing = measure.measure(model, **sizes, repeats=arguments.repeats)
    found = report.report(model, timing, **sizes, load=load, limits=limits)
    found["memory"] = {"resident": process.peak_resident(), "device": machine.peak_device()}
    found |= machine.describe()
    tables.show_measured(found, model.name)
    return found


def _compare(arguments: Arguments) -> dict[str, Any]:
    from gptoss_jax.bench import compare, process, tables

    source = arguments.model.model
    if source is None or source == TINY:
        source = "gpt-oss-20b"
        note("comparing at the sizes of gpt-oss-20b; --model for others, --layers for fewer layers")
    found = compare.compare(
        arguments.compare,
        source,
        layers=arguments.layers,
        prompt=arguments.prompt,
        new=arguments.new,
        batch=arguments.batch,
        rounds=arguments.rounds,
        threads=arguments.threads,
        say=note,
    )
    found |= {"model": source, "processor": process.processor(), "date": process.today()}
    tables.show_compared(found)
    return found


def _startup(arguments: Arguments) -> dict[str, Any]:
    from gptoss_jax.bench import process, startup, tables

    options = ["--prompt", str(arguments.prompt)]
    options += ["--random-weights"] * arguments.random_weights
    chosen = {
        "--model": arguments.model.model or TINY,
        "--layers": arguments.layers,
        "--mesh": arguments.model.mesh,
        "--dtype": arguments.model.dtype,
        "--max-context": arguments.model.max_context,
    }
    for name, value in chosen.items():
        options += [name, str(value)] if value is not None else []
    found = startup.startup(options, repeats=arguments.rounds, say=note)
    found |= {"layers": arguments.layers, "prompt": arguments.prompt}
    found |= {"processor": process.processor(), "cores": process.cores(), "date": process.today()}
    found["versions"] = process.versions(("gptoss_jax", "jax", "jaxlib", "flax"))
    tables.show_startup(found, chosen["--model"])
    return found


def _tune(arguments: Arguments) -> dict[str, Any]:
    from gptoss_jax.bench.tune import tune
    from gptoss_jax.config import GptOssConfig

    found = tune(GptOssConfig.preset("gpt-oss-20b"), repeats=arguments.repeats, say=note)
    for name, before in found["ms before"].items():
        note(f"{name}: {before:.2f} ms before, {found['ms after'][name]:.2f} after")
    note(f"kept in {found['file']}")
    return found


def _plot(arguments: Arguments) -> dict[str, Any]:
    import importlib.util

    from gptoss_jax.bench import growth, machine, tables
    from gptoss_jax.errors import GptOssError

    assert arguments.plot is not None
    if importlib.util.find_spec("matplotlib") is None:  # before minutes of measuring
        raise GptOssError("--plot needs matplotlib: pip install 'gptoss_jax[notebook]'")
    model, _ = _open(arguments)
    longest = model.max_context
    found = growth.growth(
        model,
        contexts=[n for n in arguments.contexts if n <= longest],
        batches=arguments.batches,
        lengths=[n for n in arguments.lengths if n < longest],
        context=min(arguments.prompt + arguments.new, longest),
        say=note,
    )
    found |= {"layers": model.config.num_layers, **machine.describe()}
    title = f"{model.name}, {model.config.num_layers} layers, {found['device']['kind']}"
    title += f", jax {found['versions']['jax']}, {found['date']}"
    growth.plot(found, arguments.plot, title)
    tables.show_growth(found)
    print(f"drawn: {arguments.plot}")
    return found


def _suite(arguments: Arguments) -> dict[str, Any]:
    from gptoss_jax.bench import suite, tables

    assert arguments.suite is not None
    found = suite.run(suite.SUITES[arguments.suite], layers=arguments.layers, say=note)
    found |= {"suite": arguments.suite}
    tables.show_suite(found)
    return found


def _profile(arguments: Arguments) -> dict[str, Any]:
    from gptoss_jax.bench import machine, trace

    assert arguments.profile is not None
    model, _ = _open(arguments)
    sizes = {"prompt": arguments.prompt, "new": arguments.new, "batch": arguments.batch}
    with working("tracing"):
        files = trace.trace(model, arguments.profile, **sizes)
    print(f"{len(files)} files in {files[0].parent}")
    print(f"to look at it: pip install xprof && xprof --logdir {arguments.profile}")
    found = {"layers": model.config.num_layers, **sizes, "files": [str(file) for file in files]}
    return found | machine.describe()
