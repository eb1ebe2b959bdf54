"""An adapter merged into its base, written in Hugging Face's layout, a weight at a time.

Experts in MXFP4 are the difficult part: an addition much smaller than a block's step is lost when
the sum is rounded. They are copied byte for byte when the adapter leaves them alone, and rounded
only on demand, with a report of what was kept. Knows arrays at rest and an adapter in memory.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from gptoss_jax.convert import export
from gptoss_jax.convert.experts import encoded, named, packed_by, unpack

from gptoss_jax import adapters, checkpoint, lora, mxfp4, tokenizer
from gptoss_jax.adapters.form import Adapter
from gptoss_jax.checkpoint.source import GENERATION
from gptoss_jax.checkpoint.stored import Stored, new_folder
from gptoss_jax.errors import GptOssError
from gptoss_jax.lora import EXPERTS
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.ops.experts import merged


@dataclasses.dataclass(frozen=True)
class Kept:
    """What rounding to MXFP4 left of an adapter's change of the experts.

    Attributes:
      change: Projection of the change that was kept on the change that was wanted, as a share of
        it: 1 if rounding kept it on average, 0 if nothing of it is left.
      error: Norm of (rounded - wanted) relative to the norm of the wanted weights.
      size: Norm of the wanted change relative to the norm of the wanted weights.
      weights: The same three for each weight, by name.
    """

    change: float
    error: float
    size: float
    weights: dict[str, tuple[float, float, float]]


def merge(
    source: str | Path,
    target: str | Path,
    adapter: str | Path,
    *,
    dtype: Literal["mxfp4", "bfloat16"] = "bfloat16",
    requantize: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
    total: Callable[[int], None] | None = None,
    notice: Callable[[str], None] = print,
) -> Kept | None:
    """Writes W + scale b a, summed in float32, for transformers, vLLM and others; the new folder
    appears whole or not at all.

    Args:
      source: Local folder of the base, in any layout.
      target: Folder to make.
      adapter: Folder of the adapter: ours, peft's, or a run.
      dtype: How the experts are held: "bfloat16", or "mxfp4".
      requantize: Round experts that the adapter changes (or that the base holds in bfloat16) to
        MXFP4: least squared error among three scales a block.
      overwrite: Replace a checkpoint at the target.
      progress: Called with a parameter's name and bytes after each.
      total: Called once with the number of bytes to come.
      notice: Called with a sentence that the user should see.

    Returns:
      What rounding left of the change; None if no expert was rounded.

    Raises:
      GptOssError: The adapter belongs to another base, experts would have to be rounded without
        `requantize`, the target exists, or the disk is full.
    """
    if dtype not in ("mxfp4", "bfloat16"):
        raise GptOssError(f"cannot hold experts in {dtype!r}: choose 'mxfp4' or 'bfloat16'")
    opened = checkpoint.open_checkpoint(source)
    opened.check()
    config = opened.config
    loaded = adapters.load(adapter, config, fingerprint=adapters.fingerprint_of(opened))
    pairs = dict(lora.pairs_of(loaded.tree))
    arrays = opened.arrays()
    packed = any(array.path[-1] == "blocks" for array in arrays)
    rounded = _experts_to_round(arrays, pairs) if dtype == "mxfp4" else []
    if rounded and not requantize:
        why = "the adapter changes experts" if packed else "the base holds experts in bfloat16"
        raise GptOssError(
            f"{why}, and rounding them to MXFP4 loses most of a small change: --dtype bfloat16, or "
            "serve the adapter beside its base, or --requantize (right for one that was trained "
            "quantization-aware)"
        )
    if loaded.lora.quantization_aware and dtype == "bfloat16":
        notice(
            "the adapter was trained for experts rounded to MXFP4: --dtype mxfp4 --requantize is "
            "what it computed with"
        )
    sums: dict[str, np.ndarray] = {}
    if dtype == "bfloat16":
        arrays = unpack(arrays) if packed else arrays
    else:
        arrays = _requantized(arrays, rounded, pairs, loaded, sums)
    arrays = [
        _added(array, pairs[array.path], loaded.lora.scale) if array.path in pairs else array
        for array in arrays
    ]
    kept_file = opened.folder / tokenizer.KEPT_FILE
    kept = tokenizer.read_kept(kept_file) if kept_file.exists() else None
    size = sum(array.nbytes for array in arrays)
    with new_folder(Path(target).expanduser(), overwrite=overwrite, needed=size) as folder:
        if total:
            total(size)
        export.write(folder, config, arrays, progress=progress)
        export.copy_companions(opened.folder, folder, kept)
        if (opened.folder / GENERATION).is_file():
            shutil.copyfile(opened.folder / GENERATION, folder / GENERATION)
    return _report(sums) if sums else None


def _experts_to_round(arrays: list[Stored], pairs: dict) -> list[tuple]:
    """Paths of the experts' weights whose bytes cannot stay as they are."""
    found = []
    for array in arrays:
        if array.path[-1] in EXPERTS:  # held in bfloat16
            found.append(array.path)
        elif array.path[-1] == "blocks" and array.path[:-1] in pairs:
            found.append(array.path[:-1])
    return found


def _added(array: Stored, pair: dict[str, np.ndarray], scale: float) -> Stored:
    """W + scale b a, in float32 and then in the type of W."""
    name = array.path[-1]
    a, b = pair["a"], pair["b"]

    def read(rows: slice) -> np.ndarray:
        weight = array.read(rows).astype(np.float32)
        if name in EXPERTS:
            count = rows.stop - rows.start
            rank = b.shape[-1]
            change = b[rows].reshape(count, -1, rank) @ a[rows]
        elif name == "embedding":  # a has the rows
            change = a[:, rows].T @ b.T
        else:
            change = b[rows].reshape(-1, b.shape[-1]) @ a.reshape(len(a), -1)
        weight += np.float32(scale) * change.reshape(weight.shape)
        return weight.astype(array.dtype)

    return dataclasses.replace(array, read=read)


def _requantized(
    arrays: list[Stored], rounded: list[tuple], pairs: dict, adapter: Adapter, sums: dict
) -> list[Stored]:
    """The arrays with the experts at `rounded` merged and packed again; `sums` fills as they are
    read.
    """
    by_path = {array.path: array for array in arrays}
    found: list[Stored] = []
    for array in arrays:
        path = array.path[:-1] if array.path[-1] in ("blocks", "scales") else array.path
        if path not in rounded:
            found.append(array)
        elif array.path[-1] != "scales":
            found += _packed(path, by_path, pairs.get(path), adapter.lora.scale, sums)
    return found


def _packed(path: tuple, by_path: dict, pair: Any, scale: float, sums: dict) -> list[Stored]:
    product = {"gate_up": "FPR,RD->FPD", "down": "DR,RF->DF"}[path[-1]]
    plain = by_path.get(path)
    held = [by_path[*path, part] for part in ("blocks", "scales")] if plain is None else [plain]
    shape = held[-1].shape
    if plain is None:
        shape = (*shape[:-1], shape[-1] * mxfp4.BLOCK)

    mxfp4.check_blocks(shape)
    name = named(path)

    def one(row: int) -> MxTensor:
        rows = slice(row, row + 1)
        parts = [array.read(rows) for array in held]
        if pair is None:  # held in bfloat16
            return encoded(parts[0], f"{name}, expert {row}")
        weight: Any = parts[0][0] if plain is not None else MxTensor(*(part[0] for part in parts))
        b = jnp.asarray(pair["b"][row]) * scale
        found, counted, finite = _round_one(weight, jnp.asarray(pair["a"][row]), b, product)
        mxfp4.check_finite(finite, f"{name}, expert {row} with the adapter")
        sums[name] = sums.get(name, 0) + np.asarray(counted, np.float64)
        return jax.tree.map(lambda x: np.asarray(x)[None], found)

    return packed_by(path, shape, one)


@functools.partial(jax.jit, static_argnames="product")
def _round_one(weight: MxTensor | jax.Array, a, b, product: str):
    """An expert's merged weight packed; four sums: kept change times wanted change, wanted change
    squared, rounding error squared, wanted weights squared; whether all of it is finite.
    """
    base = weight.dequantize(jnp.float32) if isinstance(weight, MxTensor) else weight
    base = base.astype(jnp.float32)
    wanted = merged(base, a, b, product)
    packed = mxfp4.encode(wanted)
    got = packed.dequantize(jnp.float32)
    change = wanted - base
    parts = (got - base) * change, change**2, (got - wanted) ** 2, wanted**2
    return packed, jnp.stack([part.sum() for part in parts]), jnp.isfinite(wanted).all()


def _report(sums: dict[str, np.ndarray]) -> Kept:
    def three(parts) -> tuple[float, float, float]:
        kept, change, error, weight = map(float, parts)
        tiny = 1e-30
        return (
            kept / max(change, tiny),
            (error / max(weight, tiny)) ** 0.5,
            (change / max(weight, tiny)) ** 0.5,
        )

    return Kept(*three(sum(sums.values())), {name: three(parts) for name, parts in sums.items()})
