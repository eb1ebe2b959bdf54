"""From a folder to (config, params) and back: safetensors in three layouts, and Orbax.

Reads per shard: a process touches only the bytes of the slices it holds. Knows the parameter tree
and files; knows no network, no mesh (it is given shardings) and nothing of what the parameters
compute.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.layout import Format

from gptoss_jax.checkpoint.source import Source, open_source
from gptoss_jax.checkpoint.stored import Stored, aligned, new_folder
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.hf_names import Leaf, leaves, nested
from gptoss_jax.hf_names import Path as ParamPath
from gptoss_jax.kernels.cpu import CompactMatrix, CpuExperts
from gptoss_jax.mxfp4 import MxTensor

if TYPE_CHECKING:  # importing Orbax takes a second, which other layouts need not spend
    from gptoss_jax.checkpoint.store import Store

MANIFEST = "manifest.json"
Shardings = Callable[[ParamPath, str], jax.sharding.Sharding | Format]
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
      path: Local folder: Hugging Face's layout (MXFP4 or bfloat16), OpenAI's original one, or ours
        (Orbax).
      dtype: bfloat16 or float32.
      shardings: Called with a parameter's path and letters, for example (("layers", 0, "mlp",
        "gate_up", "blocks"), "EFPUY"); gives its sharding. None puts everything on the default
        device.
      progress: Called with a parameter's name and its bytes after each one is there.

    Returns:
      The config and the parameter tree.

    Raises:
      GptOssError: The folder holds no checkpoint, or a damaged one; nothing has been put on a
        device then, unless a scale turns out to be NaN or a file changes while it is read.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(jnp.bfloat16), np.dtype(jnp.float32)):
        raise GptOssError(f"dtype {dtype.name!r}: parameters are held in 'bfloat16' or 'float32'")
    opened = open_checkpoint(path)
    opened.check()
    arrays = {}
    for leaf in opened.leaves:
        arrays[leaf.path] = _place(
            opened, leaf, np.dtype(np.uint8) if leaf.packed else dtype, shardings
        )
        if progress:
            progress(leaf.name, arrays[leaf.path].nbytes)
    return opened.config, tree(arrays)


def open_checkpoint(path: str | Path) -> "Source | Store":
    """Opens a checkpoint of any layout: reads its config and headers or manifest, no data.

    Args:
      path: Local folder.

    Returns:
      What it is; `check` has not been called.

    Raises:
      GptOssError: The folder holds no checkpoint, or one too damaged to be described.
    """
    folder = local_folder(path)
    if (folder / MANIFEST).exists():
        from gptoss_jax.checkpoint import store

        return store.open_store(folder)
    return open_source(folder)


def save_params(
    path: str | Path,
    config: GptOssConfig,
    params: dict[str, Any],
    *,
    overwrite: bool = False,
    source: str = "",
) -> None:
    """Saves a parameter tree in our layout (Orbax); the folder appears whole or not at all.

    In several processes all have to call it: process 0 writes, and needs host memory for the whole
    model, which comes to it array by array.

    Args:
      path: Folder to make.
      config: The model's config.
      params: The tree, MXFP4 experts as MxTensor; types are kept.
      overwrite: Replace a checkpoint that is there.
      source: Where the parameters come from, for the manifest.

    Raises:
      GptOssError: The folder exists, or the disk is full.
    """
    from gptoss_jax.checkpoint import store

    if jax.process_count() > 1:
        params = _at_first(params)
    if jax.process_index() == 0:
        arrays = stored_tree(params)
        _check_complete(config, arrays)
        needed = sum(array.nbytes for array in arrays)
        with new_folder(Path(path).expanduser(), overwrite=overwrite, needed=needed) as folder:
            store.write(folder, config, arrays, source=source)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("saved")


def _at_first(params: dict[str, Any]) -> dict[str, Any]:
    """The tree with its arrays whole in process 0's memory; in the others nothing of it is kept."""

    def whole(leaf):
        array = multihost_utils.process_allgather(leaf, tiled=True)
        return array if jax.process_index() == 0 else None

    return jax.tree.map(whole, params)


def _check_complete(config: GptOssConfig, arrays: list[Stored]) -> None:
    """Refuses to save what would not load."""
    packed = any(array.path[-1] == "blocks" for array in arrays)
    shapes = {array.path: array.shape for array in arrays}
    for leaf in leaves(config, "mxfp4" if packed else "bfloat16"):
        shape = shapes.pop(leaf.path, None)
        if shape is None:
            raise GptOssError(f"parameter {leaf.name} is missing: the tree is not of this config")
        if shape != leaf.shape:
            raise GptOssError(
                f"parameter {leaf.name} has shape {shape}, the config asks for {leaf.shape}"
            )
    if shapes:
        name = ".".join(map(str, min(shapes, key=str)))
        raise GptOssError(f"parameter {name} is none of gpt-oss's: the tree is not of this config")


def stored_tree(params: dict[str, Any]) -> list[Stored]:
    """The arrays of a parameter tree as what `store.write` and the exporters take."""
    found = []

    def add(path, leaf):
        array = leaf.released() if isinstance(leaf, CompactMatrix) else leaf
        found.append(
            Stored(path, array.shape, np.dtype(array.dtype), lambda rows: np.asarray(array[rows]))
        )

    def add_experts(path, leaf):
        """Released when they are read, some at a time."""
        for name, of in vars(jax.eval_shape(CpuExperts.released, leaf)).items():

            def read(rows, name=name):
                return np.asarray(getattr(leaf[rows].released(), name))

            found.append(Stored((*path, name), of.shape, np.dtype(of.dtype), read))

    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, CompactMatrix | CpuExperts)
    )
    for keys, leaf in leaves:
        path: Any = tuple(getattr(key, "key", getattr(key, "name", None)) for key in keys)
        (add_experts if isinstance(leaf, CpuExperts) else add)(path, leaf)
    return found


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
    return _join(nested(arrays))


def _join(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node.keys() == {"blocks", "scales"}:
        return MxTensor(**node)
    return {key: _join(child) for key, child in node.items()}


def _place(
    opened: "Source | Store", leaf: Leaf, dtype: np.dtype, shardings: Shardings | None
) -> jax.Array:
    """One parameter on its devices; a process reads the slices of its own, each once."""
    if shardings is None:
        return jax.device_put(_ready(opened.read(leaf), dtype)).block_until_ready()
    read: dict[str, np.ndarray] = {}

    def part(index: Any) -> Any:
        key = str(index)
        if key not in read:
            read[key] = _ready(opened.read(leaf, index), dtype)
        return read[key]

    sharding = shardings(leaf.path, leaf.letters)
    array = jax.make_array_from_callback(leaf.shape, sharding, part, dtype=dtype)
    return array.block_until_ready()  # otherwise host copies of many parameters wait for a device


def _ready(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array contiguous, aligned and of the type; itself if it is."""
    if array.dtype == dtype and array.flags.c_contiguous and array.ctypes.data % 64 == 0:
        return array
    out = aligned(array.shape, dtype)
    np.copyto(out, array, casting="unsafe")
    return out
