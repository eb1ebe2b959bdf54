"""From a folder to (config, params) and back: safetensors in three layouts, and Orbax.

Reads per shard: a process touches only the bytes of the slices it holds. Knows the parameter tree and files; knows no
network, no mesh (it is given shardings) and nothing of what the parameters compute.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoint.source import Source, open_source
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.hf_names import Leaf
from gptoss_jax.hf_names import Path as ParamPath
from gptoss_jax.mxfp4 import MxTensor

MANIFEST = "manifest.json"
Shardings = Callable[[ParamPath, str], jax.sharding.Sharding]
Progress = Callable[[str, int], None]


def load_params(
    path: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    shardings: Shardings | None = None,
    progress: Progress | None = None,
) -> tuple[GptOssConfig, dict[str, Any]]:
    """Loads a checkpoint of any layout.

    Floating point parameters are cast to `dtype`; MXFP4 experts stay packed, as MxTensor.

    Args:
      path: Local folder: Hugging Face's layout (MXFP4 or bfloat16), OpenAI's original one, or ours (Orbax).
      dtype: bfloat16 or float32.
      shardings: Called with a parameter's path and letters, for example (("layers", 0, "mlp", "gate_up", "blocks"),
        "EFPUY"); gives its sharding. None puts everything on the default device.
      progress: Called with a parameter's name and its bytes after each one is there.

    Returns:
      The config and the parameter tree.

    Raises:
      GptOssError: The folder holds no checkpoint, or a damaged one; nothing has been put on a device then, unless a
        scale turns out to be NaN or a file changes while it is read.
    """
    folder = local_folder(path)
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(jnp.bfloat16), np.dtype(jnp.float32)):
        raise GptOssError(f"dtype {dtype.name!r}: parameters are held in 'bfloat16' or 'float32'")
    if (folder / MANIFEST).exists():
        from gptoss_jax.checkpoint import store

        return store.load(folder, dtype=dtype, shardings=shardings, progress=progress)
    source = open_source(folder)
    source.check()
    arrays = {}
    for leaf in source.leaves:
        arrays[leaf.path] = _place(
            source, leaf, np.dtype(np.uint8) if leaf.packed else dtype, shardings
        )
        if progress:
            progress(leaf.name, arrays[leaf.path].nbytes)
    return source.config, tree(arrays)


def local_folder(path: str | Path) -> Path:
    """The folder as a Path.

    Raises:
      GptOssError: It is not a folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise GptOssError(f"{folder}: no such folder")
    return folder


def tree(arrays: dict[ParamPath, Any]) -> dict[str, Any]:
    """The nested parameter tree of arrays by path; blocks and scales become an MxTensor."""
    root: dict[Any, Any] = {}
    for path, array in arrays.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return _join(root)


def _join(node):
    if not isinstance(node, dict):
        return node
    if node.keys() == {"blocks", "scales"}:
        return MxTensor(**node)
    return {key: _join(child) for key, child in node.items()}


def _place(source: Source, leaf: Leaf, dtype: np.dtype, shardings: Shardings | None) -> jax.Array:
    """One parameter on its devices; each process reads the slices of its own devices, each slice once."""
    if shardings is None:
        return jnp.asarray(source.read(leaf).astype(dtype, copy=False))
    read: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)
        if key not in read:
            read[key] = np.ascontiguousarray(source.read(leaf, index).astype(dtype, copy=False))
        return read[key]

    return jax.make_array_from_callback(
        leaf.shape, shardings(leaf.path, leaf.letters), part, dtype=dtype
    )
