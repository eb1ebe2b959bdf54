// A matrix of bfloat16 in 12 bits a value, without loss: of trained and of random weights nearly all exponents of a row are
// within 16 of each other.
//
// A value's low byte (the exponent's last bit and the mantissa) is kept as it is; of its high byte the sign and the distance
// to the row's first exponent, 0 to 7, which is four bits. Values further away are exceptions: zeros here, and a list of
// their own.
//
// The bytes lie as kernels read them, from one end to the other. Rows come in groups of 16, their columns in parts: of eight
// rows of activations one part stays in the first cache. A part of a group is pairs of rows, a pair is 128 values of the one
// and 128 of the other in turn: 128 low bytes and 64 bytes of codes. At the end of a row there may be 64 values of each: 64
// and 32 bytes.
//
// Byte 16 i + 8 v + j of 64 low bytes belongs to value 32 v + 8 i + j: the order in which bytes of two vectors are
// interleaved. Codes are in the same order, of the first half of the 128 (or 64) in the low halves of their bytes.
#pragma once
#include <cstdint>

struct Compact {
  static constexpr int kGroup = 16;   // rows of a group; the last may have less, an even number
  static constexpr int kUnit = 128;   // values of a row beside each other
  static constexpr int kPart = 1024;  // most columns of a part: eight rows of it leave half of a first cache of 32 KB

  const uint8_t* bytes;      // [N, K / 2 * 3], N even
  const uint8_t* exponents;  // [N]: the first one without its last bit
  const int32_t* starts;     // [N + 1]: where a row's exceptions begin
  const uint16_t* places;    // of exceptions: column, ascending
  const uint16_t* values;    // and bfloat16
  int64_t N, K;              // K a multiple of 64
};

// Not shared by units that are compiled for different machines, as what is merely inline would be.
namespace {

// Columns of every part but the last.
inline int64_t part_of(const Compact& w) {
  const int64_t parts = (w.K + Compact::kPart - 1) / Compact::kPart, mean = (w.K + parts - 1) / parts;
  return (mean + Compact::kUnit - 1) / Compact::kUnit * Compact::kUnit;
}

// Rows of the group whose first is n.
inline int64_t rows_of(const Compact& w, int64_t n) { return w.N - n < Compact::kGroup ? w.N - n : Compact::kGroup; }

// Where that group begins, in bytes.
inline int64_t offset_of(const Compact& w, int64_t n) { return n * (w.K / 2 * 3); }

// Calls one(pair, k, width, at) for `width` values from column k on of rows n + 2 pair and n + 2 pair + 1, in the order in
// which a group lies in memory: width / 2 * 3 bytes each, from byte `at` of the group on.
template <typename F>
inline void each_unit(const Compact& w, int64_t n, const F& one) {
  const int64_t part = part_of(w), pairs = rows_of(w, n) / 2;
  int64_t at = 0;
  for (int64_t begin = 0; begin < w.K; begin += part)
    for (int64_t pair = 0; pair < pairs; pair++)
      for (int64_t k = begin; k < w.K && k < begin + part; k += Compact::kUnit) {
        const int width = w.K - k < Compact::kUnit ? 64 : Compact::kUnit;
        one(pair, k, width, at);
        at += 3 * width;
      }
}

}  // namespace
