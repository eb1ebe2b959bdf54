"""Stand-ins for a model in tests of what lies above it."""

import dataclasses
import re

from gptoss_jax.tokenizer import Tokenizer, load_tokenizer

_PARTS = re.compile(r"(<\|[a-z_0-9]+\|>)")


def harmony_ids(text: str, tokenizer: Tokenizer | None = None) -> list[int]:
    """Text in which control tokens stand by name -> ids."""
    tokenizer = tokenizer or load_tokenizer()
    out: list[int] = []
    for part in _PARTS.split(text):
        special = part in tokenizer.special
        out += [tokenizer.special[part]] if special else tokenizer.encode(part)
    return out


@dataclasses.dataclass
class Piece:
    tokens: list[int]
    text: str = ""
    finish_reason: str | None = None
    stop: int | None = None


class ScriptedModel:
    """Replays given completions, one a call of `stream`, as the engine does: the stop token is in
    the last piece's stop.

    `scripts` are texts with control tokens by name, or ids. Records `prompts` and `settings`.
    Honours max_new_tokens and the stop token ids of the sampling settings, as the engine would.
    """

    def __init__(
        self, *scripts: str | list[int], tokenizer: Tokenizer | None = None, piece: int = 3
    ):
        self.tokenizer = tokenizer or load_tokenizer()
        self.scripts = [
            harmony_ids(script, self.tokenizer) if isinstance(script, str) else list(script)
            for script in scripts
        ]
        self.piece = piece
        self.prompts: list[list[int]] = []
        self.settings: list[object] = []

    def stream(self, prompt, sampling=None, max_new_tokens=None, stop=()):
        self.prompts.append(list(prompt))
        self.settings.append(sampling)
        if not self.scripts:
            raise AssertionError("the script is at its end, but the model is asked again")
        ids = self.scripts.pop(0)
        stops = set(sampling.stop_token_ids) if sampling is not None else set()
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        limit = len(ids) if max_new_tokens is None else min(max_new_tokens, len(ids))
        stopped = end is not None and end < limit
        ids, last = (ids[:end], ids[end]) if stopped else (ids[:limit], None)
        for at in range(0, len(ids), self.piece):
            part = ids[at : at + self.piece]
            yield Piece(part, self.tokenizer.decode(part))
        yield Piece([], finish_reason="stop" if stopped else "length", stop=last)
