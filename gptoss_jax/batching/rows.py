"""All rows of an engine on the device, and its programs bound to one model.

The engine's thread alone calls them; each returns at once, with arrays that will be there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import sharding
from gptoss_jax.batching import choices, pages, slots
from gptoss_jax.batching.sizes import Sizes
from gptoss_jax.engine import Model
from gptoss_jax.sampling import Sampling

SHORT = (32, 64)  # shorter chunks are compiled too, for the ends of prompts
TOP = 20  # most likeliest tokens that a request may ask for


class Rows:
    """The rows and the pages of the prefix cache.

    Args:
      model: Whose programs they are.
      sizes: Of everything.
    """

    def __init__(self, model: Model, sizes: Sizes):
        self.model, self.sizes = model, sizes
        self.widths = (*(n for n in SHORT if n < sizes.chunk), sizes.chunk)
        self._everything = self._put(self.all_allowed(), "B_")
        self._tables = slots.tables(model.adapters, lambda x: self._put(x, "__"))
        self.reset()

    def reset(self) -> None:
        """All rows free, all pages empty."""
        config, sizes = self.model.config, self.sizes
        dtype = jnp.dtype(self.model.params["embedding"].dtype)
        shape = sizes.rows, sizes.context, sizes.back
        self._slots = self._run(slots.make, config, *shape, dtype)
        self._pool = self._run(pages.make, config, max(sizes.pages, 1), sizes.chunk, dtype)

    def all_allowed(self) -> np.ndarray:
        """A mask for all rows that allows all tokens, to be written to."""
        words = -(-self.model.config.vocab_size // 32)
        return np.full((self.sizes.rows, words), 0xFFFFFFFF, np.uint32)

    def read(self, slot: int, done: int, part: np.ndarray, adapter: int) -> jax.Array:
        """Reads a chunk of a prompt into a row; gives something small to wait for."""
        ids = np.zeros((1, self.width(len(part))), np.int32)
        ids[0, : len(part)] = part
        place = _integers(slot, done, len(part), adapter)
        self._slots, wait = self._with_model(slots.read, ids, place, self._tables)
        return wait

    def width(self, count: int) -> int:
        """Tokens that a chunk of `count` costs."""
        return next(n for n in self.widths if n >= count)

    def restore(self, slot: int, page: int, end: int) -> None:
        """Copies a page to where it ends in a row."""
        place, size = _integers(slot, page, end), self.sizes.chunk
        self._slots = self._run(
            pages.restore, self._slots, self._pool, place, config=self.model.config, size=size
        )

    def save(self, slot: int, page: int, end: int) -> None:
        """Copies the newest chunk of a row into a page."""
        place, size = _integers(slot, page, end), self.sizes.chunk
        self._pool = self._run(
            pages.save, self._pool, self._slots, place, config=self.model.config, size=size
        )

    def copy(self, source: int, target: int) -> None:
        """Copies the cache of a row."""
        self._slots = self._run(slots.copy, self._slots, _integers(source, target))

    def admit(
        self, slot: int, prompt: np.ndarray, s: Sampling, choice: int, seed: int, adapter: int
    ) -> None:
        """Lets a row generate."""
        V = self.model.config.vocab_size
        given = slots.start(slot, prompt, s, choice, seed, adapter, V)
        self._slots = self._run(slots.admit, self._slots, given)

    def advance(self) -> jax.Array:
        """Reads the last token of every row that generates; gives the logits [B, V]."""
        self._slots, logits = self._with_model(choices.advance, self._tables)
        return logits

    def choose(self, logits: jax.Array, allowed: np.ndarray | None = None) -> jax.Array:
        """Chooses every row's next token [B]."""
        mask = self._everything if allowed is None else allowed
        self._slots, tokens = self._run(choices.choose, self._slots, logits, mask)
        return tokens

    def check_drafts(self, table: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Reads the last tokens and drafted ones int32 [B, D], and chooses; gives the logits [B, T,
        V] and the tokens [B, T].
        """
        self._slots, logits = self._with_model(choices.advance_drafts, table, self._tables)
        self._slots, tokens = self._run(
            choices.choose_drafts, self._slots, logits, table, self._everything
        )
        return logits, tokens

    def redo(self, logits: jax.Array, allowed, length_B, back_B) -> jax.Array:
        """Takes rows back and chooses again."""
        self._slots, tokens = self._run(
            choices.redo, self._slots, logits, allowed, length_B, back_B
        )
        return tokens

    def pick(self, logits: jax.Array, at_B: np.ndarray) -> jax.Array:
        """Logits [B, V] of one column for each row."""
        return self._run(choices.pick, logits, at_B)

    def reports(self, logits: jax.Array, tokens: jax.Array) -> list[Any]:
        """Log probabilities of tokens [B] or [B, T], and of the likeliest, for each column."""
        if logits.ndim == 2:
            return [self._run(choices.report, logits, tokens, top=TOP)]
        found = []
        for i in range(logits.shape[1]):
            column = self.pick(logits, np.full(self.sizes.rows, i, np.int32)), tokens[:, i]
            found.append(self._run(choices.report, *column, top=TOP))
        return found

    def release(self, slot: int, broken: bool = False) -> None:
        """Frees a row; a broken one is erased."""
        if broken:
            self._slots = self._run(slots.erase, self._slots, np.int32(slot))
        free = np.zeros(self.sizes.rows, bool)
        free[slot] = True
        self._slots = self._run(slots.release, self._slots, free)

    def warm_up(self) -> None:
        """Compiles every program; blocks. All rows must be free."""
        B = self.sizes.rows
        for width in self.widths:
            self.read(0, 0, np.zeros(width, np.int32), 0)
        self.save(0, 0, self.sizes.chunk)
        self.restore(0, 0, self.sizes.chunk)
        self.admit(0, np.zeros(1, np.int32), Sampling(), 0, 0, 0)
        self.copy(0, B - 1)
        logits = self.advance()
        none = np.zeros(B, np.int32)
        for allowed in (None, self.all_allowed()):
            self.reports(logits, self.choose(logits, allowed))
        self.redo(logits, self.all_allowed(), none, none)
        if self.sizes.drafts:
            several, tokens = self.check_drafts(np.zeros((B, self.sizes.drafts), np.int32))
            self.reports(several, tokens)
            self.redo(self.pick(several, none), self.all_allowed(), none, none)
        self.release(0, broken=True)
        jax.block_until_ready(self._slots)

    def _with_model(self, program, *arguments) -> Any:
        """A program that takes the parameters and the rows, and donates the rows."""
        return self._run(
            program, self.model.params, self._slots, *arguments, config=self.model.config
        )

    def _run(self, program, *arguments, **keywords) -> Any:
        return self.model._on_mesh(program, *arguments, **keywords)

    def _put(self, x: np.ndarray, letters: str) -> jax.Array:
        if self.model.mesh is None:
            return jnp.asarray(x)
        return sharding.put(x, letters, self.model.mesh)


def _integers(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)
