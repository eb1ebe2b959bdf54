"""Packed MXFP4 in registers: bytes and block scales -> the values of low and high nibbles.

Exact, and nothing passes through a subnormal, whatever is flushed. Of a code's three bits m,
0x3F00 + 64 m are the bits of f = 0.5, 0.75, 1, 1.5, 2, 3, 4, 6: the value where it is 1 or more,
and below that 2 f - 1 is: min(f, 2 f - 1) is 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.gpu import triton

BYTES = 16  # of a block
# Two codes in the halves of a register at once, 3.5 instructions a value: the compiler makes 10 of
# the same arithmetic written for single values. f - max(1 - f, 0) instead of a minimum, which would
# take a place among the integer instructions. $1: bytes as 16-bit integers, $2: their scales.
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
    bytes_NB: jax.Array, scales_NU: jax.Array, dtype, assembly: bool
) -> tuple[jax.Array, jax.Array]:
    """Values of the low and of the high nibbles, [N, B] each of `dtype`.

    Args:
      bytes_NB: uint8, whole blocks: B a multiple of 16 and a power of two.
      scales_NU: uint8 [N, B / 16]. 2^(scale - 127) is made from its bits: 0, which would be
        subnormal, gives zeros.
      dtype: bfloat16 or float32.
      assembly: By a GPU's own instructions.
    """
    N, B = bytes_NB.shape
    scale = jax.lax.bitcast_convert_type(scales_NU.astype(jnp.int16) << 7, jnp.bfloat16)
    scale = jnp.broadcast_to(scale[:, :, None], (N, B // BYTES, BYTES)).reshape(N, B)
    codes = bytes_NB.astype(jnp.int16)
    if assembly:
        low, high = (triton.assembly(text, codes, scale) for text in (LOW, HIGH))
    else:
        low, high = (_value(c) * scale for c in (codes, codes >> 4))
    return low.astype(dtype), high.astype(dtype)


def _value(codes: jax.Array) -> jax.Array:
    """bfloat16 of int16 whose lowest four bits are codes."""
    f = jax.lax.bitcast_convert_type(((codes & 7) << 6) + jnp.int16(0x3F00), jnp.bfloat16)
    f = jnp.minimum(f, f + f - 1)
    bits = jax.lax.bitcast_convert_type(f, jnp.int16) | ((codes & 8) << 12)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
