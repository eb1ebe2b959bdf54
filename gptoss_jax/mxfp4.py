"""MXFP4: the released experts' number format, its codec, and the array type that keeps it packed.

A block is 32 values along the contracted axis: 16 bytes (element 2k in the low nibble of byte k)
and one power-of-two scale, value = e2m1 * 2^(scale - 127). Knows no model, no files.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 6.3; openai/gpt-oss
gpt_oss/torch/weights.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptoss_jax.errors import GptOssError

BLOCK, BYTES = 32, 16
SCALE_BIAS, SCALE_NAN = 127, 255
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MxTensor:
    """A tensor in MXFP4: the released bytes as they are.

    A pytree of two arrays, so that it can be donated, sharded and saved like any other; indexing
    goes over the leading axes (tensor[expert]), never inside a block.

    Attributes:
      blocks: uint8 [..., U, 16], two values a byte.
      scales: uint8 [..., U], biased exponents; 255 is NaN and never stored.
    """

    blocks: jax.Array | np.ndarray
    scales: jax.Array | np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape: the leading axes, then 32 values a block."""
        return (*self.blocks.shape[:-2], self.blocks.shape[-2] * BLOCK)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return self.blocks.ndim - 1

    @property
    def size(self) -> int:
        """Number of logical values."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes held: 17 for 32 values."""
        return self.blocks.nbytes + self.scales.nbytes

    def __getitem__(self, index) -> "MxTensor":
        """Part along the leading axes, still packed; `index` is what an array of the leading axes
        would take.
        """
        leading = len(self.shape) - 1
        parts = index if isinstance(index, tuple) else (index,)
        if sum(part is not None for part in parts) > leading or Ellipsis in [
            p for p in parts if p is Ellipsis
        ]:
            raise GptOssError(
                f"an MxTensor of shape {self.shape} is indexed along its first {leading} axes: "
                f"got {index}"
            )
        return MxTensor(self.blocks[index], self.scales[index])

    def as_rows(self) -> "MxTensor":
        """[E, F, P, D] -> [E, F P, D]: the same bytes."""
        E, F, P, _ = self.shape
        return MxTensor(self.blocks.reshape(E, F * P, -1, BYTES), self.scales.reshape(E, F * P, -1))

    def dequantize(self, dtype=jnp.bfloat16) -> jax.Array:
        """Values as an array of `dtype`; exact in bfloat16 and float32 unless the exponent leaves
        their range.
        """
        return decode(self.blocks, self.scales, dtype)

    def __matmul__(self, x) -> jax.Array:
        """Product along the blocked axis in x's dtype, float32 sums: [..., O, I] @ [..., I, J] as
        for arrays.
        """
        return jnp.matmul(self.dequantize(x.dtype), x, preferred_element_type=jnp.float32).astype(
            x.dtype
        )

    def __rmatmul__(self, x) -> jax.Array:
        """x @ tensor, in x's dtype with float32 sums."""
        return jnp.matmul(x, self.dequantize(x.dtype), preferred_element_type=jnp.float32).astype(
            x.dtype
        )

    def __repr__(self) -> str:
        kind = type(self.blocks).__name__
        return f"MxTensor(shape={self.shape}, {kind}, {self.nbytes} bytes)"


def decode(blocks, scales, dtype=jnp.bfloat16) -> jax.Array:
    """Unpacks MXFP4 on the device.

    A magnitude code m stands for h = m + max(m - 4, 0) + 2 max(m - 6, 0) halves: 0, 1, 2, 3, 4, 6,
    8, 12. Small integers and one power of two, so that no value passes through a subnormal (XLA's
    CPU client flushes them).

    Args:
      blocks: uint8 [..., U, 16].
      scales: uint8 [..., U].
      dtype: bfloat16 or float32.

    Returns:
      [..., 32 U] of `dtype`.
    """
    values = jax.lax.platform_dependent(blocks, scales, cpu=_decode_words, default=_decode_pairs)
    return values.reshape(*blocks.shape[:-2], -1).astype(dtype)


def _decode_pairs(blocks, scales) -> jax.Array:
    """bfloat16 [..., U, 16, 2]."""
    codes = jnp.stack([blocks & 0xF, blocks >> 4], axis=-1)
    return _values(codes, half_scale(scales)[..., None, None]).astype(jnp.bfloat16)


def _decode_words(blocks, scales) -> jax.Array:
    """`_decode_pairs`, both values of a byte in one 32-bit word: XLA's CPU compiler does not make
    vectors of the stack, and takes six times as long where the expert is chosen by an index.
    """
    scale = half_scale(scales)[..., None]
    low, high = (
        jax.lax.bitcast_convert_type(_values(codes, scale), jnp.uint32)
        for codes in (blocks & 0xF, blocks >> 4)
    )
    words = (low >> 16) | (high & jnp.uint32(0xFFFF0000))
    return jax.lax.bitcast_convert_type(words, jnp.bfloat16)


def _values(codes, half_scale) -> jax.Array:
    """float32 of 4-bit codes, exact in bfloat16."""
    codes = codes.astype(jnp.int32)
    magnitude = codes & 7
    halves = magnitude + jnp.maximum(magnitude - 4, 0) + 2 * jnp.maximum(magnitude - 6, 0)
    signed = jnp.where(codes >= 8, -halves.astype(jnp.float32), halves.astype(jnp.float32))
    return signed * half_scale


def half_scale(scales) -> Float[Array, "..."]:
    """2^(scale - 128) in float32, made from exponent bits; scales 0 and 1 would be subnormal and
    give 0.
    """
    exponent = jnp.maximum(scales.astype(jnp.int32) - 1, 0)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Unpacks MXFP4 on the host, exactly, by the table and ldexp: the definition that `decode` is
    tested against.

    Args:
      blocks: uint8 [..., U, 16].
      scales: uint8 [..., U].

    Returns:
      float32 [..., 32 U].

    Raises:
      GptOssError: A scale is 255, NaN in the format.
    """
    check_scales(scales)
    codes = np.stack([blocks & 0xF, blocks >> 4], axis=-1)
    with np.errstate(over="ignore"):  # 2^127 * 4 is infinite in float32, as in the reference
        values = np.ldexp(E2M1[codes], scales.astype(np.int32)[..., None, None] - SCALE_BIAS)
    return values.reshape(*blocks.shape[:-2], -1)


def check_scales(scales: np.ndarray, name: str = "tensor") -> None:
    """Refuses NaN scales.

    Raises:
      GptOssError: A scale is 255; the message gives its index.
    """
    found = np.asarray(scales) == SCALE_NAN
    if found.any():
        where = tuple(int(i) for i in np.argwhere(found)[0])
        raise GptOssError(
            f"{name}: scale 255 (NaN in MXFP4) at {where}: "
            "the checkpoint is damaged, download it again"
        )


def check_blocks(shape: tuple[int, ...]) -> None:
    """Refuses shapes whose last axis cannot be cut into blocks.

    Raises:
      GptOssError: It is no multiple of 32.
    """
    if shape[-1] % BLOCK:
        raise GptOssError(
            f"last axis of {shape} is no multiple of {BLOCK}: MXFP4 blocks cannot be formed"
        )


def check_finite(finite: bool | np.bool_ | jax.Array, name: str = "values to pack") -> None:
    """Refuses what MXFP4 cannot hold.

    Args:
      finite: Whether all values are.
      name: Of the tensor.

    Raises:
      GptOssError: They are not.
    """
    if not finite:
        raise GptOssError(
            f"{name}: NaN or infinity, and MXFP4 has neither: correct the weights, or keep bfloat16"
        )


def _round(x: jax.Array, offsets: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The nearest MXFP4 blocks: signed halves (float32 [..., U, 32], value = halves 2^(s - 128)),
    and biased scales s (int32 [..., U]).

    The arithmetic of `pack` on the device: exponents come from the bits, so that every value is one
    that the format has.
    """
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, BLOCK)
    magnitude = jnp.abs(grouped)
    bits = jax.lax.bitcast_convert_type(magnitude.max(-1), jnp.int32)
    # the scale that makes the largest value 4 to 8
    base = jnp.clip((bits >> 23) - 2, 2, SCALE_NAN - 1)
    best: tuple[jax.Array, ...] | None = None
    for offset in offsets:
        scale = jnp.clip(base + offset, 2, SCALE_NAN - 1)
        wanted = magnitude / half_scale(scale)[..., None]
        grid = jnp.where(wanted < 4, 1.0, jnp.where(wanted < 8, 2.0, 4.0))
        halves = jnp.minimum(jnp.round(wanted / grid) * grid, 12.0)
        # in units of base: squares of the values themselves would leave float32's range
        error = ((halves - wanted) ** 2).sum(-1) * half_scale(2 * (scale - base) + 128)
        if best is None:
            best = halves, scale, error
            continue
        better = error < best[2]
        best = (
            jnp.where(better[..., None], halves, best[0]),
            jnp.where(better, scale, best[1]),
            jnp.where(better, error, best[2]),
        )
    assert best is not None
    return jnp.where(jnp.signbit(grouped), -best[0], best[0]), best[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def nearest(x: Float[Array, "*batch I"], offsets: tuple[int, ...] = (-1, 0, 1)) -> jax.Array:
    """The nearest MXFP4 values, blocks along the last axis; the gradient passes as if nothing were
    rounded.

    Args:
      x: Values; I a multiple of 32.
      offsets: Scales that a block may choose from, relative to the one that makes its largest value
        4 to 8; it takes the one of least squared error.

    Returns:
      float32 of the same shape, exactly what `pack` stores.

    Source: Bengio et al. 2013 (straight-through estimator).
    """
    halves, scale = _round(x, offsets)
    return (halves * half_scale(scale)[..., None]).reshape(x.shape)


nearest.defvjp(
    lambda x, offsets: (nearest(x, offsets), None), lambda offsets, _, gradient: (gradient,)
)


@jax.jit
def encode(x: Float[Array, "*batch I"]) -> MxTensor:
    """`pack` on the device, faster; refuses nothing.

    The same bytes for blocks whose largest value is 2^-120 or more (the device has no subnormals).
    Errors are summed in float32, there in float64: of two scales that are equally good to seven
    digits each may take another, in 1 of 2,073,600 blocks of normal bfloat16 values.

    Args:
      x: Finite values; I a multiple of 32 (`check_blocks`, `check_finite`).
    """
    halves, scale = _round(x, (-1, 0, 1))
    size = jnp.abs(halves)
    codes = jnp.where(size <= 4, size, jnp.where(size == 6, 5.0, jnp.where(size == 8, 6.0, 7.0)))
    codes = codes.astype(jnp.uint8) | (jnp.signbit(halves).astype(jnp.uint8) << 3)
    scale = jnp.where(size.max(-1) > 0, scale, SCALE_BIAS)
    return MxTensor(codes[..., 0::2] | (codes[..., 1::2] << 4), scale.astype(jnp.uint8))


_TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)


def _round_codes(magnitudes: np.ndarray) -> np.ndarray:
    """Nearest e2m1 code of non-negative values, ties to the even code."""
    up = np.searchsorted(_TIES, magnitudes, side="right")
    down = np.searchsorted(_TIES, magnitudes, side="left")
    return np.where(up % 2 == 0, up, down).astype(np.uint8)


def pack(values: np.ndarray) -> MxTensor:
    """Packs values into MXFP4, searching for each block the scale of least squared error.

    Candidates are the scale that makes the largest value 4 to 8 and its neighbours; larger scales
    lose small values, smaller ones clip. Values that are MXFP4 already come back exactly.

    Args:
      values: float array [..., I], I a multiple of 32.

    Returns:
      MxTensor of numpy arrays, blocks uint8 [..., I / 32, 16] and scales uint8 [..., I / 32].

    Raises:
      GptOssError: I is no multiple of 32, or a value is not finite.
    """
    values = np.asarray(values, np.float32)
    check_blocks(values.shape)
    check_finite(np.isfinite(values).all())
    grouped = values.reshape(*values.shape[:-1], -1, BLOCK)
    magnitudes, largest = np.abs(grouped), np.abs(grouped).max(-1)
    base = np.floor(np.log2(np.where(largest > 0, largest, 1.0))).astype(np.int32) - 2
    best_error = np.full(largest.shape, np.inf, np.float64)
    best_scale, best_codes = np.zeros(largest.shape, np.int32), np.zeros(grouped.shape, np.uint8)
    for offset in (-1, 0, 1):
        scale = np.clip(base + offset, -SCALE_BIAS, SCALE_NAN - 1 - SCALE_BIAS)
        codes = _round_codes(np.ldexp(magnitudes, -scale[..., None]))
        error = (
            (np.ldexp(E2M1[codes], scale[..., None]).astype(np.float64) - magnitudes) ** 2
        ).sum(-1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_codes = np.where(better[..., None], codes, best_codes)
    best_scale = np.where(largest > 0, best_scale, 0)
    codes = best_codes | (np.signbit(grouped).astype(np.uint8) << 3)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return MxTensor(blocks, (best_scale + SCALE_BIAS).astype(np.uint8))
