// Products with matrices of bfloat16 that are held in 12 bits a value (compact.h), and how they come to be so.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "compact.h"
#include "host.h"

namespace {

constexpr int64_t kColumns = 2 * Compact::kGroup;  // outputs of one task
constexpr int64_t kPasses = 8;            // over a group of rows of weights, before it pays to unpack them
constexpr int64_t kPacked = 4;            // groups of one task that packs

using Bytes = ffi::Buffer<ffi::U8>;
using Shorts = ffi::Buffer<ffi::U16>;

// x [M, K] with the rows of a compact matrix, of which the last is no row if N is odd -> float32 [M, N].
ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, Bytes rows, Bytes exponents, ffi::Buffer<ffi::S32> starts,
                   Shorts places, Shorts values, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1], N = y->dimensions()[1], even = N + N % 2;
  if (K % 64 || int64_t(rows.element_count()) != even * (K / 2 * 3) || int64_t(exponents.element_count()) != even)
    return ffi::Error::InvalidArgument("shapes do not fit: 64 values of a row are 96 bytes, and rows an even number");
  const Arithmetic* use = arithmetic_for(Kind::kBfloat16);
  const Compact w = {rows.typed_data(),   exponents.typed_data(), starts.typed_data(), places.typed_data(),
                     values.typed_data(), even,                   K};
  const int64_t bytes = use->bytes;
  std::vector<float> made;
  const char* from = static_cast<const char*>(x.untyped_data());
  if (bytes == 4) {
    made = widened(pool, from, M, K);
    from = reinterpret_cast<const char*>(made.data());
  }
  const int64_t passes = use->compact_rows ? (M + use->compact_rows - 1) / use->compact_rows : 0;
  const bool direct = use->compact_rows && passes <= kPasses;
  const int64_t block = std::max<int64_t>(6, gptoss_tuning.cache / (K * bytes) / 6 * 6);
  parallel(pool, (N + kColumns - 1) / kColumns, M * N * K, [&](int64_t i) {
    const int64_t n = kColumns * i, count = std::min(kColumns, N - n);
    float* out = y->typed_data() + n;
    if (direct) {
      for (int64_t c = 0; c < count; c += Compact::kGroup)
        for (int64_t pass = 0; pass < passes; pass++) {
          const int64_t m = M * pass / passes, rows = M * (pass + 1) / passes - m;
          use->compact(from + m * K * bytes, K, int(rows), w, n + c, int(std::min<int64_t>(Compact::kGroup, count - c)),
                       out + m * N + c, N);
        }
      return;
    }
    char* room = static_cast<char*>(scratch<0>(kColumns * K * bytes));
    for (int64_t c = 0; c < count; c += Compact::kGroup) use->unpack_compact(w, n + c, room + c * K * bytes);
    const void** at = static_cast<const void**>(scratch<1>(block * sizeof(void*)));
    float** to = static_cast<float**>(scratch<4>(block * sizeof(float*)));
    for (int64_t start = 0; start < M; start += block) {
      const int64_t some = std::min(block, M - start);
      for (int64_t m = 0; m < some; m++) {
        at[m] = from + (start + m) * K * bytes;
        to[m] = out + (start + m) * N;
      }
      use->tiles(at, int(some), room, K, int(count), int(K), to, 0);
    }
  });
  return ffi::Error::Success();
}

inline int distance(uint16_t value, int exponent) { return (value >> 8 & 127) - exponent; }

inline bool fits(uint16_t value, int exponent) { return unsigned(distance(value, exponent)) < 8; }

// The first of the eight neighbouring exponents, without their last bits, that most values have.
int best_exponent(const uint16_t* row, int64_t K) {
  int counts[128 + 8] = {};
  for (int64_t k = 0; k < K; k++) counts[row[k] >> 8 & 127]++;
  int best = 0, most = -1;
  for (int first = 0; first <= 120; first++) {
    int here = 0;
    for (int j = 0; j < 8; j++) here += counts[first + j];
    if (here >= most) most = here, best = first;
  }
  return best;
}

// 64 values: their low bytes, and codes of four bits in bytes.
void split(const uint16_t* values, int exponent, uint8_t* low, uint8_t* codes) {
  for (int run = 0; run < 8; run++)
    for (int j = 0; j < 8; j++) {
      const uint16_t value = values[32 * (run % 2) + 8 * (run / 2) + j];
      const bool in = fits(value, exponent);
      low[8 * run + j] = in ? value & 255 : 0;
      codes[8 * run + j] = in ? distance(value, exponent) | value >> 15 << 3 : 0;
    }
}

// One row's part of a unit: low bytes, codes in pairs.
void pack(const uint16_t* values, int width, int exponent, uint8_t* to) {
  uint8_t codes[Compact::kUnit];
  for (int start = 0; start < width; start += 64) split(values + start, exponent, to + start, codes + start);
  for (int b = 0; b < width / 2; b++) to[width + b] = codes[b] | codes[width / 2 + b] << 4;
}

// Calls one(n) for the first row of every group.
template <typename F>
void each_group(ffi::ThreadPool& pool, int64_t N, int64_t K, const F& one) {
  const int64_t step = kPacked * Compact::kGroup;
  parallel(pool, (N + step - 1) / step, N * K, [&](int64_t i) {
    for (int64_t n = step * i; n < std::min(step * (i + 1), N); n += Compact::kGroup) one(n);
  });
}

const uint16_t* bits(const ffi::Buffer<ffi::BF16>& w) { return static_cast<const uint16_t*>(w.untyped_data()); }

// w [N, K] -> bytes [N, K / 2 * 3], exponents and how many exceptions every row has [N]; N even: one more if need be.
ffi::Error pack_all(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> w, ffi::ResultBuffer<ffi::U8> bytes,
                    ffi::ResultBuffer<ffi::U8> exponents, ffi::ResultBuffer<ffi::S32> counts) {
  const int64_t N = w.dimensions()[0], K = w.dimensions()[1], even = N + N % 2;
  if (K % 64) return ffi::Error::InvalidArgument("rows must be a multiple of 64 values");
  const Compact as = {nullptr, nullptr, nullptr, nullptr, nullptr, even, K};
  ask_for_huge_pages(bytes->untyped_data(), bytes->size_bytes());
  each_group(pool, even, K, [&](int64_t n) {
    for (int64_t row = n; row < n + rows_of(as, n); row++) {
      const uint16_t* from = bits(w) + row * K;
      const int exponent = row < N ? best_exponent(from, K) : 0;
      int32_t count = 0;
      for (int64_t k = 0; row < N && k < K; k++) count += !fits(from[k], exponent);
      exponents->typed_data()[row] = uint8_t(exponent), counts->typed_data()[row] = count;
    }
    uint8_t* group = bytes->typed_data() + offset_of(as, n);
    each_unit(as, n, [&](int64_t pair, int64_t k, int width, int64_t at) {
      for (int64_t row = n + 2 * pair; row < n + 2 * pair + 2; row++, at += width / 2 * 3)
        if (row < N)
          pack(bits(w) + row * K + k, width, exponents->typed_data()[row], group + at);
        else
          std::memset(group + at, 0, width / 2 * 3);
    });
  });
  return ffi::Error::Success();
}

// The exceptions themselves, each row's from starts[n] on.
ffi::Error exceptions(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> w, Bytes exponents, ffi::Buffer<ffi::S32> starts,
                      ffi::ResultBuffer<ffi::U16> places, ffi::ResultBuffer<ffi::U16> values) {
  const int64_t N = w.dimensions()[0], K = w.dimensions()[1];
  each_group(pool, N, K, [&](int64_t first) {
    for (int64_t n = first; n < std::min<int64_t>(first + Compact::kGroup, N); n++) {
      const uint16_t* row = bits(w) + n * K;
      int32_t at = starts.typed_data()[n];
      for (int64_t k = 0; at < starts.typed_data()[n + 1]; k++)
        if (!fits(row[k], exponents.typed_data()[n]))
          places->typed_data()[at] = uint16_t(k), values->typed_data()[at++] = row[k];
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_compact, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Shorts>()
                                  .Arg<Shorts>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_compact_pack, pack_all,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_compact_exceptions, exceptions,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<Bytes>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::U16>>()
                                  .Ret<ffi::Buffer<ffi::U16>>());
