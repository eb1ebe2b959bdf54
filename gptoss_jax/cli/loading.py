"""Options that every verb with a model has, and loading with a spinner."""

import contextlib
import dataclasses
import hashlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gptoss_jax.hub import TINY

ADAPTER = "adapter"
SHOWN_BYTES = 100_000_000  # below it loading is over before a bar can be read
Effort = Literal["low", "medium", "high"]


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """Which model."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"])] = None
    """A Hub id such as openai/gpt-oss-20b, or a folder; by default gpt-oss-tiny from the
    package.
    """
    mesh: str | None = None
    """Devices to spread it over, such as expert=4,data=2 (axes data, fsdp, expert, tensor); by
    default all accelerators.
    """
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of everything that is not packed MXFP4; by default bfloat16, on CPU float32 for models below
    1 GiB.
    """
    max_context: int | None = None
    """Longest sequence in tokens; by default the model's."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    offline: bool = False
    """Use only what the Hub's cache already holds."""
    coordinator_address: str | None = None
    """Several processes: HOST:PORT of process 0. Cloud TPU, SLURM, Kubernetes Jobs and Open MPI are
    detected; elsewhere give all three, the rest of the command the same in every process.
    """
    num_processes: int | None = None
    """How many processes there are; 1 for a process of its own inside a cluster."""
    process_id: int | None = None
    """Which of them this one is, from 0; process 0 speaks."""
    initialization_timeout: int = 300
    """Seconds to wait for the other processes."""


@dataclasses.dataclass(frozen=True)
class SamplingArguments:
    """How tokens are chosen."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens at least this probable relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of prompt and output become less likely."""
    presence_penalty: float = 0.0
    """Subtracted from logits of tokens already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once for every occurrence in the output."""
    seed: int | None = None
    """Same seed, same tokens."""

    def sampling(self, **more):
        """The settings as gptoss_jax.Sampling."""
        from gptoss_jax.sampling import Sampling

        return Sampling(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingArguments)}, **more
        )


def silent() -> bool:
    """Whether this is one of several processes, and not the one that speaks."""
    hosts = sys.modules.get("gptoss_jax.hosts")  # loaded by the verbs that may have several
    return hosts is not None and not hosts.speaks()


def note(text: str) -> None:
    """One dim line on stderr, so that stdout holds the answer only."""
    if silent():
        return
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style="dim", soft_wrap=True)


@contextlib.contextmanager
def working(text: str):
    """A spinner on stderr while something takes its time; nothing where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if silent() or not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


@contextlib.contextmanager
def _loading(name: str, folder: Path):
    """A bar over the checkpoint's bytes on stderr; yields what `load` calls for every parameter."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console = Console(stderr=True)
    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn())
    hidden = silent() or not console.is_terminal or total < SHOWN_BYTES
    with Progress(
        *columns, TransferSpeedColumn(), console=console, transient=True, disable=hidden
    ) as bar:
        task = bar.add_task(name, total=total)
        yield lambda _, nbytes: bar.advance(task, nbytes)


def load_model(
    arguments: ModelArguments,
    quiet: bool = False,
    adapter: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
    experts: Any = None,
):
    """Loads the model that the options name; says so when it is the one in the box.

    Args:
      arguments: The options.
      quiet: Say nothing.
      adapter: Folder of an adapter, which requests then name ADAPTER.
      adapters: Folders of adapters by the names that requests give.
      experts: How they lie in memory, as `gj.load` takes it.
    """
    name = arguments.model or TINY
    if arguments.model is None and not quiet:
        note(
            "Using gpt-oss-tiny, the model in the package; "
            "--model openai/gpt-oss-20b for the real thing."
        )
    started = time.perf_counter()
    from gptoss_jax import hosts, hub
    from gptoss_jax.loading import load

    folder = hub.resolve(name, revision=arguments.revision, offline=arguments.offline or None)
    with _loading(name, folder) as progress:
        model = load(
            folder,
            mesh=arguments.mesh,
            dtype=arguments.dtype,
            max_context=arguments.max_context,
            adapters={ADAPTER: adapter} if adapter else adapters,
            experts=experts,
            progress=progress,
        )
    if hosts.place() is not None:
        config = hashlib.sha256(repr(model.config).encode()).hexdigest()[:8]
        dtype, mesh = model.params["embedding"].dtype.name, model.mesh and dict(model.mesh.shape)
        hosts.compare({f"the config of {name} (sha256)": config, "dtype": dtype, "mesh": mesh})
    model = dataclasses.replace(model, name=name)
    seconds = time.perf_counter() - started
    if seconds > 10 and not quiet:
        note(f"loaded {name} in {seconds:.0f} s")
    sys.stdout.flush()
    return model
