"""A smaller vocabulary: the rows of both embeddings that are kept, and the config for them."""

import dataclasses

import numpy as np

from gptoss_jax.checkpoint.stored import Stored
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError

WINDOW = 4096


def prune(
    config: GptOssConfig, arrays: list[Stored], wanted: list[int], kept: list[int] | None = None
) -> tuple[GptOssConfig, list[Stored], list[int]]:
    """Keeps some rows of the vocabulary.

    Args:
      config: Of the source.
      arrays: Of the source.
      wanted: o200k_harmony ids to keep, ascending.
      kept: o200k_harmony ids of the source's rows if it is pruned already.

    Returns:
      The config with the new vocabulary (eos and pad renumbered), the arrays, and the ids of the
      new rows.

    Raises:
      GptOssError: The source has no row for an id, or an eos or pad id is not kept.
    """
    row_of = {token: row for row, token in enumerate(kept)} if kept is not None else None
    rows = []
    for token in wanted:
        row = token if row_of is None else row_of.get(token, config.vocab_size)
        if row >= config.vocab_size:
            raise GptOssError(
                f"token {token} is to be kept, but the source's vocabulary of {config.vocab_size} "
                "does not have it"
            )
        rows.append(row)
    if rows != sorted(set(rows)):
        raise GptOssError("the ids to keep do not ascend")
    renumbered = {row: number for number, row in enumerate(rows)}
    for name, ids in (("eos", config.eos_token_ids), ("pad", (config.pad_token_id,))):
        missing = [row for row in ids if row not in renumbered]
        if missing:
            raise GptOssError(
                f"the {name} token, row {missing[0]} of the source, is not kept: add it"
            )
    config = dataclasses.replace(
        config,
        vocab_size=len(rows),
        eos_token_ids=tuple(renumbered[row] for row in config.eos_token_ids),
        pad_token_id=renumbered[config.pad_token_id],
    )
    index = np.asarray(rows)
    found = [
        _selected(array, index) if array.path in (("embedding",), ("unembedding",)) else array
        for array in arrays
    ]
    return config, found, list(wanted)


def _selected(array: Stored, index: np.ndarray) -> Stored:
    """An array of chosen rows, read through windows, so that runs of rows cost one read."""

    def read(rows: slice) -> np.ndarray:
        chosen = index[rows]
        found = []
        for window in np.unique(chosen // WINDOW):
            inside = chosen[chosen // WINDOW == window]
            span = slice(int(inside[0]), int(inside[-1]) + 1)
            found.append(array.read(span)[inside - span.start])
        return np.concatenate(found)

    return Stored(array.path, (len(index), *array.shape[1:]), array.dtype, read)
