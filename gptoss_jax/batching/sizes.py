"""How much fits: the context of a row, the tokens of a chunk, the pages of the prefix cache."""

import dataclasses
import math
import re
from pathlib import Path

import jax

from gptoss_jax import sharding
from gptoss_jax.batching.settings import EngineSettings
from gptoss_jax.cache import cache_bytes
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError

CHUNK = 128
BACK = 4  # tokens that a row can be taken back, or more with more drafts
LEAST_CONTEXT = 1024  # of a slot, when memory decides
UNKNOWN_MEMORY = 16 << 30  # of a host that does not say what it has


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of an engine's programs.

    Attributes:
      rows: Slots.
      context: Tokens of a row.
      chunk: Tokens of a chunk and of a page.
      pages: Of the prefix cache.
      drafts: Tokens that a step may check.
      back: Tokens that a row can be taken back.
    """

    rows: int
    context: int
    chunk: int
    pages: int
    drafts: int
    back: int


def choose_sizes(model: Model, settings: EngineSettings) -> Sizes:
    """The settings, with what they leave open.

    Raises:
      GptOssError: They do not fit the model or the memory.
    """
    config, rows = model.config, settings.slots
    window, back = config.sliding_window, max(BACK, settings.drafts + 1)
    context = settings.max_context or model.max_context
    usual = min(-(-CHUNK // window), max(context // window, 1)) * window
    chunk = settings.chunk or usual
    if chunk % window:
        raise GptOssError(f"chunk is {chunk}: expected a multiple of the window, {window}")
    if not 0 < context <= model.max_context:
        raise GptOssError(
            f"max_context is {context}: this model's context is 1 to {model.max_context}"
        )
    itemsize = model.params["embedding"].dtype.itemsize
    free, copies = _free_bytes(model, rows)

    def needed(context: int) -> int:
        return cache_bytes(config, rows, context, itemsize, back) // copies

    while settings.max_context is None and context > LEAST_CONTEXT and needed(context) > free:
        context //= 2
    if needed(context) > free:
        raise GptOssError(
            f"{rows} slots of {context} tokens need {needed(context) / 1e9:.1f} GB of cache, "
            f"{free / 1e9:.1f} GB are free: use fewer slots or a smaller max_context"
        )
    if chunk > context:
        raise GptOssError(f"chunk is {chunk}: expected at most the context, {context}")
    pages = settings.pages
    if pages is None:
        pages = needed(context) * copies // (4 * cache_bytes(config, 1, chunk, itemsize))
    return Sizes(rows, context, chunk, pages, settings.drafts, back)


def _free_bytes(model: Model, rows: int) -> tuple[float, int]:
    """Memory of a device that the cache may take, and over how many the cache is spread."""
    device, copies = jax.devices()[0], 1
    if model.mesh is not None:
        device = model.mesh.devices.flat[0]
        axes = ("tensor", *sharding.batch_axes(rows, model.mesh))
        copies = math.prod(model.mesh.shape[axis] for axis in axes)
    memory = device.memory_stats() or {}
    if "bytes_limit" in memory:
        return 0.8 * (memory["bytes_limit"] - memory.get("bytes_in_use", 0)), copies
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+)", file.read_text() if file.exists() else "")
    return 0.5 * (int(found[1]) << 10 if found else UNKNOWN_MEMORY), copies
