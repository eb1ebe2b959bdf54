"""Where a run's numbers go: metrics.jsonl always, TensorBoard, Weights & Biases and trackio if
asked for; and their pictures.

Knows rows of numbers; knows no arrays.
"""

import importlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gptoss_jax.errors import GptOssError

Row = Mapping[str, Any]


class Sink(Protocol):
    """What takes rows: each has a "step" and numbers, and now and then texts."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class Journal:
    """metrics.jsonl, one row a line.

    Args:
      path: The file; rows after `step` are of a run that was cut off, and are removed.
      step: Where the run continues, 0 to begin anew.
    """

    def __init__(self, path: Path, step: int):
        kept = [row for row in read(path) if row["step"] <= step] if step else []
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, row: Row) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; the last line may have been cut off."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: Row) -> str:
    def plain(value: Any) -> Any:  # JSON has no NaN
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({k: plain(v) for k, v in row.items()}, ensure_ascii=False) + "\n"


class _TensorBoard:
    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        library = _library("tensorboardX", "tensorboard")
        purge = step + 1 if step else None
        self._writer = library.SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        del settings

    def write(self, row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, row["step"])
            elif isinstance(value, list):
                text = "\n\n".join(f"{s['prompt']}\n\n{s['text']}" for s in value)
                self._writer.add_text(name, text, row["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases, or trackio, which has the same functions."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]):
        library = _library(name, name)
        keywords: dict[str, Any] = {"project": "gptoss", "name": folder.name}
        if name == "wandb":
            keywords |= {"dir": str(folder), "id": _run_id(folder), "resume": "allow"}
        else:
            keywords |= {"resume": "allow"}
        self._run = library.init(config=dict(settings), **keywords)
        self._library, self._steps = library, name == "wandb"

    def write(self, row: Row) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self._library.log(numbers, step=row["step"])

    def close(self) -> None:
        self._library.finish()


def _run_id(folder: Path) -> str:
    """An id that is the same when the run continues."""
    import hashlib

    return hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise GptOssError(
            f"metrics to {name} need {module}, which is not installed: pip install {module}, or "
            f"leave {name} out; metrics.jsonl is always written"
        ) from None


def open_sinks(
    names: Sequence[str], folder: Path, step: int, settings: Mapping[str, Any]
) -> list[Sink]:
    """The journal, and what was asked for.

    Args:
      names: Of `settings.LOGS`.
      folder: The run's.
      step: Where it continues, 0 for a new one.
      settings: Shown beside the numbers.

    Raises:
      GptOssError: A library is not installed; the journal is untouched then.
    """
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: _TensorBoard(folder, step, settings),
        "wandb": lambda: _Wandb("wandb", folder, settings),
        "trackio": lambda: _Wandb("trackio", folder, settings),
    }
    others = [makers[name]() for name in dict.fromkeys(names)]
    return [Journal(folder / "metrics.jsonl", step), *others]


def plot(rows: Sequence[Row], path: str | Path | None = None) -> Any:
    """Draws loss, learning rate and expert load over the steps.

    Args:
      rows: Of metrics.jsonl.
      path: PNG (or what else matplotlib writes) to make; None for none.

    Returns:
      The matplotlib figure, which a notebook shows.

    Raises:
      GptOssError: There is no step yet, or matplotlib is missing.
    """
    try:
        figure_of = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise GptOssError("a plot needs matplotlib: pip install matplotlib") from None

    def series(name: str) -> tuple[list[int], list[float]]:
        found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return [x for x, _ in found], [y for _, y in found]

    if not series("loss")[0] and not series("eval_loss")[0]:
        raise GptOssError("there is nothing to draw: no step has been done")
    figure = figure_of(figsize=(10, 3), layout="constrained")
    loss, rate, load = figure.subplots(1, 3)
    loss.plot(*series("loss"), label="training")
    if series("eval_loss")[0]:
        loss.plot(*series("eval_loss"), marker="o", label="held out")
        loss.legend()
    loss.set_ylim(bottom=0)
    rate.plot(*series("learning_rate"))
    for name, label in (("load_max", "most"), ("load_min", "least")):
        load.plot(*series(name), label=label)
    load.axhline(1, color="grey", linewidth=0.5)
    load.legend()
    titles = ("loss (nats a token)", "learning rate", "load of an expert, mean = 1")
    for axis, title in zip((loss, rate, load), titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
    if path is not None:
        figure.savefig(Path(path), dpi=120)
    return figure
