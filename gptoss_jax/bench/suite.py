"""A list of measurements that belong together, each in a process of its own, with the goal beside
the figure: all that is to be known of a kind of device in one go and one table.

Knows commands and plain data; starts no device, which would hold its memory.
"""

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from gptoss_jax.bench.compare import settings_file
from gptoss_jax.bench.peer_triton import INSTALL as TRITON
from gptoss_jax.bench.process import cores, last_line, today
from gptoss_jax.errors import GptOssError

LEAST = 20.0  # seconds that must be left for one more measurement


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      name: For people.
      model: gpt-oss-20b or gpt-oss-120b.
      options: Of `gptoss bench`, or of the module.
      goals: Key of the report -> (at least or at most, value); "share.x" looks inside.
      module: A program that prints one line of JSON; None for `gptoss bench`.
      peer: Whether that is another system's, which takes its sizes from a file.
      needs: Modules that the program needs.
    """

    name: str
    model: str
    options: dict[str, int | str]
    goals: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    module: str | None = None
    peer: bool = False
    needs: tuple[str, ...] = ()


def _decode(model: str, batch: int, goal: float, repeats: int = 3) -> Row:
    options: dict[str, int | str] = {"prompt": 128, "new": 128, "batch": batch, "repeats": repeats}
    return Row(f"decode, batch {batch}", model, options, {"decode_tok_s": (">=", goal)})


def _prefill(model: str, **goals: tuple[str, float]) -> Row:
    options: dict[str, int | str] = {"prompt": 8192, "new": 2, "batch": 1, "repeats": 3}
    found = {"share.prefill_matrix": (">=", 0.45)} | {
        name.replace("__", "."): goal for name, goal in goals.items()
    }
    return Row("prefill of 8,192", model, options, found)


def _triton(model: str) -> Row:
    return Row(
        "OpenAI's triton implementation, decode, batch 1",
        model,
        {"prompt": 512, "new": 32, "batch": 1, "repeats": 2},
        module="gptoss_jax.bench.peer_triton",
        peer=True,
        needs=("gpt_oss", "triton", "triton_kernels", "torch"),
    )


# The first rows tell most, if time runs out.
SUITES = {
    "h200": (
        Row(
            "error of the kernels by that of plain jnp",
            "gpt-oss-20b",
            {"model": "gpt-oss-20b", "layers": 2},
            {"error_ratio": ("<=", 1.2)},
            module="gptoss_jax.bench.agreement",
        ),
        _decode("gpt-oss-20b", 1, 650),
        _decode("gpt-oss-120b", 1, 480),
        _prefill("gpt-oss-120b", memory__device=("<=", 72e9)),
        _decode("gpt-oss-20b", 64, 13_000),
        _prefill("gpt-oss-20b"),
        Row(
            "transformers, decode, batch 1",
            "gpt-oss-20b",
            {"prompt": 512, "new": 32, "batch": 1, "repeats": 2, "device": "cuda"},
            module="gptoss_jax.bench.peer_transformers",
            peer=True,
            needs=("torch", "transformers"),
        ),
        _triton("gpt-oss-20b"),
        _decode("gpt-oss-20b", 8, 2_300),
        _decode("gpt-oss-120b", 64, 3_000),
        _triton("gpt-oss-120b"),
    )
}
MISSING = {
    "torch": "pip install torch transformers",
    "transformers": "pip install transformers",
    **dict.fromkeys(("gpt_oss", "triton", "triton_kernels"), TRITON),
}


def run(
    rows: Sequence[Row],
    *,
    layers: int | None = None,
    seconds: float = 600,
    say: Callable[[str], None] = lambda text: None,
    child: Callable[[Sequence[str], float], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Runs the rows in their order until the time is over; a row that fails stops no other.

    Args:
      rows: Of SUITES, or others.
      layers: Only so many layers of each model, to try a suite out; by default all.
      seconds: Time for all; what does not fit is named.
      say: Told what is being done.
      child: Runs a command for at most so many seconds and gives what it reports.

    Returns:
      `rows`: each with `name`, `model`, and either `report` with `goals` (key -> value, goal, met)
      or `missing` with the reason; `date`, `seconds`.
    """
    child = child or _child
    ends, found = time.monotonic() + seconds, []
    for row in rows:
        one: dict[str, Any] = {"name": row.name, "model": row.model}
        found.append(one)
        absent = [name for name in row.needs if importlib.util.find_spec(name) is None]
        left = ends - time.monotonic()
        if absent:
            one["missing"] = f"not installed: {MISSING[absent[0]]}"
        elif left < LEAST:
            one["missing"] = f"not measured: {seconds:.0f} s were over"
        else:
            say(f"{row.model}: {row.name}")
            try:
                one["report"] = child(_command(row, layers), left)
            except (GptOssError, OSError, ValueError) as problem:
                one["missing"] = str(problem)
                continue
            one["goals"] = {
                key: _judged(_look(one["report"], key), *goal) for key, goal in row.goals.items()
            }
    return {"rows": found, "date": today(), "seconds": seconds - (ends - time.monotonic())}


def _judged(value: float | None, sign: str, goal: float) -> dict[str, Any]:
    met = None if value is None else value >= goal if sign == ">=" else value <= goal
    return {"value": value, "goal": goal, "sign": sign, "met": met}


def _look(report: dict[str, Any], key: str) -> float | None:
    value: Any = report
    for part in key.split("."):
        value = (value or {}).get(part)
    return value


def _command(row: Row, layers: int | None) -> list[str]:
    words = [word for name, value in row.options.items() for word in (f"--{name}", str(value))]
    start = [sys.executable, "-m"]
    if row.module is None:
        words += ["--layers", str(layers)] if layers is not None else []
        return [
            *start,
            *("gptoss_jax.cli.main", "bench", "--model", row.model, "--random-weights", "--json"),
            *words,
        ]
    if row.peer:
        words += ["--config", str(settings_file(row.model, layers)), "--threads", str(cores())]
    return [*start, row.module, *words]


def _child(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """The object in the last line that a process prints."""
    return json.loads(last_line(command, "the process", seconds=seconds))
