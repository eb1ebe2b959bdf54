"""Convert a checkpoint of any layout to Orbax, or any to Hugging Face's layout, in bounded memory.

MXFP4 experts are copied byte for byte unless --dtype asks for bfloat16. An interrupted conversion
leaves nothing behind.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss convert`."""

    source: tyro.conf.Positional[str]
    """A folder in any layout, a Hub id (openai/gpt-oss-20b, or with /original), or gpt-oss-tiny."""
    target: tyro.conf.Positional[Path]
    """Folder to make."""
    to: Literal["orbax", "hf"] = "orbax"
    """orbax: for inference and training on any mesh. hf: for transformers, vLLM and others."""
    dtype: Literal["mxfp4", "bfloat16"] | None = None
    """How experts are held; by default as in the source."""
    keep_tokens: Path | None = None
    """Prune the vocabulary to this file's o200k_harmony ids (one a line), bytes and controls."""
    overwrite: bool = False
    """Replace a checkpoint at the target."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    offline: bool = False
    """Use only what the Hub's cache already holds."""
    json: bool = False
    """Print one JSON object, for programs."""


def run(arguments: Arguments) -> None:
    """Resolves, converts with a bar on stderr, and says what was made."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from gptoss_jax import hub
    from gptoss_jax.convert import convert

    started = time.perf_counter()
    folder = hub.resolve(
        arguments.source, revision=arguments.revision, offline=arguments.offline or None
    )
    origin, revision = hub.provenance(arguments.source, folder)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    sizes: list[int] = []
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("converting")

        def total(nbytes: int) -> None:
            sizes.append(nbytes)
            progress.update(task, total=nbytes)

        target = convert(
            folder,
            arguments.target,
            to=arguments.to,
            dtype=arguments.dtype,
            keep_tokens=arguments.keep_tokens,
            overwrite=arguments.overwrite,
            origin=origin,
            revision=revision,
            progress=lambda _, nbytes: progress.advance(task, nbytes),
            total=total,
            notice=lambda text: console.print(text, style="dim"),
        )
    seconds = time.perf_counter() - started
    if arguments.json:
        made = {"target": str(target), "to": arguments.to, "bytes": sizes[0]}
        json.dump({**made, "seconds": round(seconds, 3)}, sys.stdout)
        print()
    else:
        print(f"{target}: {sizes[0] / 1e9:.3g} GB in {seconds:.1f} s")
