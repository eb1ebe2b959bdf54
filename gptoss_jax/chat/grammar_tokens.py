"""llguidance with our vocabularies: its tokenizer, a compiled grammar, and the mask of one
completion.

Knows llguidance's interface. Refuses to know harmony, JSON schemas and generation. Control tokens
are what llguidance calls special tokens: a grammar names them by id, no text matches them.
"""

import functools
from typing import TYPE_CHECKING

import numpy as np

from gptoss_jax.chat.grammar_trial import LIMITS, first_line
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance


class CompletionMask:
    """Which tokens may come next in one completion (batching.TokenMask). Not for several threads
    at once.
    """

    def __init__(self, matcher: "llguidance.LLMatcher", tokenizer: Tokenizer):
        self._matcher = matcher
        self._stops = tokenizer.stop_ids
        self._words = -(-tokenizer.vocab_size // 32)
        self._over = False

    def fill(self, allowed: np.ndarray) -> None:
        """Writes which tokens may come next: bit t % 32 of allowed[t // 32]. After the completion's
        stop token only stop tokens are.

        Args:
          allowed: uint32 [words], words at least ceil(V / 32), contiguous.

        Raises:
          GptOssError: The grammar has come to a state that takes too long to work out, or in which
            it has nothing to say.
        """
        if allowed.dtype != np.uint32 or allowed.ndim != 1 or not allowed.flags.c_contiguous:
            raise ValueError(
                f"expected contiguous uint32 [words], got {allowed.dtype} {allowed.shape}"
            )
        if self._over:
            allowed[:] = 0
            for token in self._stops:
                allowed[token // 32] |= np.uint32(1 << token % 32)
            return
        words = allowed[: self._words]
        allowed[self._words :] = 0
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error() or self._matcher.is_stopped():
            raise GptOssError(
                "the grammar cannot go on here: "
                f"{first_line(self._matcher.get_error() or self._matcher.stop_reason())}: make it "
                "simpler"
            )

    def accept(self, token: int) -> bool:
        """Takes the next token; False, and no change, if it is not allowed."""
        if self._over:
            return token in self._stops
        if self._matcher.try_consume_tokens([token]) != 1:
            return False
        self._over = self._matcher.is_stopped() and not self._matcher.is_error()
        return True


def compile_grammar(grammar: str, tokenizer: Tokenizer) -> "llguidance.LLMatcher":
    """llguidance's matcher at the start of the grammar (its JSON); copy it for each use.

    Raises:
      GptOssError: llguidance refuses the grammar.
    """
    import llguidance as ll

    vocabulary = _vocabulary(tokenizer)
    matcher = ll.LLMatcher(vocabulary, grammar, log_level=0, limits=ll.LLParserLimits(**LIMITS))
    if matcher.is_error():
        raise GptOssError(f"the grammar is not possible: {first_line(matcher.get_error())}")
    return matcher


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> "llguidance.LLTokenizer":
    """llguidance's view of the tokenizer: 1.3 s for the full vocabulary, milliseconds for a pruned
    one.
    """
    try:
        import llguidance as ll
    except ImportError:
        raise GptOssError(
            "structured output needs llguidance: pip install 'gptoss_jax[serve]'"
        ) from None

    class Vocabulary:
        eos_token_id = tokenizer.special["<|endoftext|>"]  # never part of a grammar of ours
        bos_token_id = None
        tokens = tuple(tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size))
        special_token_ids = tuple(sorted(tokenizer.special.values()))

        def __call__(self, text: bytes | str) -> list[int]:
            return tokenizer.encode(text.decode() if isinstance(text, bytes) else text)

    return ll.LLTokenizer(ll.TokenizerWrapper(Vocabulary()))
