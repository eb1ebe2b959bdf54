"""What one asks of a batching engine, and what it promises: the seam between serving and
generation.

Whatever speaks to clients knows only these names, so that a scripted engine can stand in for the
real one. Knows token ids; refuses to know roles, channels and HTTP.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from gptoss_jax.completions import Piece
from gptoss_jax.errors import GptOssError
from gptoss_jax.sampling import Sampling
from gptoss_jax.tokenizer import Tokenizer


class Busy(GptOssError):
    """The queue is full: try again later."""


class Closing(GptOssError):
    """The engine takes no new requests: it is shutting down."""


class TokenMask(Protocol):
    """A constraint on the tokens of one completion (chat/grammar.py has one). Used by one thread at
    a time; its state is what it has accepted so far.
    """

    def fill(self, allowed: np.ndarray) -> None:
        """Writes which tokens may come next: bit t % 32 of allowed[t // 32] (uint32 [ceil(V /
        32)]). If the completion is over, only stop tokens are allowed; if nothing can follow, no
        token is, and the completion ends with a Failure.
        """
        ...

    def accept(self, token: int) -> bool:
        """Takes the next token; False, and no change, if it is not allowed."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
      prompt: Token ids.
      sampling: How tokens are chosen; n completions share one prefill.
      max_new_tokens: Most tokens of each completion, None for the rest of the context.
      stop: Strings that end a completion; they are not part of it.
      adapter: Name of one of the engine's adapters, or None.
      priority: Requests of a lower number are admitted first; equal ones in order.
      masks: One constraint for each of the n completions, or none.
    """

    prompt: Sequence[int]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    adapter: str | None = None
    priority: int = 0
    masks: Sequence[TokenMask] = ()


@dataclasses.dataclass(frozen=True)
class Failure:
    """The generation ended without a result; `error` is for the client if it is a GptOssError."""

    error: Exception


Listener = Callable[[int, Piece | Failure], None]
"""Called in the engine's thread with the number of the completion (0 to n - 1) and what came: must
return at once and never raise. A piece with a finish_reason ("stop", "length" or "cancelled"), or a
Failure, is that completion's last.
"""


class Generation(Protocol):
    """A request that the engine has taken."""

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not read again; known from the first piece on."""
        ...

    def cancel(self, completion: int | None = None) -> None:
        """Ends it (or one of its n completions) within one step; may be called from any thread and
        more than once. The listener still gets the last piece.
        """
        ...


class BatchingEngine(Protocol):
    """Many generations at once."""

    @property
    def name(self) -> str:
        """Of the model."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_context(self) -> int:
        """Longest sequence, prompt and completion, in tokens."""
        ...

    @property
    def adapters(self) -> Sequence[str]:
        """Names that requests may give."""
        ...

    def submit(self, request: Request, listener: Listener) -> Generation:
        """Queues a request; returns at once.

        Raises:
          GptOssError: The prompt is empty or does not fit into the context with max_new_tokens, an
            id is out of range, or there is no such adapter.
          Busy: The queue is full.
          Closing: The engine is shutting down.
        """
        ...

    def statistics(self) -> Mapping[str, float]:
        """Gauges and counters by name: slots, slots_busy, queue, cache_pages, cache_pages_busy,
        prompt_tokens_total, cached_tokens_total, generated_tokens_total, steps_total,
        draft_tokens_total, accepted_tokens_total, requests_total, cancelled_total.
        """
        ...

    def close(self, drain: float | None = None) -> None:
        """Takes no new requests; waits up to `drain` seconds (None: until done) for those at work,
        then cancels them.
        """
        ...
