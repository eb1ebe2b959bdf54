"""Parameters at rest, read a piece at a time, and folders that appear whole or not at all.

Knows parameters as rows on disk; knows no file format and no devices.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gptoss_jax.errors import GptOssError
from gptoss_jax.hf_names import Path as ParamPath

# Small enough that malloc reuses the memory: with 64 MB, page faults took as long as all the rest.
PIECE_BYTES = 16_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = ("No space left", "quota exceeded", "File too large")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array of the parameter tree at rest.

    Attributes:
      path: Keys in our tree, for example ("layers", 0, "mlp", "gate_up", "blocks").
      shape: Shape, our order of axes.
      dtype: Type in which it is stored.
      read: Gives the rows of a slice along the first axis.
    """

    path: ParamPath
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[slice], np.ndarray]

    @property
    def name(self) -> str:
        """The path as one word: layers.0.mlp.gate_up.blocks."""
        return ".".join(map(str, self.path))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.dtype.itemsize * int(np.prod(self.shape))

    def pieces(self, multiple: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
        """The array in pieces of at most 16 MB (or of `multiple` rows), in order.

        Args:
          multiple: Pieces start at multiples of this number of rows.

        Yields:
          Rows as a slice, and the contiguous piece.
        """
        row = max(1, self.nbytes // self.shape[0])
        step = max(1, PIECE_BYTES // (row * multiple)) * multiple
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            yield rows, np.ascontiguousarray(self.read(rows))


def refuse(folder: Path, problems: Sequence[str]) -> None:
    """Refuses a checkpoint that has problems.

    Raises:
      GptOssError: The first problem, and how many more there are.
    """
    if problems:
        count = len(problems) - 1
        more = f" ({count} more problems: gptoss inspect {folder})" if count else ""
        raise GptOssError(f"{folder}: {problems[0]}{more}")


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes: the CPU client takes it without a copy."""
    nbytes = np.dtype(dtype).itemsize * int(np.prod(shape))
    buffer = np.empty(nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """A folder that appears whole or not at all: written as `target`.partial, renamed at the end.

    What an interruption left behind is never loaded, and is removed by the next attempt.

    Args:
      target: The folder to make.
      overwrite: Replace a checkpoint that is there.
      needed: Bytes that will be written; refused at once if the disk has less.

    Yields:
      The folder to write into.

    Raises:
      GptOssError: The target exists, or the disk is full; nothing is left then.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            raise GptOssError(f"{target} exists: give another place, or --overwrite")
        if not (target / "config.json").exists():
            raise GptOssError(f"{target} exists and is no checkpoint: it is not overwritten")
    partial, replaced = _beside(target, ".partial"), _beside(target, ".replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise GptOssError(
                f"{target}: {needed / 1e9:.1f} GB are needed, the disk has {free / 1e9:.1f} GB "
                "free: free some or write elsewhere"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _sync(partial)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_full(error):
            raise GptOssError(
                f"{target}: the disk is full, nothing was kept: free space or write elsewhere"
            ) from error
        raise


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def is_full(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, says that the disk takes no more."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if not isinstance(seen, GptOssError) and any(text in str(seen) for text in _FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _sync(folder: Path) -> None:
    """Brings all files to the disk, so that the rename cannot overtake them in a power cut."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
