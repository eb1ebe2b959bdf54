"""Packed MXFP4 in registers: bytes and block scales -> the values of low and high nibbles, in two
ways that give the same numbers.

Quickly, for scales up to 2: a code's sign and three bits m, put where bfloat16 has its sign and the
lowest bits of the exponent and highest of the mantissa, are the value times 2^-126, and one product
with 2^(126 + scale - 127) is exact. That takes 0.5 through a subnormal; PTX has no flushing form of
a bfloat16 product.

For any scale, and nothing passes through a subnormal: 0x3F00 + 64 m are the bits of f = 0.5,
0.75, 1, 1.5, 2, 3, 4, 6: the value where it is 1 or more, and below that 2 f - 1 is. min(f, 2 f -
1) is 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.gpu import triton

BYTES = 16  # of a block
QUICK = 128  # the largest scale byte whose factor 2^(byte - 1) is finite
# Two codes in the halves of a register at once: the compiler makes three times as many of the same
# arithmetic written for single values. $1: bytes as 16-bit integers, $2: their scales.
# The product puts a nibble 12 and 6 places up (or 8 and 2); 2 instructions a value with the mask.
QUICK_ASSEMBLY = """{{
  .reg .b32 t, zero;
  mov.b32 zero, 0x80008000;
  and.b32 t, $1, {mask};
  mul.lo.u32 t, t, {factor};
  and.b32 t, t, 0x81C081C0;
  fma.rn.bf16x2 $0, t, $2, zero;
}}"""
QUICK_LOW = QUICK_ASSEMBLY.format(mask="0x000F000F", factor="0x1040")
QUICK_HIGH = QUICK_ASSEMBLY.format(mask="0x00F000F0", factor="0x0104")
# 3.5 instructions a value. f - max(1 - f, 0) instead of a minimum, which would take a place among
# the integer instructions.
ASSEMBLY = """{{
  .reg .b32 f, g, s, one, minus, zero;
  mov.b32 one, 0x3F803F80;
  mov.b32 minus, 0xBF80BF80;
  mov.b32 zero, 0x80008000;
  and.b32 f, $1, {mask};
  mad.lo.u32 f, f, {factor}, 0x3F003F00;
  fma.rn.relu.bf16x2 g, f, minus, one;
  fma.rn.bf16x2 f, g, minus, f;
  shl.b32 s, $1, {sign};
  lop3.b32 f, s, 0x80008000, f, 0xEA;
  fma.rn.bf16x2 $0, f, $2, zero;
}}"""
LOW = ASSEMBLY.format(mask="0x00070007", factor=64, sign=12)
HIGH = ASSEMBLY.format(mask="0x00700070", factor=4, sign=8)


def unpack(
    bytes_NB: jax.Array, scales_NU: jax.Array, dtype, assembly: bool, quick: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Values of the low and of the high nibbles, [N, B] each of `dtype`.

    Args:
      bytes_NB: uint8, whole blocks: B a multiple of 16 and a power of two.
      scales_NU: uint8 [N, B / 16]. 2^(scale - 127) is made from its bits: 0, which would be
        subnormal, gives zeros.
      dtype: bfloat16 or float32.
      assembly: By a GPU's own instructions.
      quick: In the quick way; what scales above QUICK give is nothing.
    """
    N, B = bytes_NB.shape
    exponents = scales_NU.astype(jnp.int16)
    if quick and assembly:
        exponents += 126
    scale = jax.lax.bitcast_convert_type(exponents << 7, jnp.bfloat16)
    if quick and not assembly:
        scale = jnp.where(scales_NU > QUICK, jnp.inf, scale).astype(scale.dtype)
    scale = jnp.broadcast_to(scale[:, :, None], (N, B // BYTES, BYTES)).reshape(N, B)
    if assembly:
        codes = triton.widened(bytes_NB)
        texts = (QUICK_LOW, QUICK_HIGH) if quick else (LOW, HIGH)
        low, high = (triton.assembly(text, codes, scale) for text in texts)
    else:
        codes = bytes_NB.astype(jnp.int16)
        low, high = (_value(c) * scale for c in (codes, codes >> 4))
    return low.astype(dtype), high.astype(dtype)


def _value(codes: jax.Array) -> jax.Array:
    """bfloat16 of int16 whose lowest four bits are codes."""
    f = jax.lax.bitcast_convert_type(((codes & 7) << 6) + jnp.int16(0x3F00), jnp.bfloat16)
    f = jnp.minimum(f, f + f - 1)
    bits = jax.lax.bitcast_convert_type(f, jnp.int16) | ((codes & 8) << 12)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
