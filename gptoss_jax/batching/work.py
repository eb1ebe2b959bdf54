"""What the engine knows of a request and of each of its completions."""

import dataclasses
import secrets
from collections.abc import Callable

import numpy as np

from gptoss_jax.batching.requests import Failure, Listener, Request, TokenMask
from gptoss_jax.completions import Piece, Reader

ACCEPTED_SHARE = 0.9  # of the newest choice in the average of what a grammar accepts


class Job:
    """A request that the engine has taken (`requests.Generation`).

    Args:
      number: In order of submission.
      request: What was asked for.
      listener: Gets the pieces.
      prompt: int32 ids.
      limit: Most tokens of a completion.
      adapter: Number in the stack, 0 for none.
      pages: Names of the prompt's pages.
      cancel: Called with (job, completion or None) from any thread.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        listener: Listener,
        prompt: np.ndarray,
        limit: int,
        adapter: int,
        pages: list[bytes],
        cancel: Callable[["Job", int | None], None],
    ):
        self.number, self.request, self.listener = number, request, listener
        self.prompt, self.limit, self.adapter = prompt, limit, adapter
        self.pages = pages
        self.seed = secrets.randbits(64) if (s := request.sampling.seed) is None else s % 2**64
        self.waiting = list(range(request.sampling.n))  # completions without a slot
        self.works: dict[int, Work] = {}  # those with one
        self.cached = 0
        self._cancel = cancel

    @property
    def cached_tokens(self) -> int:
        return self.cached

    def cancel(self, completion: int | None = None) -> None:
        self._cancel(self, completion)

    def __lt__(self, other: "Job") -> bool:
        return self.order < other.order

    @property
    def order(self) -> tuple[int, int]:
        """Of admission."""
        return self.request.priority, self.number


@dataclasses.dataclass(eq=False)
class Work:
    """A completion that has a slot.

    Attributes:
      job: Its request.
      index: Which of the request's completions.
      slot: Row.
      reader: Makes pieces of tokens.
      stops: Ids that end it.
      mask: Its constraint.
      done: Tokens of the prompt that are in the cache.
      cached: Those of them that came from pages.
      length: Tokens of prompt and completion that are settled.
      valid_from: Steps before this one no longer concern it.
      accepted: Moving average of what the constraint accepts.
    """

    job: Job
    index: int
    slot: int
    reader: Reader
    stops: frozenset[int]
    mask: TokenMask | None
    done: int = 0
    cached: int = 0
    length: int = 0
    valid_from: int = 0
    accepted: float = 1.0
    over: bool = False

    @property
    def left(self) -> int:
        """Tokens of the prompt still to be read; its last one is read by the first step."""
        return len(self.job.prompt) - 1 - self.done

    def tell(self, piece: Piece | Failure) -> None:
        """Hands on what came."""
        self.job.listener(self.index, piece)

    def heard(self, good: bool) -> None:
        """Notes whether the constraint accepted an unmasked choice."""
        self.accepted = ACCEPTED_SHARE * self.accepted + (1 - ACCEPTED_SHARE) * good
