"""A trace of a few steps for xprof, and the check that it is there."""

from pathlib import Path

import jax

from gptoss_jax.bench import steps
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError


def trace(model: Model, folder: Path, *, prompt: int, new: int, batch: int) -> list[Path]:
    """Traces one prefill and `new` decode steps, after a run that compiles them.

    The trace names the functions of the source (`jax.named_scope`). Times under the profiler are
    not those without it: on GPUs it turns command buffers off.

    Args:
      model: The model.
      folder: Where the trace goes; made if it is not there.
      prompt: Tokens of a prompt.
      new: Decode steps, at most 64.
      batch: Rows.

    Returns:
      The files of the trace.

    Raises:
      GptOssError: The profiler wrote nothing.
    """
    tokens_BT = steps.prompts(model, batch, prompt)
    capacity = steps.capacity_for(model, prompt + new)
    settings = steps.greedy(model, batch)

    def run() -> None:
        with jax.profiler.TraceAnnotation("prefill"):
            state = jax.block_until_ready(steps.prefill(model, tokens_BT, capacity))
        with jax.profiler.TraceAnnotation("decode"):
            jax.block_until_ready(steps.decode(model, state, settings, new))

    run()
    before = set(folder.rglob("*"))
    folder.mkdir(parents=True, exist_ok=True)
    with jax.profiler.trace(str(folder)):
        run()
    made = sorted(file for file in folder.rglob("*") if file.is_file() and file not in before)
    if not any(file.name.endswith(".xplane.pb") and file.stat().st_size for file in made):
        raise GptOssError(f"the profiler wrote no trace to {folder}: is another one running?")
    return made
