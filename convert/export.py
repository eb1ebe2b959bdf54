"""Hugging Face's layout, written as a stream: shards of at most 5 GB, index and configs."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gptoss_jax import hf_names, tokenizer
from gptoss_jax.checkpoint import safetensors_file
from gptoss_jax.checkpoint.source import INDEX, write_config
from gptoss_jax.checkpoint.stored import Stored
from gptoss_jax.config import GptOssConfig

SHARD_BYTES = 5_000_000_000
# What other programs need beside the tensors; meaningless once the vocabulary is pruned.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
LICENCES = ("LICENSE", "LICENSE.txt", "USAGE_POLICY")


def write(
    folder: Path,
    config: GptOssConfig,
    arrays: list[Stored],
    *,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Writes a model into an empty folder, with the tensors that transformers and vLLM read.

    Args:
      folder: From `new_folder`.
      config: The model's config.
      arrays: Its parameters; blocks and scales make it the MXFP4 layout, otherwise experts are
        transposed to [E, D, 2F] and [E, F, D].
      progress: Called with a parameter's name and bytes when it is written.
    """
    by_path = {array.path: array for array in arrays}
    packed = any(path[-1] == "blocks" for path in by_path)
    leaves = hf_names.leaves(config, "mxfp4" if packed else "bfloat16")
    shards: list[list[hf_names.Leaf]] = [[]]
    used = 0
    for leaf in leaves:
        nbytes = by_path[leaf.path].nbytes
        if shards[-1] and used + nbytes > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(leaf)
        used += nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if shards[1:] else "model.safetensors"
        entries = [(leaf.tensor, by_path[leaf.path].dtype, leaf.tensor_shape) for leaf in shard]
        safetensors_file.write(folder / name, entries, _pieces(shard, by_path, progress))
        weight_map |= {leaf.tensor: name for leaf in shard}
    if shards[1:]:
        size = sum(by_path[leaf.path].nbytes for leaf in leaves)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    write_config(folder, config, quantized=packed)


def copy_companions(source: Path, folder: Path, kept: list[int] | None) -> None:
    """Copies the tokenizer's files and licences of a checkpoint.

    Args:
      source: Its folder.
      folder: The new one.
      kept: Ids that the vocabulary is pruned to; None for the whole one.
    """
    for name in (*(COMPANIONS if kept is None else ()), *LICENCES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if kept is not None:
        tokenizer.write_kept(folder / tokenizer.KEPT_FILE, kept)


def _pieces(leaves, by_path, progress) -> Iterator[np.ndarray]:
    for leaf in leaves:
        for _, piece in by_path[leaf.path].pieces():
            yield leaf.to_file(piece)
        if progress:
            progress(leaf.name, by_path[leaf.path].nbytes)
