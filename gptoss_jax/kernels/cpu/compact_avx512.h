// Compact matrices (compact.h) by AVX-512; part of bfloat16_avx512.cc.
#pragma once

constexpr int kCompactRows = 8;        // of activations that are multiplied as weights come from memory

// High bytes of a row's 16 codes, in every 128 bits.
inline __m512i high_bytes(uint8_t exponent) {
  const __m128i codes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -128, -127, -126, -125, -124, -123, -122, -121);
  return _mm512_add_epi8(_mm512_broadcast_i32x4(codes), _mm512_set1_epi8(exponent));
}

inline void interleave(__m512i low, __m512i codes, __m512i table, __m512bh (&out)[2]) {
  const __m512i high = _mm512_shuffle_epi8(table, codes);
  out[0] = (__m512bh)_mm512_unpacklo_epi8(low, high);
  out[1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
}

// The first or second 64 of 128 values.
template <int Half>
inline void read(const uint8_t* at, __m512i table, __m512bh (&out)[2]) {
  const __m512i codes = _mm512_loadu_si512(at + 128);
  interleave(_mm512_loadu_si512(at + 64 * Half),
             _mm512_and_si512(Half ? _mm512_srli_epi16(codes, 4) : codes, _mm512_set1_epi8(15)), table, out);
}

// 64 values alone.
inline void read_last(const uint8_t* at, __m512i table, __m512bh (&out)[2]) {
  const __m256i codes = _mm256_loadu_si256((const __m256i*)(at + 64)), half = _mm256_set1_epi8(15);
  interleave(_mm512_loadu_si512(at),
             _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(codes, half)),
                                _mm256_and_si256(_mm256_srli_epi16(codes, 4), half), 1),
             table, out);
}

// The exceptions of a pair of rows that are still to come.
struct Exceptions {
  const uint16_t *place[2], *end[2], *value[2];

  void begin(const Compact& w, int64_t n) {
    for (int c = 0; c < 2; c++) {
      place[c] = w.places + w.starts[n + c];
      end[c] = w.places + w.starts[n + c + 1];
      value[c] = w.values + w.starts[n + c];
    }
  }
  int64_t next() const {
    const int64_t first = place[0] < end[0] ? *place[0] : INT64_MAX, second = place[1] < end[1] ? *place[1] : INT64_MAX;
    return first < second ? first : second;
  }
};

// 128 or 64 values of a pair from column k on, with their exceptions, the second row's `stride` behind the first's; and the
// column of the next exception.
__attribute__((noinline)) int64_t read_pair(const uint8_t* at, __m512i first, __m512i second, int64_t k, int width,
                                            Exceptions& exceptions, uint16_t* out, int64_t stride) {
  for (int c = 0; c < 2; c++, out += stride) {
    const __m512i table = c ? second : first;
    __m512bh b[2];
    for (int start = 0; start < width; start += 64) {
      if (width < Compact::kUnit)
        read_last(at + 96 * c, table, b);
      else if (start)
        read<1>(at + 192 * c, table, b);
      else
        read<0>(at + 192 * c, table, b);
      _mm512_storeu_si512(out + start, (__m512i)b[0]);
      _mm512_storeu_si512(out + start + 32, (__m512i)b[1]);
    }
    for (; exceptions.place[c] < exceptions.end[c] && *exceptions.place[c] < k + width; exceptions.place[c]++)
      out[*exceptions.place[c] - k] = *exceptions.value[c]++;
  }
  return exceptions.next();
}

// R rows of activations, one part of them in the first cache, with the group of rows that begins at n, of which `count` are wanted.
template <int R>
void compact_group(const uint16_t* x, int64_t x_row, const Compact& w, int64_t n, int count, float* y, int64_t y_row) {
  constexpr int kUnit = Compact::kUnit;
  alignas(64) __m512 kept[Compact::kGroup / 2][R][2];
  alignas(64) uint16_t room[2 * kUnit];
  Exceptions exceptions[Compact::kGroup / 2];
  const uint8_t* at = w.bytes + offset_of(w, n);
  const int64_t part = part_of(w), x_3 = 3 * x_row, x_6 = 6 * x_row;
  const int pairs = int(rows_of(w, n) / 2);
  for (int p = 0; p < pairs; p++) exceptions[p].begin(w, n + 2 * p);
  for (int64_t begin = 0; begin < w.K; begin += part) {
    const int64_t end = begin + part < w.K ? begin + part : w.K;
    for (int p = 0; p < pairs; p++) {
      const __m512i first = high_bytes(w.exponents[n + 2 * p]), second = high_bytes(w.exponents[n + 2 * p + 1]);
      int64_t next = exceptions[p].next();
      __m512 sums[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        for (int c = 0; c < 2; c++) sums[r][c] = begin ? kept[p][r][c] : _mm512_setzero_ps();
      // Three pointers: eight would not fit into registers.
      const uint16_t *low = x + begin, *middle = low + x_3, *high = low + x_6;
      // 64 columns; on the way, evenly, 192 bytes of what follows `here` are asked for.
      const auto add = [&](int from, const __m512bh (&b)[2][2], const uint8_t* here) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const uint16_t* row = r == 5 ? middle + 2 * x_row : r == 3 ? middle : r > 5 ? high + (r - 6) * x_row : low + r * x_row;
            const __m512bh a = load(row + from + 32 * v);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], a, b[0][v]);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], a, b[1][v]);
#pragma GCC unroll 3
            for (int line = 0; line < 3; line++)
              if (2 * R * line / 3 == R * v + r) {
                _mm_prefetch((const char*)here + kAhead + 64 * line, _MM_HINT_T1);
                if (R >= 2) _mm_prefetch((const char*)here + kAheadNear + 64 * line, _MM_HINT_T0);
              }
          }
      };
      const auto add_room = [&](int from, const uint8_t* here) __attribute__((always_inline)) {
        const uint16_t *one = room + from, *other = one + kUnit;
        const __m512bh b[2][2] = {{load(one), load(one + 32)}, {load(other), load(other + 32)}};
        add(from, b, here);
      };
      int64_t k = begin;
      for (; k + kUnit <= end; k += kUnit, low += kUnit, middle += kUnit, high += kUnit, at += 384) {
        if (__builtin_expect(next < k + kUnit, 0)) {
          next = read_pair(at, first, second, k, kUnit, exceptions[p], room, kUnit);
          add_room(0, at);
          add_room(64, at + 192);
          continue;
        }
        __m512bh b[2][2];
        read<0>(at, first, b[0]);
        read<0>(at + 192, second, b[1]);
        add(0, b, at);
        read<1>(at, first, b[0]);
        read<1>(at + 192, second, b[1]);
        add(64, b, at + 192);
      }
      if (k < end) {
        read_pair(at, first, second, k, 64, exceptions[p], room, kUnit);
        add_room(0, at);
        at += 192;
      }
      if (end < w.K) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
          for (int c = 0; c < 2; c++) kept[p][r][c] = sums[r][c];
        continue;
      }
      const __m512 zero = _mm512_setzero_ps();
      const __mmask8 wanted = 2 * p + 1 < count ? 3 : 2 * p < count ? 1 : 0;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        _mm_mask_storeu_ps(y + r * y_row + 2 * p, wanted, totals(sums[r][0], sums[r][1], zero, zero));
    }
  }
}

void compact(const void* x, int64_t x_row, int rows, const Compact& w, int64_t n, int count, float* y, int64_t y_row) {
  const uint16_t* a = static_cast<const uint16_t*>(x);
  switch (rows) {
    case 1: return compact_group<1>(a, x_row, w, n, count, y, y_row);
    case 2: return compact_group<2>(a, x_row, w, n, count, y, y_row);
    case 3: return compact_group<3>(a, x_row, w, n, count, y, y_row);
    case 4: return compact_group<4>(a, x_row, w, n, count, y, y_row);
    case 5: return compact_group<5>(a, x_row, w, n, count, y, y_row);
    case 6: return compact_group<6>(a, x_row, w, n, count, y, y_row);
    case 7: return compact_group<7>(a, x_row, w, n, count, y, y_row);
    default: return compact_group<8>(a, x_row, w, n, count, y, y_row);
  }
}

void unpack_compact(const Compact& w, int64_t n, void* out) {
  uint16_t* to = static_cast<uint16_t*>(out);
  Exceptions exceptions[Compact::kGroup / 2];
  const uint8_t* group = w.bytes + offset_of(w, n);
  for (int p = 0; p < rows_of(w, n) / 2; p++) exceptions[p].begin(w, n + 2 * p);
  each_unit(w, n, [&](int64_t pair, int64_t k, int width, int64_t at) {
    const uint8_t *from = group + at, *exponents = w.exponents + n + 2 * pair;
    for (int line = 0; line < 3 * width; line += 64) _mm_prefetch((const char*)from + kAhead + line, _MM_HINT_T1);
    read_pair(from, high_bytes(exponents[0]), high_bytes(exponents[1]), k, width, exceptions[pair],
              to + 2 * pair * w.K + k, w.K);
  });
}
