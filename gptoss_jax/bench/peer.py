"""What the programs that time other systems share: their options, and the line they print.

Loads no JAX: the memory that they report is the other system's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss_jax.bench.process import peak_resident, use_cores, versions


def options(description: str, **more: Any) -> argparse.Namespace:
    """Options of a program, as `compare` gives them; this process is kept to --threads cores."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="a config.json")
    for name, value in {"prompt": 512, "new": 32, "batch": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, required=True)
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    given = parser.parse_args()
    given.config = json.loads(given.config.read_text())
    use_cores(given.threads)
    return given


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call that ends when its work is done, and what it returned."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def tell(
    given: argparse.Namespace,
    system: str,
    packages: tuple[str, ...],
    load: float,
    prefill: list[float],
    steps: list[float],
) -> None:
    """Prints the line: medians as tokens a second of all rows.

    Args:
      given: The options.
      system: Name of what was timed.
      packages: Whose versions are told.
      load: Seconds until the model was ready.
      prefill: Seconds of each prefill, without the first of all, which warms up.
      steps: Seconds of each decode step.
    """
    line = {
        "system": system,
        "layers": given.config["num_hidden_layers"],
        "prompt": given.prompt,
        "new": given.new,
        "batch": given.batch,
        "threads": given.threads,
        "prefill_tok_s": given.batch * given.prompt / statistics.median(prefill),
        "decode_tok_s": given.batch / statistics.median(steps),
        "load_s": load,
        "memory": {"resident": peak_resident()},
        "versions": versions(packages),
    }
    print(json.dumps(line), flush=True)
