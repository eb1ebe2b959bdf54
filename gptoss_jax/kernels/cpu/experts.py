"""How a CPU holds packed experts: four rows in turn, block after block.

A decode step reads an expert from one end to the other, and finds a value by one lookup in a table
of its block's scale: of 32 words each holds the four rows' codes of one value, one below the other
(arithmetic.h). With the released bytes that takes half as long again. Made at load and never saved:
a rearrangement of the released bytes, which come back bit for bit.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.cpu import library
from gptoss_jax.mxfp4 import BLOCK, BYTES, MxTensor

ROWS = 4  # in turn
LEAST = 1 << 20  # bytes of all experts; fewer stay in a cache


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("blocks", "scales"), meta_fields=("shape",)
)
@dataclasses.dataclass(frozen=True)
class CpuExperts:
    """All experts' weights of one product, or, indexed, one expert's.

    Attributes:
      blocks: uint8 [E, O / 4, U, 64], O rows of U blocks; 32 words of 16 bits, the low byte first.
      scales: uint8 [E, O / 4, U, 4].
      shape: Logical: [E, F, P, D] or [E, D, F], as the released tensor; all axes between the first
        and the last make up O.
    """

    blocks: jax.Array
    scales: jax.Array
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held: 17 for 32 values."""
        return self.blocks.nbytes + self.scales.nbytes

    def __getitem__(self, experts: Any) -> "CpuExperts":
        """One expert, or a slice of them."""
        blocks = self.blocks[experts]
        return CpuExperts(blocks, self.scales[experts], (*blocks.shape[:-3], *self.shape[1:]))

    def as_rows(self) -> "CpuExperts":
        """[E, F, P, D] -> [E, F P, D]: the same bytes."""
        E, *outputs, inputs = self.shape
        return dataclasses.replace(self, shape=(E, math.prod(outputs), inputs))

    def head(self) -> jax.Array:
        """The last axis at the others' beginning, bfloat16; reads four rows."""
        some = self.blocks[0, :1], self.scales[0, :1]
        return CpuExperts(*some, (ROWS, self.shape[-1])).dequantize()[0]

    def released(self) -> MxTensor:
        """The released bytes again, bit for bit."""
        return _released(self)

    def dequantize(self, dtype=jnp.bfloat16) -> jax.Array:
        """Values, exact in bfloat16."""
        return self.released().dequantize(dtype)


@jax.jit
def _released(held: CpuExperts) -> MxTensor:
    *leading, fours, units, _ = held.blocks.shape
    words = held.blocks.reshape(*leading, fours, units, BLOCK, 2)
    codes = jnp.stack([words & 15, words >> 4], axis=-1)  # [..., value, byte, half]
    codes = codes.reshape(*leading, fours, units, BYTES, 2, ROWS)
    blocks = jnp.moveaxis(codes[..., 0, :] | codes[..., 1, :] << 4, -1, -3)
    scales = jnp.moveaxis(held.scales, -1, -2)
    shape = *held.shape[:-1], units
    return MxTensor(blocks.reshape(*shape, BYTES), scales.reshape(shape))


def as_cpu_experts(weight: MxTensor) -> CpuExperts | None:
    """The same bytes as this machine's kernels read them fastest, made by all cores.

    Args:
      weight: [E, F, P, D] or [E, D, F], in this machine's memory.

    Returns:
      None if that does not pay: they are small, an expert's rows are no multiple of four, or this
      machine has no kernel that reads them faster.
    """
    if weight.nbytes < LEAST or math.prod(weight.shape[1:-1]) % ROWS:
        return None
    return in_turn(weight) if library.arithmetics()[:1] == ["avx512_bf16"] else None


def in_turn(weight: MxTensor) -> CpuExperts:
    """`as_cpu_experts` of experts of any size, each a multiple of four rows, on any machine that
    has kernels.
    """
    E, *outputs, units = weight.scales.shape
    fours = E, math.prod(outputs) // ROWS, units
    made = tuple(jax.ShapeDtypeStruct((*fours, size), jnp.uint8) for size in (ROWS * BYTES, ROWS))
    call = jax.ffi.ffi_call("gptoss_four_in_turn", made)
    blocks, scales = call(weight.blocks, weight.scales)
    return CpuExperts(blocks, scales, weight.shape)
