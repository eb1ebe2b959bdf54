// Packed experts with four rows in turn (arithmetic.h), made of the released bytes.
#include <cstdint>

#include "host.h"

namespace {

using Bytes = ffi::Buffer<ffi::U8>;
using Result = ffi::ResultBuffer<ffi::U8>;

// A block of each of four rows, which lie `row` bytes apart: 16 bytes with values 2 b and 2 b + 1 in the halves of byte b.
void turn(const uint8_t* from, int64_t row, uint8_t* to) {
  uint8_t parts[4][16];  // bytes of the words of even values, and of those of odd ones
  const uint8_t *a = from, *b = a + row, *c = b + row, *d = c + row;
  for (int i = 0; i < 16; i++) {
    parts[0][i] = (a[i] & 15) | b[i] << 4, parts[1][i] = (c[i] & 15) | d[i] << 4;
    parts[2][i] = a[i] >> 4 | (b[i] & 240), parts[3][i] = c[i] >> 4 | (d[i] & 240);
  }
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) to[4 * i + j] = parts[j][i];
}

// blocks [E, ..., U, 16], scales [E, ..., U] of E N rows -> blocks [E, N / 4, U, 64], scales [E, N / 4, U, 4].
ffi::Error four_in_turn(ffi::ThreadPool pool, Bytes blocks, Bytes scales, Result to_blocks, Result to_scales) {
  const auto made = to_blocks->dimensions();
  const int64_t fours = made[0] * made[1], U = made[2];
  if (made[3] != 64 || int64_t(blocks.element_count()) != 64 * fours * U ||
      int64_t(scales.element_count()) != 4 * fours * U || int64_t(to_scales->element_count()) != 4 * fours * U)
    return ffi::Error::InvalidArgument("shapes do not fit: an expert's rows must be a multiple of 4");
  ask_for_huge_pages(to_blocks->untyped_data(), to_blocks->size_bytes());
  parallel(pool, fours, 128 * fours * U, [&](int64_t n) {
    const uint8_t *from = blocks.typed_data() + 64 * n * U, *of = scales.typed_data() + 4 * n * U;
    for (int64_t u = 0; u < U; u++) {
      turn(from + 16 * u, 16 * U, to_blocks->typed_data() + 64 * (n * U + u));
      for (int64_t c = 0; c < 4; c++) to_scales->typed_data()[4 * (n * U + u) + c] = of[c * U + u];
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_four_in_turn, four_in_turn,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Ret<Bytes>()
                                  .Ret<Bytes>());
