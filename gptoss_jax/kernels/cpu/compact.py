"""Matrices of bfloat16 that are held in 12 bits a value, and lose nothing.

A decode step on a CPU takes as long as reading its weights. Nearly all values of a row have one of
16 neighbouring exponents, in trained weights as in random ones: sign and exponent fit into five
bits, of which the exponent's last stays with the mantissa in a byte, and four become a code. The
few others are kept beside it. Made at load and never saved; compact.h says what lies where.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptoss_jax.kernels.cpu import library

COLUMNS = 64  # values of a row come in such blocks
LEAST = 1 << 20  # bytes of a matrix; smaller ones stay in a cache
GROUP, UNIT, PART = 16, 128, 1024  # of compact.h
MOST_EXCEPTIONS = 1 / 256  # of the values: they cost 4 bytes each, and time


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bytes", "exponents", "starts", "places", "values"),
    meta_fields=("shape",),
)
@dataclasses.dataclass(frozen=True)
class CompactMatrix:
    """A bfloat16 array of N rows of K values, in 12 bits a value.

    Attributes:
      bytes: uint8 [N, K / 2 * 3]; N even, if need be by a row that is none.
      exponents: uint8 [N], a row's first exponent without its last bit.
      starts: int32 [N + 1], where its exceptions begin.
      places: uint16 [P], their columns; P at least 1.
      values: uint16 [P], their bits.
      shape: Logical; the first axes make up N, the others K.
    """

    bytes: jax.Array
    exponents: jax.Array
    starts: jax.Array
    places: jax.Array
    values: jax.Array
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of its values: bfloat16."""
        return np.dtype(jnp.bfloat16)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    @property
    def row(self) -> int:
        """K."""
        return self.bytes.shape[1] // 3 * 2

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: int) -> "CompactMatrix":
        """The same rows under another shape."""
        known = -math.prod(shape) if -1 in shape else 1
        whole = tuple(self.size // known if size == -1 else size for size in shape)
        assert math.prod(whole) == self.size, (shape, self.shape)
        return dataclasses.replace(self, shape=whole)

    def head(self) -> jax.Array:
        """The last axis at the others' beginning; reads 16 rows, whose exceptions are none of the
        others'.
        """
        some = dataclasses.replace(
            self,
            bytes=self.bytes[:GROUP],
            exponents=self.exponents[:GROUP],
            starts=self.starts[: GROUP + 1],
            shape=(min(GROUP, self.size // self.row), self.row),
        )
        return some.released()[0, : self.shape[-1]]

    def released(self) -> jax.Array:
        """The bfloat16 array again, bit for bit."""
        return _released(self)

    def __repr__(self) -> str:
        return f"CompactMatrix(shape={self.shape}, {self.nbytes} bytes)"


def compact_matrices(tree: Any) -> list[CompactMatrix]:
    """Those of a tree of parameters."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, CompactMatrix))
    return [x for x in leaves if isinstance(x, CompactMatrix)]


@jax.jit
def _released(matrix: CompactMatrix) -> jax.Array:
    """compact.h read backwards."""
    N, K = len(matrix.exponents), matrix.row
    whole = N // GROUP * GROUP
    groups = [(0, whole, GROUP), (whole, N, N - whole)]
    bits = jnp.concatenate(
        [_bits(matrix.bytes[a:b], matrix.exponents[a:b], rows, K) for a, b, rows in groups if a < b]
    )
    exceptions = jnp.arange(len(matrix.places))
    row = jnp.searchsorted(matrix.starts, exceptions, side="right") - 1
    bits = bits.at[row, matrix.places].set(matrix.values, mode="drop")  # without any there is one
    out = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    return out[: matrix.size // K].reshape(matrix.shape)


def _bits(packed: jax.Array, exponents: jax.Array, rows: int, K: int) -> jax.Array:
    """uint16 [N, K] of groups of so many rows, without exceptions."""
    pairs = rows // 2
    packed = packed.reshape(-1, rows * K // 2 * 3)
    first = exponents.reshape(-1, pairs, 1, 2, 1)
    found, parts = [], -(-K // PART)
    part, start = math.ceil(math.ceil(K / parts) / UNIT) * UNIT, 0
    for begin in range(0, K, part):
        width = min(part, K - begin)
        here = packed[:, start : start + rows * width // 2 * 3].reshape(-1, pairs, width * 3)
        start += rows * width // 2 * 3
        at = 0
        for unit, count in ((UNIT, width // UNIT), (UNIT // 2, width % UNIT // (UNIT // 2))):
            if not count:
                continue
            units = here[..., at : at + 3 * unit * count].reshape(
                -1, pairs, count, 2, unit // 2 * 3
            )
            at += 3 * unit * count
            low, codes = units[..., :unit], units[..., unit:]
            codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
            high = (codes >> 3 << 7) | (first + (codes & 7))
            values = high.astype(jnp.uint16) << 8 | low.astype(jnp.uint16)
            # of 64 bytes the runs of 8 belong to the first and the last 32 values in turn
            values = values.reshape(*values.shape[:-1], -1, 4, 2, 8).swapaxes(-3, -2)
            values = values.reshape(-1, pairs, count, 2, unit).swapaxes(2, 3)
            found.append(values.reshape(-1, pairs, 2, count * unit))
    return jnp.concatenate(found, axis=-1).reshape(-1, K)


def as_compact(weight: jax.Array, inputs: int) -> CompactMatrix | None:
    """The same values in 12 bits each, packed by all cores.

    Args:
      weight: bfloat16, in this machine's memory.
      inputs: How many of its last axes are contracted.

    Returns:
      None if that does not pay: it is small, a row is no multiple of 64, its exponents lie too far
      apart, or this machine has no kernel that reads it faster.
    """
    K = math.prod(weight.shape[-inputs:])
    if weight.dtype != jnp.bfloat16 or weight.nbytes < LEAST or K % COLUMNS or K >= 1 << 16:
        return None
    if library.arithmetics()[:1] != ["avx512_bf16"]:
        return None
    return packed(weight, inputs)


def packed(weight: jax.Array, inputs: int) -> CompactMatrix | None:
    """`as_compact` of a bfloat16 array of any size whose rows are a multiple of 64, on any machine
    that has kernels; None if too many exponents lie too far apart.
    """
    K, N = math.prod(weight.shape[-inputs:]), math.prod(weight.shape[:-inputs])
    even, shaped = N + N % 2, jax.ShapeDtypeStruct
    made = (
        shaped((even, K // 2 * 3), jnp.uint8),
        shaped((even,), jnp.uint8),
        shaped((even,), jnp.int32),
    )
    matrix = weight.reshape(N, K)
    packed_bytes, exponents, counts = jax.ffi.ffi_call("gptoss_compact_pack", made)(matrix)
    found = int(np.asarray(counts).sum(dtype=np.int64))
    if found > N * K * MOST_EXCEPTIONS:
        return None
    starts = jnp.asarray(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    listed = (shaped((max(found, 1),), jnp.uint16),) * 2
    call = jax.ffi.ffi_call("gptoss_compact_exceptions", listed)
    places, values = call(matrix, exponents, starts)
    return CompactMatrix(packed_bytes, exponents, starts, places, values, weight.shape)


def compact_product(x_MI: Float[Array, "M I"], weight: CompactMatrix) -> Float[Array, "M O"]:
    """x times the matrix's rows, float32 sums: every bit as `grouped_product` gives it for the same
    values in bfloat16.

    Args:
      x_MI: bfloat16.
      weight: Of rows of I values.
    """
    out = jax.ShapeDtypeStruct((len(x_MI), weight.size // x_MI.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("gptoss_compact", out, vmap_method="sequential")
    parts = weight.bytes, weight.exponents, weight.starts, weight.places, weight.values
    return call(x_MI, *parts)
