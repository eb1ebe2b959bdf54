"""How a TPU holds experts: outputs along lanes, inputs along sublanes, everything padded to whole
tiles.

The released bytes tile badly (16 bytes in the last axis of 128 lanes). Made at load and never
saved; two storages of the same values:

    packed  int32 words of eight 4-bit codes and one scale in 32 values, 0.54 bytes a value: a
            rearrangement of the released bytes, which come back bit for bit
    folded  float8_e5m2 with the blocks' scales multiplied in and one power of two an output, 1.02
            bytes a value: needs no unpacking, but 1.9 times the memory

`storage` says which device gets which.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.mxfp4 import BLOCK, MxTensor

LANES, SUBLANES = 128, 32  # of a tile of bytes
GROUP = 64  # inputs that one row of tiles of words holds: 8 sublanes of 8 codes
# 2^127 and more is infinite in bfloat16, and is in the reference: 12 halves are 2^(scale - 124.4)
LARGEST_SCALE = 252
# Exponents that e5m2 has for normal numbers are 30; a block's values take 4 of them.
LARGEST_SPREAD = 26
# Of the code of nibble and half: [nibble, sublane, half, output].
SHIFTS = (4 * np.arange(4)[:, None] + 16 * np.arange(2)).astype(np.uint32)[:, None, :, None]

FAST_MEMORY = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")  # beside their vector units

Storage = Literal["packed", "folded"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("outputs", "inputs", "paired"),
)
@dataclasses.dataclass(frozen=True)
class TpuExperts:
    """All experts' weights of one product, for the kernels of this folder.

    Attributes:
      values: Packed: int32 [E, P, I / 8, O], see `_words`. Folded: float8_e5m2 [E, P, I, O]. I and
        O padded with zeros to multiples of 128 (packed: I of 64).
      scales: Packed: uint8 [E, P, I / 32, O], the blocks' scales, I / 32 padded to a multiple of
        32. Folded: float32 [E, P, 1, O], powers of two.
      outputs: O without padding.
      inputs: I without padding.
      paired: Whether O are (gate, up) pairs, P = 2; else P = 1.
    """

    values: jax.Array
    scales: jax.Array
    outputs: int
    inputs: int
    paired: bool

    @property
    def packed(self) -> bool:
        """Whether values are words of MXFP4 codes."""
        return self.values.dtype == jnp.int32

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical: [E, F, P, D] or [E, D, F], as the released tensor."""
        pair = (2,) if self.paired else ()
        return (self.values.shape[0], self.outputs, *pair, self.inputs)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        return self.values.nbytes + self.scales.nbytes

    def __getitem__(self, expert) -> "TpuExperts":
        """One expert, for `dequantize`."""
        return dataclasses.replace(self, values=self.values[expert], scales=self.scales[expert])

    def released(self) -> MxTensor:
        """The released bytes again, bit for bit; of packed experts (folded values say no more
        which scales they had).
        """
        assert self.packed
        return _released(self)

    def dequantize(self, dtype=jnp.bfloat16) -> jax.Array:
        """Values [E, F, P, D] or [E, D, F], of one expert without E, exact in bfloat16."""
        if self.values.ndim == 3:
            return self[None].dequantize(dtype)[0]
        if self.packed:
            return self.released().dequantize(dtype)
        values = self.values.astype(jnp.float32) * self.scales
        out = values[:, :, : self.inputs, : self.outputs].transpose(0, 3, 1, 2).astype(dtype)
        return out if self.paired else out[:, :, 0]


def storage(kind: str, folded: int, room: int) -> Storage:
    """Which storage a device gets.

    Unpacking takes 6 operations of the vector unit a weight. A v5e does about as many in the time
    in which its memory delivers a folded weight, so packed loses nothing there and takes half the
    memory; v5p and v6e would read packed experts at 40 to 60 % of their bandwidth, and folded ones
    about 1.5 times as fast as that (from data sheets: not measured). So these two get folded
    experts where that leaves a quarter of the memory for the cache: gpt-oss-20b on one v6e (22.7 of
    33.5 GB) and one v5p, gpt-oss-120b on 4 v5p, but packed on 4 v6e.

    Args:
      kind: JAX's device_kind, such as "TPU v6 lite"; one that is not known here gets packed.
      folded: Bytes of parameters on one device if folded.
      room: Bytes of the device.
    """
    return "folded" if kind in FAST_MEMORY and folded <= 0.75 * room else "packed"


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _to_rows(x: jax.Array, paired: bool) -> jax.Array:
    """[E, F, P, ...] or [E, D, ...] -> [E, P, ..., O]."""
    x = x if paired else x[:, :, None]
    return jnp.moveaxis(x, 1, -1)


def _pad(x: jax.Array, inputs: int, outputs: int, fill: int = 0) -> jax.Array:
    pads = [(0, 0), (0, 0), (0, inputs - x.shape[2]), (0, outputs - x.shape[3])]
    return jnp.pad(x, pads, constant_values=fill)


def _swap(codes: jax.Array) -> jax.Array:
    """Codes of 0 and 0.5 change places, so that code c and scale s are the bits c << 6 + (s - 1) <<
    7 of a bfloat16 for all but 0.
    """
    return codes ^ ((codes & 7) < 2).astype(codes.dtype)


@functools.partial(jax.jit, static_argnames="paired")
def _packed(blocks: jax.Array, scales: jax.Array, paired: bool) -> tuple[jax.Array, jax.Array]:
    codes = jnp.stack([blocks & 0xF, blocks >> 4], axis=-1)
    codes = _swap(_to_rows(codes.reshape(*blocks.shape[:-2], -1), paired))
    E, P, I, O = codes.shape
    outputs = _up(O, LANES)
    codes = _pad(codes, _up(I, GROUP), outputs, fill=1)
    # [groups, nibble, sublane, half]: input 16 nibble + 2 sublane + half of a group
    codes = codes.reshape(E, P, -1, 4, 8, 2, outputs).astype(jnp.uint32)
    words = (codes << SHIFTS[None, None, None]).sum((3, 5), dtype=jnp.uint32)
    words = jax.lax.bitcast_convert_type(words.reshape(E, P, -1, outputs), jnp.int32)
    rows = _to_rows(scales, paired)
    return words, _pad(rows, _up(rows.shape[2], SUBLANES), outputs)


@jax.jit
def _released(held: TpuExperts) -> MxTensor:
    words = jax.lax.bitcast_convert_type(held.values, jnp.uint32)
    E, P, _, O = words.shape
    words = words.reshape(E, P, -1, 1, 8, 1, O)
    codes = ((words >> SHIFTS[None, None, None]) & 0xF).astype(jnp.uint8)
    codes = _swap(codes.reshape(E, P, -1, O)[:, :, : held.inputs, : held.outputs])
    codes = jnp.moveaxis(codes, -1, 1)
    codes = codes.reshape(*codes.shape[:-1], held.inputs // BLOCK, -1, 2)
    blocks = codes[..., 0] | (codes[..., 1] << 4)
    scales = jnp.moveaxis(held.scales[:, :, : held.inputs // BLOCK, : held.outputs], -1, 1)
    if not held.paired:
        blocks, scales = blocks[:, :, 0], scales[:, :, 0]
    return MxTensor(blocks, scales)


@jax.jit
def _extent(held: MxTensor) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest scale of the blocks of each output that are not all zero; 255 and 0 for
    none.
    """
    some = ((held.blocks & 0x77) != 0).any(-1)
    least = jnp.where(some, held.scales, 255).min(-1)
    return least, jnp.where(some, held.scales, 0).max(-1)


@functools.partial(jax.jit, static_argnames="paired")
def _folded(held: MxTensor, least: jax.Array, paired: bool) -> tuple[jax.Array, jax.Array]:
    # The smallest scale's half becomes the smallest normal number, 2^-14; a scale of 255 is none.
    least = jnp.where(least == 255, 0, least).astype(jnp.int32)
    shifted = held.scales.astype(jnp.int32) - least[..., None] + (128 - 14)
    some = ((held.blocks & 0x77) != 0).any(-1)
    shifted = jnp.where(some, shifted, 127).astype(jnp.uint8)
    values = MxTensor(held.blocks, shifted).dequantize(jnp.bfloat16).astype(jnp.float8_e5m2)
    values = _to_rows(values, paired)
    inputs, outputs = (_up(n, LANES) for n in values.shape[2:])
    # value = e5m2 2^(least - 114)
    factor = jax.lax.bitcast_convert_type((least + (127 - 114)) << 23, jnp.float32)
    factor = _to_rows(factor[..., None], paired)
    return _pad(values, inputs, outputs), _pad(factor, 1, outputs)


def shapes(weight: MxTensor, form: Storage) -> TpuExperts:
    """What `to_tpu` makes of a tensor, as jax.ShapeDtypeStruct.

    Args:
      weight: Of arrays or jax.ShapeDtypeStruct.
      form: "packed" or "folded".
    """

    def make(weight):
        paired = weight.ndim == 4
        if form == "packed":
            values, scales = _packed(weight.blocks, weight.scales, paired)
        else:
            values, scales = _folded(weight, _extent(weight)[0], paired)
        return TpuExperts(values, scales, weight.shape[1], weight.shape[-1], paired)

    return jax.eval_shape(make, weight)


def to_tpu(
    weight: MxTensor, form: Storage = "packed", name: str = "experts"
) -> tuple[TpuExperts | None, str | None]:
    """The kernels' layout of a tensor of experts, or why it cannot be had.

    Args:
      weight: [E, F, P, D] or [E, D, F], arrays on a device.
      form: "packed" or "folded".
      name: For the reason.

    Returns:
      The experts, and None. Where the values do not fit the form, None and the reason: packed for
      folded and the released bytes for packed hold them.
    """
    paired = weight.ndim == 4
    lowest, highest = _extent(weight)
    top = int(highest.max())
    if top > LARGEST_SCALE:
        return None, (
            f"{name}: a block scale of {top} where {LARGEST_SCALE} is the most that finite "
            "bfloat16 values need: kept as released"
        )
    outputs, inputs = weight.shape[1], weight.shape[-1]
    if form == "packed":
        values, scales = _packed(weight.blocks, weight.scales, paired)
        return TpuExperts(values, scales, outputs, inputs, paired), None
    spread = int((highest.astype(jnp.int32) - lowest.astype(jnp.int32)).max())
    if spread > LARGEST_SPREAD:
        return None, (
            f"{name}: scales of one output differ by 2^{spread}, float8_e5m2 holds 2^"
            f"{LARGEST_SPREAD} exactly: kept packed"
        )
    values, scales = _folded(weight, lowest, paired)
    return TpuExperts(values, scales, outputs, inputs, paired), None
