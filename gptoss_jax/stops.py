"""Stop strings in a stream of tokens: never emitted, also when split over tokens or inside a
character.
"""

from collections.abc import Sequence

from gptoss_jax.tokenizer import Tokenizer


class StopStrings:
    """Decodes ids as they come and holds back what may become a stop string.

    Args:
      tokenizer: Decodes the ids.
      stops: Strings that end the text; may be empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.decoder, self.stops = tokenizer.decoder(), tuple(stops)
        self.text = ""  # not yet emitted
        self.tokens: list[
            tuple[int, int]
        ] = []  # not yet emitted: id, characters of self.text known after it

    def feed(self, token: int) -> tuple[str, list[int], str | None]:
        """Takes an id.

        Returns:
          Text and ids that may be emitted now, and the stop string if one was found; what follows
          it is dropped.
        """
        self.text += self.decoder.feed(token)
        self.tokens.append((token, len(self.text)))
        found = [(at, s) for s in self.stops if (at := self.text.find(s)) >= 0]
        if found:
            at, stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            return *self._emit(at, at), stop
        held = max(
            (n for s in self.stops for n in range(1, len(s)) if self.text.endswith(s[:n])),
            default=0,
        )
        return *self._emit(len(self.text) - held, len(self.text) - held), None

    def flush(self) -> tuple[str, list[int]]:
        """What is still held back, at the end of a completion that no stop string ended."""
        self.text += self.decoder.flush()
        text, tokens = self.text, [token for token, _ in self.tokens]
        self.text, self.tokens = "", []
        return text, tokens

    def _emit(self, count: int, known: int) -> tuple[str, list[int]]:
        """Emits `count` characters and the ids that end within them."""
        text = self.text[:count]
        tokens = [token for token, end in self.tokens if end <= known]
        self.tokens = [(token, end - count) for token, end in self.tokens if end > known]
        self.text = self.text[count:]
        return text, tokens
