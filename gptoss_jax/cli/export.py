"""Write what `gptoss finetune` made for other programs: an adapter as peft's, or merged into its
base in Hugging Face's layout.

peft's form serves beside the base in transformers and vLLM. Merged, the experts are bfloat16, or
MXFP4: byte for byte the base's if the adapter leaves experts alone, otherwise rounded again with
--requantize, which says how much of the change survived.
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
    """Options of `gptoss export`."""

    run: tyro.conf.Positional[Path]
    """Folder of a run of `gptoss finetune`, or of an adapter, ours or peft's."""
    target: tyro.conf.Positional[Path]
    """Folder to make."""
    to: Literal["peft", "hf"]
    """peft: the adapter alone. hf: the base with the adapter merged into it."""
    dtype: Literal["bfloat16", "mxfp4"] | None = None
    """How a merged checkpoint holds experts; by default bfloat16."""
    requantize: bool = False
    """With --dtype mxfp4: round experts that the adapter changes."""
    model: str | None = None
    """The base; by default the one that the adapter names."""
    overwrite: bool = False
    """Replace a checkpoint at the target."""
    revision: str | None = None
    """Branch, tag or commit of the base on the Hub."""
    offline: bool = False
    """Use only what the Hub's cache already holds."""
    json: bool = False
    """Print one JSON object, for programs."""


def run(arguments: Arguments) -> None:
    """Exports and says what was made, and what rounding has kept."""
    from gptoss_jax.errors import GptOssError

    started = time.perf_counter()
    target = arguments.target.expanduser()
    whole = arguments.run.expanduser() / "model"
    made: dict = {"target": str(target), "to": arguments.to}
    if arguments.to == "peft":
        if arguments.dtype or arguments.requantize:
            raise GptOssError("--dtype and --requantize are for --to hf: an adapter has no experts")
        made |= _peft(arguments, target)
    elif (whole / "config.json").exists():  # of a full fine-tuning: nothing to merge
        made |= _convert(arguments, whole, target)
    else:
        made |= _merge(arguments, target)
    made["seconds"] = round(time.perf_counter() - started, 3)
    if arguments.json:
        json.dump(made, sys.stdout)
        print()
        return
    print(f"{target}: {made['what']} in {made['seconds']:.1f} s")
    if "change_kept" in made:
        print(
            f"experts rounded to MXFP4: {100 * made['change_kept']:.1f} % of the adapter's change "
            f"survived; it was {100 * made['change_size']:.2g} % of the weights, whose "
            f"error now is {100 * made['weight_error']:.2g} %"
        )


def _base(arguments: Arguments, named: str) -> Path:
    """Folder of the base."""
    from gptoss_jax import hub
    from gptoss_jax.errors import GptOssError

    name = arguments.model or named
    if not name:
        raise GptOssError(f"{arguments.run}: the adapter names no base: give --model")
    try:
        return hub.resolve(name, revision=arguments.revision, offline=arguments.offline or None)
    except GptOssError as error:
        if arguments.model:
            raise
        raise GptOssError(f"the adapter's base: {error}; --model says where it is now") from error


def _peft(arguments: Arguments, target: Path) -> dict:
    from gptoss_jax import adapters, checkpoint, lora
    from gptoss_jax.adapters import peft

    named, config = adapters.base_of(arguments.run)
    if config is None or arguments.model:
        config = checkpoint.open_checkpoint(_base(arguments, named)).config
    adapter = adapters.load(arguments.run, config)
    peft.export(target, adapter, config, overwrite=arguments.overwrite)
    names = {path[-1] for path, _ in lora.pairs_of(adapter.tree)}
    if len(names & set(lora.EXPERTS)) == 1:
        print("vLLM takes adapters of both expert weights or of none", file=sys.stderr)
    if adapter.lora.quantization_aware:
        print(
            "the adapter was trained for experts rounded to MXFP4; beside an unrounded base it is "
            "off by the rounding",
            file=sys.stderr,
        )
    return {"what": f"{lora.count(adapter.tree):,} parameters as peft's adapter"}


def _convert(arguments: Arguments, whole: Path, target: Path) -> dict:
    from gptoss_jax.convert import convert

    dtype = arguments.dtype or "bfloat16"
    with _progress("converting") as bar:
        convert(whole, target, to="hf", dtype=dtype, overwrite=arguments.overwrite, **bar)
    return {"what": "the model"}


def _merge(arguments: Arguments, target: Path) -> dict:
    from gptoss_jax import adapters
    from gptoss_jax.convert import merge

    folder = _base(arguments, adapters.base_of(arguments.run)[0])
    dtype = arguments.dtype or "bfloat16"
    with _progress("merging") as bar:
        kept = merge(
            folder,
            target,
            arguments.run,
            dtype=dtype,
            requantize=arguments.requantize,
            overwrite=arguments.overwrite,
            **bar,
        )
    made: dict = {"what": f"base and adapter merged, experts in {dtype}"}
    if kept is not None:
        made |= {"change_kept": kept.change, "weight_error": kept.error, "change_size": kept.size}
    return made


def _progress(what: str):
    """A bar on stderr; yields the callbacks that conversions take."""
    import contextlib

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    @contextlib.contextmanager
    def bar():
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        hidden = not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
            task = progress.add_task(what)
            yield {
                "progress": lambda _, nbytes: progress.advance(task, nbytes),
                "total": lambda nbytes: progress.update(task, total=nbytes),
                "notice": lambda text: console.print(text, style="dim"),
            }

    return bar()
