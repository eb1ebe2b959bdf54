"""Settings of the engine."""

import dataclasses

from gptoss_jax.errors import GptOssError


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How much an engine takes on.

    Attributes:
      slots: Completions that are generated at once.
      max_queue: Requests that may wait for a slot; more are refused as Busy.
      max_context: Longest sequence, in tokens; None for the model's, if the cache fits into memory.
      chunk: Tokens of a prompt that are read between two steps of the others, a multiple of the
        model's window; None for the smallest one of at least 128. Also the size of a page.
      pages: Pages of the prefix cache, 0 for none; None for as many as make a quarter of what the
        slots take.
      drafts: Tokens that are guessed to follow, from what stood after the same two tokens before,
        and checked in one step; 0 for none. The output is the same; it comes sooner where it
        repeats what was there.
    """

    slots: int = 32
    max_queue: int = 256
    max_context: int | None = None
    chunk: int | None = None
    pages: int | None = None
    drafts: int = 0

    def __post_init__(self):
        for name, low in (
            ("slots", 1),
            ("max_queue", 0),
            ("chunk", 1),
            ("pages", 0),
            ("drafts", 0),
        ):
            value = getattr(self, name)
            if value is None and name in ("chunk", "pages"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise GptOssError(f"{name} is {value!r}: expected an integer of at least {low}")
