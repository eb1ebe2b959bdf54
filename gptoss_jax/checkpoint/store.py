"""Our own layout on disk: an Orbax checkpoint of the parameter tree, a config and a manifest.

    config.json     Hugging Face's spelling
    manifest.json   source, revision, and shape, type, bytes and crc32 of every array
    params/         Orbax: one uncompressed zarr array a parameter, experts in chunks of their own
    kept_tokens.txt if the vocabulary is pruned

zlib's crc32 is the checksum: 7 GB/s, faster than any disk, and made for damage, which is what it
has to find. zstd saves nothing on MXFP4 bytes (they are noise) and costs time. OCDBT is off: it
took three times as long and 2 GiB of memory to write, and a plain zarr array is read by many
programs.
"""

import contextlib
import dataclasses
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import future

from gptoss_jax import hf_names
from gptoss_jax.checkpoint.source import read_config, read_json, write_config
from gptoss_jax.checkpoint.stored import Stored, aligned, refuse
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError

MANIFEST, PARAMS, KEPT = "manifest.json", "params", "kept_tokens.txt"
FORMAT, VERSION = "gptoss_jax", 1
CHUNK_BYTES = 10_000_000
EXPERT_PARTS = 8
READ_BYTES = 128_000_000  # in flight: a chunk is in memory until it is copied
Progress = Callable[[str, int], None]


def chunk_shape(path: hf_names.Path, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Shape of an array's chunks: at most 10 MB, experts in eight parts or more, even rows.

    A host that holds one eighth of the experts then reads one eighth of the bytes.
    """
    limit = max(1, CHUNK_BYTES // itemsize)
    chunk = list(shape)
    for axis, size in enumerate(shape):
        rest = math.prod(shape[axis + 1 :])
        most = max(1, min(size, limit // rest))
        if axis == 0 and path[3:4] in (("gate_up",), ("down",)):
            most = min(most, max(1, size // EXPERT_PARTS))
        even = [part for part in range(most, max(1, most // 4) - 1, -1) if size % part == 0]
        chunk[axis] = even[0] if even else most
        if limit >= rest:
            break
    return tuple(chunk)


class _Writer(ocp.type_handlers.NumpyHandler):
    """Writes Stored leaves as Orbax writes numpy arrays, but reads them only then, piecewise."""

    def __init__(self, progress: Progress | None):
        super().__init__()
        self.progress = progress
        self.error: BaseException | None = None
        self.entries: dict[str, dict[str, Any]] = {}

    async def serialize(self, values: Any, infos, args=None):
        """One commit that writes array after array; Orbax's own would hold all of them."""
        del args

        async def write_all():
            try:
                for value, info in zip(values, infos, strict=True):
                    await info.await_path_creation()
                    await self._write(value, Path(info.parent_dir) / info.name)
            except BaseException as error:  # Orbax logs three tracebacks of what is raised here
                self.error = error

        return [future.CommitFutureAwaitingContractedSignals(write_all(), name="stored")]

    async def _write(self, stored: Stored, folder: Path) -> None:
        chunks = chunk_shape(stored.path, stored.shape, stored.dtype.itemsize)
        array = await ts.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{folder}/"},
                "metadata": {"compressor": None, "chunks": chunks},
                "store_data_equal_to_fill_value": True,
            },
            dtype=ts.dtype(stored.dtype.name),
            shape=stored.shape,
            create=True,
        )
        whole_rows = chunks[1:] == stored.shape[1:]
        checksum = 0
        for rows, piece in stored.pieces(multiple=chunks[0]):
            if self.error is not None:
                raise self.error
            checksum = crc32(piece, checksum)
            if whole_rows and len(piece) % chunks[0] == 0:
                _write_chunks(folder, piece, rows.start // chunks[0], chunks[0])
            else:
                await array[rows].write(piece, can_reference_source_data_indefinitely=True)
        self.entries[stored.name] = {
            "shape": stored.shape,
            "dtype": stored.dtype.name,
            "bytes": stored.nbytes,
            "crc32": f"{checksum:08x}",
        }
        if self.progress:
            self.progress(stored.name, stored.nbytes)


def write(
    folder: Path,
    config: GptOssConfig,
    arrays: Iterable[Stored],
    *,
    source: str = "",
    revision: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint into an empty folder, manifest last, in the memory of a few 16 MB pieces.

    Args:
      folder: From `new_folder`.
      config: The model's config.
      arrays: Every parameter; MXFP4 experts as two, blocks and scales.
      source: Where they come from, for the manifest.
      revision: The source's commit.
      progress: Called with a parameter's name and bytes when it is written.
    """
    arrays = list(arrays)
    writer = _Writer(progress)
    # jax.Array is there only because Orbax warns when it is not.
    registry = ocp.type_handlers.create_type_handler_registry(
        (Stored, writer), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # one process writes, whether there are others or not
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=False,
        type_handler_registry=registry,
        multiprocessing_options=alone,
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        try:
            tree = hf_names.nested({array.path: array for array in arrays})
            with _quiet():
                checkpointer.save((folder / PARAMS).absolute(), args=ocp.args.PyTreeSave(tree))
        except (
            BaseException
        ) as error:  # an interruption: the writing thread stops at its next piece
            writer.error = error
            raise
    if writer.error is not None:
        raise writer.error
    packed = any(array.path[-1] == "blocks" for array in arrays)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        "revision": revision,
        "experts": "mxfp4" if packed else "bfloat16",
        "checksum": "crc32",
        "total_bytes": sum(array.nbytes for array in arrays),
        "tensors": {array.name: writer.entries[array.name] for array in arrays},
    }
    write_config(folder, config, quantized=packed)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _write_chunks(folder: Path, piece: np.ndarray, first: int, rows: int) -> None:
    """Writes whole chunks: uncompressed, they are their bytes; tensorstore copies them twice."""
    for start in range(0, len(piece), rows):
        name = ".".join(map(str, (first + start // rows, *(0,) * (piece.ndim - 1))))
        with open(folder / name, "wb", buffering=0) as file:
            view = piece[start : start + rows].reshape(-1).view(np.uint8).data
            while view:
                view = view[file.write(view) :]


@contextlib.contextmanager
def _quiet():
    """Orbax warns that there is no OCDBT (on purpose), and logs tracebacks of what it raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclasses.dataclass(frozen=True)
class Store:
    """A checkpoint in our layout, opened: config and manifest read, no data.

    Attributes:
      folder: Where it is.
      layout: "mxfp4" or "bfloat16": how the experts are held.
      config: Its config.json.
      manifest: Its manifest.json.
      leaves: The parameters that the config asks for.
    """

    folder: Path
    layout: hf_names.Layout
    config: GptOssConfig
    manifest: dict[str, Any]
    leaves: tuple[hf_names.Leaf, ...]

    def arrays(self) -> list[Stored]:
        """All parameters, to be read piecewise; one read to its end is compared with its crc32."""
        return [
            Stored(leaf.path, leaf.shape, self.dtype(leaf), self._rows(leaf))
            for leaf in self.leaves
        ]

    def _rows(self, leaf: hf_names.Leaf) -> Callable[[slice], np.ndarray]:
        rest = (slice(None),) * (len(leaf.shape) - 1)
        end, checksum = 0, 0

        def read(rows: slice) -> np.ndarray:
            nonlocal end, checksum
            piece = self.read(leaf, (rows, *rest))
            if rows.start == 0:
                end, checksum = 0, 0
            if rows.start == end:
                end, checksum = rows.stop, crc32(piece, checksum)
            if end == leaf.shape[0] == rows.stop:
                self._compare(leaf, checksum)
            return piece

        return read

    def _compare(self, leaf: hf_names.Leaf, checksum: int) -> None:
        expected = self.manifest["tensors"][leaf.name]["crc32"]
        if f"{checksum:08x}" != expected:
            raise GptOssError(
                f"{self.folder}: {leaf.name} has the checksum {checksum:08x}, {MANIFEST} says "
                f"{expected}: the data is damaged, convert again"
            )

    def entry(self, leaf: hf_names.Leaf) -> tuple[str, tuple[int, ...], int] | None:
        """Type, shape in our axes and bytes of a parameter; None if the manifest lacks it."""
        found = self.manifest["tensors"].get(leaf.name)
        return found and (found["dtype"], tuple(found["shape"]), found["bytes"])

    def dtype(self, leaf: hf_names.Leaf) -> np.dtype:
        """Type in which a parameter is stored."""
        return _dtype(self.manifest["tensors"][leaf.name]["dtype"])

    def read(self, leaf: hf_names.Leaf, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a slice of a parameter: in parallel the chunks that the slice touches, no others.

        Not by Orbax's own restore: on a CPU that took 2.5 times the model in memory, this takes the
        slice and 0.3 GB.

        Args:
          leaf: The parameter.
          index: Slices along our axes; everything when None.

        Returns:
          The slice, in the stored type.
        """
        kvstore = {"driver": "file", "path": f"{self._place(leaf).absolute()}/"}
        spec = {"driver": "zarr", "kvstore": kvstore}
        array = ts.open(spec, open=True, read=True).result()
        part = array if index is None else array[index]
        part = part.translate_to[(0,) * part.rank]
        out = aligned(part.shape, self.dtype(leaf))
        row = max(1, out.nbytes // max(1, len(out)))
        step = max(1, READ_BYTES // row)
        for start in range(0, len(out), step):
            rows = slice(start, min(start + step, len(out)))
            ts.array(out[rows]).write(part[rows].translate_to[(0,) * part.rank]).result()
        return out

    def _place(self, leaf: hf_names.Leaf) -> Path:
        return self.folder / PARAMS / leaf.name

    def surplus(self) -> list[str]:
        """Names in the manifest that a gpt-oss model does not have."""
        known = {leaf.name for leaf in self.leaves}
        return [name for name in self.manifest["tensors"] if name not in known]

    def problems(self) -> list[str]:
        """What keeps it from being loaded, one line each; looks at files' sizes, reads no data."""
        found = []
        for leaf in self.leaves:
            entry = self.manifest["tensors"].get(leaf.name)
            if entry is None:
                found.append(f"{leaf.name} is missing from {MANIFEST}: convert again")
            elif tuple(entry["shape"]) != leaf.shape:
                found.append(
                    f"{leaf.name} has shape {tuple(entry['shape'])} in {MANIFEST}, config.json "
                    f"asks for {leaf.shape}: the two do not belong together"
                )
            elif leaf.packed != (entry["dtype"] == "uint8"):
                wanted = "uint8" if leaf.packed else "bfloat16 or float32"
                found.append(f"{leaf.name} has type {entry['dtype']}, expected {wanted}")
            elif problem := self._damage(leaf):
                found.append(problem)
        return found + [f"{name} is none of gpt-oss's parameters" for name in self.surplus()]

    def _damage(self, leaf: hf_names.Leaf) -> str | None:
        """What is wrong with an array's files, or None; a missing chunk would be read as zeros."""
        folder = self._place(leaf)
        if not (folder / ".zarray").exists():
            return f"{leaf.name}: {PARAMS}/{leaf.name} is missing: convert again"
        chunks = read_json(folder / ".zarray")["chunks"]
        nbytes = math.prod(chunks) * self.dtype(leaf).itemsize
        counts = [-(-size // chunk) for size, chunk in zip(leaf.shape, chunks, strict=True)]
        for where in np.ndindex(*counts):
            file = folder / ".".join(map(str, where))
            size = file.stat().st_size if file.exists() else 0
            if size != nbytes:
                return (
                    f"{leaf.name}: {PARAMS}/{leaf.name}/{file.name} has {size} bytes, expected "
                    f"{nbytes}: convert again"
                )
        return None

    def check(self) -> None:
        """Refuses a checkpoint with problems, before any data is read.

        Raises:
          GptOssError: The first problem, and how many more there are.
        """
        refuse(self.folder, self.problems())


def open_store(folder: Path) -> Store:
    """Opens a folder in our layout.

    Raises:
      GptOssError: The manifest is damaged or of a later version, or config.json is missing.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise GptOssError(f"{folder / MANIFEST}: not the manifest of a {FORMAT} checkpoint")
    if manifest.get("version") != VERSION:
        raise GptOssError(
            f"{folder / MANIFEST}: format version {manifest.get('version')!r}, this program reads "
            f"{VERSION}: upgrade {FORMAT}"
        )
    layout, tensors = manifest.get("experts"), manifest.get("tensors")
    if layout not in ("mxfp4", "bfloat16") or not isinstance(tensors, dict):
        raise GptOssError(f"{folder / MANIFEST}: no valid 'experts' and 'tensors': convert again")
    config = read_config(folder)
    if not (folder / PARAMS / "_METADATA").exists():
        raise GptOssError(f"{folder}: {PARAMS}/ is no complete Orbax checkpoint: convert again")
    return Store(folder, layout, config, manifest, hf_names.leaves(config, layout))


def crc32(array: np.ndarray, start: int = 0) -> int:
    """Checksum of an array's bytes in C order, continued from `start`."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, start)


def _dtype(name: str) -> np.dtype:
    if name not in ("bfloat16", "float32", "uint8"):
        raise GptOssError(f"{MANIFEST}: type {name!r}, expected bfloat16, float32 or uint8")
    return np.dtype(jax.numpy.dtype(name))
