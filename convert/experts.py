"""Experts packed and unpacked on the way from one checkpoint to another, an expert at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptoss_jax import hf_names, mxfp4
from gptoss_jax.checkpoint.stored import Stored

BF16 = np.dtype(ml_dtypes.bfloat16)


def unpack(arrays: list[Stored]) -> list[Stored]:
    """MXFP4 experts as bfloat16, exactly; other arrays as they are.

    Args:
      arrays: A model with blocks and scales.

    Returns:
      The model with one array in the place of each pair.
    """
    by_path = {array.path: array for array in arrays}
    found = []
    for array in arrays:
        if array.path[-1] == "blocks":
            found.append(_unpacked(array, by_path[*array.path[:-1], "scales"]))
        elif array.path[-1] != "scales":
            found.append(array)
    return found


def _unpacked(blocks: Stored, scales: Stored) -> Stored:
    def read(rows: slice) -> np.ndarray:
        return mxfp4.unpack(blocks.read(rows), scales.read(rows)).astype(BF16)

    shape = (*scales.shape[:-1], scales.shape[-1] * mxfp4.BLOCK)
    return Stored(blocks.path[:-1], shape, BF16, read)


def pack(arrays: list[Stored]) -> list[Stored]:
    """bfloat16 experts as MXFP4 by the search of `mxfp4.encode`; other arrays as they are.

    Args:
      arrays: A model with unpacked experts.

    Returns:
      The model with blocks, then scales, in the place of each. Reading them raises GptOssError
      where values are not finite.

    Raises:
      GptOssError: A row cannot be cut into blocks.
    """
    found = []
    for array in arrays:
        found += _packed(array) if array.path[-1] in ("gate_up", "down") else [array]
    return found


def _packed(array: Stored) -> list[Stored]:
    mxfp4.check_blocks(array.shape)

    def one(row: int) -> mxfp4.MxTensor:
        return encoded(array.read(slice(row, row + 1)), f"{named(array.path)}, expert {row}")

    return packed_by(array.path, array.shape, one)


def encoded(values: np.ndarray, name: str) -> mxfp4.MxTensor:
    """Values packed on the device.

    Args:
      values: [..., I], I a multiple of 32.
      name: For the message.

    Returns:
      MxTensor of numpy arrays.

    Raises:
      GptOssError: A value is not finite.
    """
    tensor, finite = _encode(jnp.asarray(values))
    mxfp4.check_finite(finite, name)
    return jax.tree.map(np.asarray, tensor)


@jax.jit
def _encode(x: jax.Array) -> tuple[mxfp4.MxTensor, jax.Array]:
    return mxfp4.encode(x), jnp.isfinite(x).all()


def named(path: hf_names.Path) -> str:
    """A parameter's path as messages and reports have it."""
    return ".".join(map(str, path))


def packed_by(
    path: hf_names.Path, shape: tuple[int, ...], packed: Callable[[int], mxfp4.MxTensor]
) -> list[Stored]:
    """Blocks and scales of an array, made an expert at a time.

    Args:
      path: Of the array.
      shape: Of its values, experts first.
      packed: Gives expert i, [1, ...]. Called once for each if blocks are read before scales, as
        writers do: scales are remembered until they are asked for.
    """
    scales: dict[int, np.ndarray] = {}
    units = shape[-1] // mxfp4.BLOCK

    def read_blocks(rows: slice) -> np.ndarray:
        found = []
        for row in range(rows.start, rows.stop):
            tensor = packed(row)
            scales[row] = np.asarray(tensor.scales)
            found.append(np.asarray(tensor.blocks))
        return np.concatenate(found)

    def read_scales(rows: slice) -> np.ndarray:
        found = range(rows.start, rows.stop)
        return np.concatenate(
            [scales.pop(row) if row in scales else np.asarray(packed(row).scales) for row in found]
        )

    lead, uint8 = shape[:-1], np.dtype(np.uint8)
    return [
        Stored((*path, "blocks"), (*lead, units, mxfp4.BYTES), uint8, read_blocks),
        Stored((*path, "scales"), (*lead, units), uint8, read_scales),
    ]
