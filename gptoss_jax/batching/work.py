"""What the engine knows of a request and of each of its completions."""

import dataclasses
import secrets
from collections.abc import Callable

import numpy as np

from gptoss_jax.batching.requests import Failure, Listener, Request, TokenMask
from gptoss_jax.completions import Piece, Reader

MEMORY = 0.9  # of the averages of what grammars accept and drafts hit
LEAST_HITS = 0.1  # drafts that are right less often are not tried


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
      after: Where the token after a pair of tokens stands in `history`; None before a draft.
      hits: Moving average of the share of drafted tokens that were right.
      over: It has ended.
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
    after: dict[tuple[int, ...], int] | None = None
    history: list[int] = dataclasses.field(default_factory=list)
    hits: float = 0.5
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
        self.accepted = MEMORY * self.accepted + (1 - MEMORY) * good

    def draft(self, most: int) -> list[int]:
        """Tokens that may follow: those that followed the last two before."""
        if self.after is None:
            self.after, self.history = {}, []
            for token in self.job.prompt.tolist():
                self.remember(token)
        at = self.after.get(tuple(self.history[-2:]))
        return [] if at is None or self.hits < LEAST_HITS else self.history[at : at + most]

    def remember(self, token: int) -> None:
        """Adds a token to what drafts are made of."""
        if self.after is not None:
            if len(self.history) >= 2:  # what the last two say of themselves comes with the next
                self.after[tuple(self.history[-2:])] = len(self.history)
            self.history.append(token)
