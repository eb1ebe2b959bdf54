"""From a process' start to its first token, taken apart: a new process with an empty compilation
cache, and then others that find it filled.

Knows how to start this package again; the child is this file run as a program.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.bench.process import last_line

PARTS = ("start", "import", "load", "first_token", "compile", "total")


def startup(
    options: Sequence[str], *, repeats: int = 3, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Seconds of each part, cold once and warm as medians of `repeats`.

    Args:
      options: Of the child: --model, --layers, --prompt and the others of `gptoss bench`.
      repeats: Processes that find the cache filled.
      say: Told what is being done.

    Returns:
      "cold" and "warm" -> part -> seconds: `start` of Python, `import` of the package and jax,
      `load` of the model, `first_token` of a prompt as `Model.stream` gives it, of which `compile`
      is what the same call does not take again, and `total`.

    Raises:
      GptOssError: The child failed; with its last line.
    """
    with tempfile.TemporaryDirectory(prefix="gptoss-startup-") as folder:
        say("a process with an empty compilation cache")
        cold = _child(options, folder)
        warm = []
        for i in range(repeats):
            say(f"with a filled one, {i + 1} of {repeats}")
            warm.append(_child(options, folder))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    medians = {part: statistics.median(one[part] for one in warm) for part in PARTS}
    return {"cold": cold, "warm": medians, "repeats": repeats, "cache_bytes": size}


def _child(options: Sequence[str], folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "gptoss_jax.bench.startup", repr(time.time()), *options]
    environment = {"GPTOSS_COMPILATION_CACHE": folder}
    return json.loads(last_line(command, "the process that was timed", environment=environment))


def main(argv: Sequence[str]) -> None:
    """The child: prints its parts as one line of JSON.

    Args:
      argv: When it was started (seconds since the epoch), then the model's options.
    """
    here = time.time()
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("started", type=float)
    for name in ("--model", "--mesh", "--dtype"):
        parser.add_argument(name)
    for name in ("--layers", "--max-context", "--prompt"):
        parser.add_argument(name, type=int)
    parser.add_argument("--random-weights", action="store_true")
    given = parser.parse_args(argv)
    import jax

    import gptoss_jax as gj
    from gptoss_jax.bench.model import open_model
    from gptoss_jax.bench.steps import prompts

    jax.devices()
    imported = time.time()
    model = open_model(
        given.model,
        random_weights=given.random_weights,
        layers=given.layers,
        mesh=given.mesh,
        dtype=given.dtype,
        max_context=given.max_context,
    )
    jax.block_until_ready(model.params)
    loaded = time.time()
    prompt = prompts(model, 1, given.prompt)[0].tolist()
    settings = gj.Sampling(temperature=0, ignore_eos=True)

    def first() -> float:
        begun = time.time()
        next(model.stream(prompt, settings, max_new_tokens=8))
        return time.time() - begun

    cold = first()
    total = time.time() - given.started
    parts = {
        "start": here - given.started,
        "import": imported - here,
        "load": loaded - imported,
        "first_token": cold,
        "compile": max(0.0, cold - first()),
        "total": total,
    }
    print(json.dumps(parts))


if __name__ == "__main__":
    main(sys.argv[1:])
