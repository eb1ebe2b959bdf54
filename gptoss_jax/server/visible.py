"""The text that a user sees, as it comes: stop strings never shown, log probabilities kept with
their text.

Knows text and the tokens it came of. Refuses to know channels.
"""

import dataclasses
from collections.abc import Sequence

from gptoss_jax.completions import TokenLogprob
from gptoss_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Visible:
    """What may be shown now, the log probabilities of the tokens that end in it, and the stop
    string that ends it all, if one was found."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    stop: str | None = None


class VisibleText:
    """Holds back what may become a stop string, and gives log probabilities with the text of their
    tokens.

    Args:
      tokenizer: Says what the tokens' bytes are.
      stops: Strings that end the text; may be empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._special = frozenset(tokenizer.special.values())
        self._tokens: list[tuple[TokenLogprob, bytes]] = []  # their text has not come yet
        self._text = ""  # held back
        self._held: list[tuple[TokenLogprob, int]] = []  # characters of it known after the token

    def token(self, token: int, logprob: TokenLogprob) -> None:
        """A token whose text comes with one of the next calls of feed."""
        if token not in self._special:
            self._tokens.append((logprob, self._tokenizer.decode_bytes([token])))

    def forget(self) -> None:
        """The tokens so far were no text."""
        self._tokens.clear()

    def feed(self, text: str) -> Visible:
        """Takes new text; what may be shown now."""
        before = len(self._text)
        self._text += text
        self._held += [(logprob, before + end) for logprob, end in self._match(text)]
        found = [(at, stop) for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            return dataclasses.replace(self._take(at), stop=stop)
        kept = max(
            (n for s in self._stops for n in range(1, len(s)) if self._text.endswith(s[:n])),
            default=0,
        )
        return self._take(len(self._text) - kept)

    def flush(self) -> Visible:
        """What is still held back, at the end of a text that no stop string ended."""
        return self._take(len(self._text))

    def _take(self, count: int) -> Visible:
        text, self._text = self._text[:count], self._text[count:]
        shown = tuple(logprob for logprob, end in self._held if end <= count)
        self._held = [(logprob, end - count) for logprob, end in self._held if end > count]
        return Visible(text, shown)

    def _match(self, text: str) -> list[tuple[TokenLogprob, int]]:
        """The waiting tokens that the text came of, each with the characters known after it.

        The text of a header that turned out to be an answer is a part of what its tokens spell.
        """
        waiting, self._tokens = self._tokens, []
        whole, wanted = b"".join(data for _, data in waiting), text.encode("utf-8", "replace")
        start = whole.rfind(wanted)
        if start < 0:  # bytes that are no text
            return [(logprob, len(text)) for logprob, _ in waiting]
        out, at = [], -start
        for logprob, data in waiting:
            begin, at = at, at + len(data)
            if at > 0 and begin < len(wanted):
                known = wanted[:at].decode("utf-8", "ignore")
                out.append((logprob, len(known)))
        return out
