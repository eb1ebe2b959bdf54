"""What a generation gives: pieces and completions, made of ids as they come."""

import dataclasses
from collections.abc import Callable, Sequence

from gptoss_jax.sampling import Sampling
from gptoss_jax.stops import StopStrings
from gptoss_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token and of the likeliest ones at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished generation.

    Attributes:
      text: Decoded tokens.
      tokens: Ids, without what stopped it.
      logprobs: One a token, or None.
      finish_reason: "stop", or "length" when max_new_tokens or the context ended it.
      stop: The token id or string that stopped it, or None.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    stop: int | str | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a stream: new text and tokens; finish_reason and stop are set in the last one."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop: int | str | None = None


class Reader:
    """Turns the ids of one generation into pieces, as they come: text, stops, log probabilities.

    Args:
      tokenizer: Decodes the ids.
      stops: Strings that end the text.
      sampling: Says whether log probabilities are wanted, and of how many.
      limit: Most ids.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], sampling: Sampling, limit: int):
        self.text = StopStrings(tokenizer, stops)
        self.wanted = sampling.logprobs or sampling.top_logprobs > 0
        self.top, self.limit = sampling.top_logprobs, limit
        self.made, self.finished = 0, False
        self.held: list[TokenLogprob] = []

    def read(
        self, tokens: Sequence[int], ended: bool, logprob: Callable[[int], TokenLogprob]
    ) -> Piece:
        """The piece that new ids make.

        Args:
          tokens: Ids in order; what lies beyond the limit is dropped.
          ended: The last of them is a stop token.
          logprob: Of the id in this place; called only if wanted.

        Returns:
          The piece; with a finish_reason if the generation is over.
        """
        reason, stop, text, given = None, None, "", []
        for column, token in enumerate(tokens[: self.limit - self.made]):
            self.made += 1
            if ended and column == len(tokens) - 1:
                reason, stop = "stop", token
                break
            if self.wanted:
                self.held.append(logprob(column))
            new_text, new_tokens, found = self.text.feed(token)
            text, given = text + new_text, given + new_tokens
            if found is not None:
                reason, stop = "stop", found
                break
        if reason is None and self.made >= self.limit:
            reason = "length"
        if reason is not None:
            self.finished = True
            if not isinstance(stop, str):
                new_text, new_tokens = self.text.flush()
                text, given = text + new_text, given + new_tokens
        logprobs = None
        if self.wanted:
            logprobs, self.held = self.held[: len(given)], self.held[len(given) :]
        return Piece(text, given, logprobs, reason, stop)


def join(pieces: Sequence[Piece]) -> Completion:
    """The completion whose pieces these are, to the last."""
    logprobs = (
        None if pieces[-1].logprobs is None else [x for p in pieces for x in p.logprobs or ()]
    )
    tokens = [t for p in pieces for t in p.tokens]
    last = pieces[-1]
    return Completion(
        "".join(p.text for p in pieces), tokens, logprobs, last.finish_reason or "length", last.stop
    )
