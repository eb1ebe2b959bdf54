"""llguidance with our vocabularies: its tokenizer, a compiled grammar, and the mask of one
completion.

Knows llguidance's interface. Refuses to know harmony, JSON schemas and generation. Control tokens
are what llguidance calls special tokens: a grammar names them by id, no text matches them.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gptoss_jax.chat.grammar_trial import LIMITS, first_line
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance


class CompiledGrammar:
    """A grammar (llguidance's JSON), ready to be followed from its beginning any number of times.

    What is followed shares one lexer, whose states add up to a limit, and which is lost for all if
    llguidance panics in one: `again` then makes a new one.

    Raises:
      GptOssError: llguidance refuses the grammar.
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer):
        self._grammar, self._vocabulary = grammar, _vocabulary(tokenizer)
        self._first = self._compile()

    def start(self) -> "llguidance.LLMatcher":
        return self._first.deep_copy()

    def again(self, tokens: Sequence[int]) -> "llguidance.LLMatcher":
        """The state after the tokens, with nothing remembered; this becomes the one that others
        start from.
        """
        self._first = self._compile()
        matcher = self.start()
        matcher.try_consume_tokens(list(tokens))
        return matcher

    def _compile(self) -> "llguidance.LLMatcher":
        import llguidance as ll

        limits = ll.LLParserLimits(**LIMITS)
        matcher = ll.LLMatcher(self._vocabulary, self._grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GptOssError(f"the grammar is not possible: {first_line(matcher.get_error())}")
        return matcher


class CompletionMask:
    """Which tokens may come next in one completion (batching.TokenMask). Not for several threads
    at once.
    """

    def __init__(self, grammar: CompiledGrammar, tokenizer: Tokenizer):
        self.error: str | None = None  # why nothing can follow
        self._grammar, self._matcher = grammar, grammar.start()
        self._words = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        self._filled = self._over = False
        self._stops = tokenizer.stop_ids
        self._taken: list[int] = []

    def fill(self, allowed: np.ndarray) -> None:
        """Writes which tokens may come next: bit t % 32 of allowed[t // 32]. Where only one text
        can follow, its usual tokens; after the completion's stop token, stop tokens; none where the
        grammar takes too long to work out (`error` says so).

        Args:
          allowed: uint32 [words], words at least ceil(V / 32).
        """
        if allowed.dtype != np.uint32 or allowed.ndim != 1:
            raise ValueError(f"expected uint32 [words], got {allowed.dtype} {allowed.shape}")
        if not self._filled:
            self._work_out()
        allowed[: self._words.size] = self._words
        allowed[self._words.size :] = 0

    def accept(self, token: int) -> bool:
        """Takes the next token; False, and no change, if it is not allowed. Takes an unusual token
        for what must follow, too.
        """
        if self._over:
            return token in self._stops
        taken = self._take(token)
        if not taken and self.error is None:
            # llguidance refuses silently, too, when its lexer is full; the mask tells which it is
            if not self._filled:
                self._work_out()
            if self._words[token // 32] >> np.uint32(token % 32) & 1:
                self._matcher = self._grammar.again(self._taken)
                taken = self._take(token)
        return taken

    def _take(self, token: int) -> bool:
        if self._matcher.try_consume_tokens([token]) != 1:
            return False
        self._taken.append(token)
        self._filled = False
        self._over = self._matcher.is_stopped() and not self._matcher.is_error()
        return True

    def _work_out(self) -> None:
        """The words for the state that it is in."""
        self._filled = True
        if self._over:
            self._words[:] = 0
            for token in self._stops:
                self._words[token // 32] |= np.uint32(1 << token % 32)
            return
        if not self._compute():
            self._matcher = self._grammar.again(self._taken)
            if not self._compute():
                self._words[:] = 0
                reason = first_line(self._matcher.get_error() or self._matcher.stop_reason())
                self.error = f"the grammar cannot go on here ({reason}): make it simpler"

    def _compute(self) -> bool:
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        return not (matcher.is_error() or matcher.is_stopped())


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> "llguidance.LLTokenizer":
    """llguidance's view of the tokenizer: 1.3 s for the full vocabulary, milliseconds for a pruned
    one.
    """
    import llguidance as ll

    class Vocabulary:
        eos_token_id = tokenizer.special["<|endoftext|>"]  # never part of a grammar of ours
        bos_token_id = None
        tokens = tuple(tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size))
        special_token_ids = tuple(sorted(tokenizer.special.values()))

        def __call__(self, text: bytes | str) -> list[int]:
            return tokenizer.encode(text.decode() if isinstance(text, bytes) else text)

    return ll.LLTokenizer(ll.TokenizerWrapper(Vocabulary()))
