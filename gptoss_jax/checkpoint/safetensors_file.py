"""The safetensors file format, read in slices and written as a stream, in bounded memory.

The safetensors library maps whole files (every page read counts as resident memory) and writes only
what is in memory as a whole; here a slice costs its own bytes. Knows the format; knows no model, no
names.

Source: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from gptoss_jax.checkpoint.stored import aligned
from gptoss_jax.errors import GptOssError

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_MAX_IO = 1 << 30


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: where its bytes are.

    Attributes:
      file: The file.
      name: Its name there.
      dtype: The format's name of its type, for example "BF16".
      shape: Its shape.
      offset: First byte, from the start of the file.
      nbytes: Number of bytes.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(
        self,
        shape: tuple[int, ...] | None = None,
        index: tuple[slice, ...] | None = None,
        row: int = 0,
    ) -> np.ndarray:
        """Reads the tensor, or a slice of it, and nothing else.

        Args:
          shape: Shape to see the bytes as, from `row` on (a reshape); the tensor's own when None.
          index: Slices of step 1 of that shape, one an axis; everything when None.
          row: First index along the tensor's first axis.

        Returns:
          A new array of the type that the file holds.

        Raises:
          GptOssError: The file ended early.
        """
        shape = self.shape if shape is None else shape
        dtype = DTYPES[self.dtype]
        spans = [
            (0, size) if index is None else index[axis].indices(size)[:2]
            for axis, size in enumerate(shape)
        ]
        out = aligned(tuple(max(0, stop - start) for start, stop in spans), dtype)
        first = self.offset + row * (
            self.nbytes // self.shape[0] if self.shape and self.shape[0] else 0
        )
        if not out.size:
            return out
        # The longest contiguous run: all axes from `split` on are whole, axis split - 1 is a range.
        split = len(shape)
        while split and spans[split - 1] == (0, shape[split - 1]):
            split -= 1
        outer = max(split - 1, 0)
        strides = [
            dtype.itemsize * int(np.prod(shape[axis + 1 :], dtype=np.int64))
            for axis in range(len(shape))
        ]
        base = first + sum(
            start * stride for (start, _), stride in zip(spans, strides, strict=True)
        )
        flat = out.reshape(*out.shape[:outer], -1).view(np.uint8)
        with open(self.file, "rb", buffering=0) as file:
            for where in np.ndindex(*out.shape[:outer]):
                at = base + sum(i * stride for i, stride in zip(where, strides, strict=False))
                self._fill(file, flat[where].data, at)
        return out

    def _fill(self, file: io.RawIOBase, view: memoryview, at: int) -> None:
        file.seek(at)
        done = 0
        while done < len(view):
            count = file.readinto(view[done : done + _MAX_IO])
            if not count:
                raise GptOssError(
                    f"{self.file}: ended while {self.name!r} was read: it changed or is damaged"
                )
            done += count


def read_header(file: Path) -> dict[str, Tensor]:
    """Tensors of a file, checked against each other and against the file's size; no data is read.

    Args:
      file: A .safetensors file.

    Returns:
      Tensors by name.

    Raises:
      GptOssError: The file is missing, truncated, or not a safetensors file.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise GptOssError(
                    f"{file}: a header of {length} bytes in a file of {size}: truncated, or not a "
                    "safetensors file; download it again"
                )
            raw = json.loads(stream.read(length))
            raw.pop("__metadata__", None)
            found = {name: _tensor(file, name, entry, 8 + length) for name, entry in raw.items()}
    except FileNotFoundError:
        raise GptOssError(f"{file}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, GptOssError):
            raise
        raise GptOssError(
            f"{file}: not a safetensors file ({error!r} in its header); download it again"
        ) from error
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            raise GptOssError(
                f"{file}: tensor {tensor.name!r} starts at byte {tensor.offset}, expected {end}: "
                "damaged header, download it again"
            )
        end += tensor.nbytes
    if size != end:
        state = "truncated" if size < end else "too long"
        raise GptOssError(
            f"{file}: {state}: {size} bytes, its header promises {end}; download it again"
        )
    return found


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a file's header; `read_header` has found it sound."""
    with open(file, "rb") as stream:
        raw = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return raw.get("__metadata__") or {}


def _tensor(file: Path, name: str, entry: dict, data: int) -> Tensor:
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if entry["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise GptOssError(
            f"{file}: tensor {name!r} has the type {entry['dtype']!r}; this reader knows {known}"
        )
    expected = DTYPES[entry["dtype"]].itemsize * int(np.prod(shape, dtype=object))
    if end - begin != expected or min((begin, *shape)) < 0:
        raise GptOssError(
            f"{file}: tensor {name!r} of type {entry['dtype']} and shape {shape} needs {expected} "
            f"bytes, its offsets hold {end - begin}: damaged header, download it again"
        )
    return Tensor(file, name, entry["dtype"], shape, data + begin, expected)


def write(
    file: Path,
    entries: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
    pieces: Iterator[np.ndarray],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a file piece by piece.

    Args:
      file: Where; replaced if it exists.
      entries: Name, type and shape of each tensor, in the order of their bytes.
      pieces: Contiguous arrays whose bytes, one after another, are those of all tensors in order.
      metadata: Further entries of the header's metadata.

    Raises:
      OSError: The disk is full, or the like.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, dtype, shape in entries:
        nbytes = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        offsets = [end, end + nbytes]
        header[name] = {
            "dtype": NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": offsets,
        }
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with open(file, "wb", buffering=0) as stream:
        _write_all(stream, len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            _write_all(stream, data.data)
            written += data.nbytes
    assert written == end, (file, written, end)


def _write_all(stream, data) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view[:_MAX_IO]) :]
