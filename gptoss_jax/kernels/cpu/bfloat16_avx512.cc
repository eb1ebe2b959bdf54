// bfloat16 operands by AVX-512: exact products in pairs, float32 sums (vdpbf16ps), MXFP4 by table.
#include <immintrin.h>

#include "arithmetic.h"

namespace {

constexpr int kTall = 3, kWide = 8;      // of a tile of many plain rows
constexpr int kRows = 6;                 // of one that spreads, and of one that unpacks
constexpr int kSome = 8, kNear = 16;        // rows of activations, and of weights, that are read by two rows first
// Bytes of weights that are asked for so far ahead, into the second cache, for the first has too few places for lines that
// are on their way, and products would wait; and from there into the first, where products keep the machine from looking
// ahead itself.
constexpr int kAhead = 8192, kAheadNear = 2304;
constexpr int kHead = 64;  // values of the shortest rows, which are attention's
constexpr int kPart = 1440, kKept = 192;  // values of K at once, and rows whose sums can wait for the next

inline __m512bh load(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

// A scale's values of all codes, for vpermw, which takes five bits of every index: tables hold their 16 values twice.
inline __m512i table_of(uint8_t scale) { return _mm512_load_si512(gptoss_mxfp4_table[scale]); }

// Lanes of four vectors added up, always in this order.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const auto fold = [](__m512 v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  };
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// R rows of activations with C of weights. Weights come from memory: of one row what lies kAhead further is asked for, of
// several the next C, by the `Turn`-th of every `Turns` passes over these its share; 0 turns: nothing is.
template <int R, int C, int Turns, int Turn>
inline void tile(const uint16_t* const* x, const uint16_t* w, int64_t stride, int k0, int k1, bool first, bool last,
                 __m512 (*kept)[kWide], float* const* y, int n) {
  __m512 sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) sums[r][c] = first ? _mm512_setzero_ps() : kept[r][c];
  const uint16_t* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) rows[r] = x[r];
  // Two pointers and multiples of the stride: eight pointers would not fit into registers.
  const uint16_t *low = w + k0, *high = w + 4 * stride + k0;
  for (int64_t k = k0; k < k1; k += 32, low += 32, high += 32) {
    __m512bh a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) a[r] = load(rows[r] + k);
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const uint16_t* at = (c < 4 ? low : high) + (c % 4) * stride;
      const __m512bh b = load(at);
      const char* next = C == 1 ? (const char*)at + kAhead : (const char*)(at + C * stride);
      if (Turns && c % Turns == Turn) _mm_prefetch(next, _MM_HINT_T1);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], a[r], b);
    }
  }
  if (!last) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) kept[r][c] = sums[r][c];
    return;
  }
  const __m512 zero = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    if constexpr (C == 1) {
      _mm_store_ss(y[r] + n, totals(sums[r][0], zero, zero, zero));
    } else {
      static_assert(C == 8);
      _mm_storeu_ps(y[r] + n, totals(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
      _mm_storeu_ps(y[r] + n + 4, totals(sums[r][4], sums[r][5], sums[r][6], sums[r][7]));
    }
  }
}

// Few rows of activations wait for memory, which is fastest where it is read from one end to the other: one row of weights
// after the other.
template <int R>
void few(const uint16_t* const* x, const uint16_t* w, int64_t stride, int n, int N, int K, float* const* y) {
  for (; n < N; n++) tile<R, 1, 1, 0>(x, w + n * stride, stride, 0, K, true, true, nullptr, y, n);
}

// R rows of activations with four packed rows of weights in turn.
template <int R>
void tile_mx(const uint16_t* const* x, const uint8_t* blocks, const uint8_t* scales, int K, float* const* y, int n) {
  __m512 sums[R][4];
  const uint16_t* rows[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    rows[r] = x[r];
    for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
  }
  for (int k = 0; k < K; k += 32, blocks += 64, scales += 4) {
    _mm_prefetch((const char*)blocks + kAhead, _MM_HINT_T1);
    _mm_prefetch((const char*)blocks + kAheadNear, _MM_HINT_T0);
    if (k % 512 == 0) _mm_prefetch((const char*)scales + kAhead / 16, _MM_HINT_T1);
    const __m512i words = _mm512_loadu_si512(blocks);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      const __m512i codes = c ? _mm512_srli_epi16(words, 4 * c) : words;
      const __m512bh b = (__m512bh)_mm512_permutexvar_epi16(codes, table_of(scales[c]));
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], load(rows[r] + k), b);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) _mm_storeu_ps(y[r] + n, totals(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
}

template <template <int> class Call, typename... Rest>
inline void by_rows(int rows, Rest... rest) {
  switch (rows) {
    case 1: return Call<1>::run(rest...);
    case 2: return Call<2>::run(rest...);
    case 3: return Call<3>::run(rest...);
    case 4: return Call<4>::run(rest...);
    case 5: return Call<5>::run(rest...);
    default: return Call<6>::run(rest...);
  }
}

template <int R>
struct TileMx {
  static void run(const uint16_t* const* x, const uint8_t* blocks, const uint8_t* scales, int K, float* const* y, int n) {
    tile_mx<R>(x, blocks, scales, K, y, n);
  }
};

// Eight half rows of weights stay in the first cache while three rows of activations after the other stream by.
template <int R>
inline void pass(int turns, int turn, const uint16_t* const* x, const uint16_t* w, int64_t stride, int k, int end, int K,
                 __m512 (*kept)[kWide], float* const* y, int n) {
  const bool first = k == 0, last = end == K;
  switch (turn < turns ? 4 * turns + turn : 0) {
    case 4: return tile<R, kWide, 1, 0>(x, w, stride, k, end, first, last, kept, y, n);
    case 8: return tile<R, kWide, 2, 0>(x, w, stride, k, end, first, last, kept, y, n);
    case 9: return tile<R, kWide, 2, 1>(x, w, stride, k, end, first, last, kept, y, n);
    case 12: return tile<R, kWide, 3, 0>(x, w, stride, k, end, first, last, kept, y, n);
    case 13: return tile<R, kWide, 3, 1>(x, w, stride, k, end, first, last, kept, y, n);
    case 14: return tile<R, kWide, 3, 2>(x, w, stride, k, end, first, last, kept, y, n);
    default: return tile<R, kWide, 0, 0>(x, w, stride, k, end, first, last, kept, y, n);
  }
}

// Rows of activations with the rows n..N of weights, which are in the second cache if `here`.
void many(bool here, const uint16_t* const* a, int rows, const uint16_t* b, int64_t stride, int n, int N, int K,
          float* const* y) {
  alignas(64) __m512 kept[kKept][kWide];
  const int part = rows <= kKept ? kPart : K, turns = here ? 0 : rows <= kTall ? 1 : rows <= 2 * kTall ? 2 : 3;
  for (; n + kWide <= N; n += kWide)
    for (int k = 0; k < K; k += part) {
      const int end = k + part < K ? k + part : K;
      const uint16_t* from = b + n * stride;
      int m = 0, turn = 0;
      for (; m + kTall <= rows; m += kTall)
        pass<kTall>(turns, turn++, a + m, from, stride, k, end, K, kept + (part < K ? m : 0), y + m, n);
      if (rows - m == 2) pass<2>(turns, turn, a + m, from, stride, k, end, K, kept + (part < K ? m : 0), y + m, n);
      if (rows - m == 1) pass<1>(turns, turn, a + m, from, stride, k, end, K, kept + (part < K ? m : 0), y + m, n);
    }
  for (; n < N; n++)
    for (int m = 0; m < rows; m++) tile<1, 1, 0, 0>(a + m, b + n * stride, stride, 0, K, true, true, nullptr, y + m, n);
}

// 16 vectors of 16 pairs of bfloat16: vector i gets pair i of each.
inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  // Now 128 bits q of v[4 r + p] are pair 4 q + p of vectors 4 r to 4 r + 3.
#pragma GCC unroll 4
  for (int p = 0; p < 4; p++) {
    const __m512i a = _mm512_shuffle_i32x4(v[p], v[4 + p], 0x44), b = _mm512_shuffle_i32x4(v[p], v[4 + p], 0xEE);
    const __m512i c = _mm512_shuffle_i32x4(v[8 + p], v[12 + p], 0x44), d = _mm512_shuffle_i32x4(v[8 + p], v[12 + p], 0xEE);
    t[p] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[4 + p] = _mm512_shuffle_i32x4(a, c, 0xDD);
    t[8 + p] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + p] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = t[i];
}

inline void ask(const void* line, int64_t ahead) { _mm_prefetch((const char*)line + ahead, _MM_HINT_T1); }

// Rows of weights of kHead values are so short that adding lanes up is most of the work: 16 of them are turned over, and
// lanes become vectors. What is added to what is as in `totals`.
void short_rows(const uint16_t* const* x, int rows, const uint16_t* w, int64_t stride, int N, float* const* y,
                int64_t ahead) {
  alignas(64) __m512i turned[2][16];
  for (int n = 0; n + 16 <= N; n += 16) {
    for (int half = 0; half < 2; half++) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(w + (n + i) * stride + 32 * half);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) turned[half][i] = v[i];
    }
    for (int i = 0; ahead && i < 16; i++)
      for (int half = 0; half < 2; half++) ask(w + (n + i) * stride + 32 * half, ahead);
    for (int r = 0; r < rows; r++) {
      const auto lane = [&](int i) __attribute__((always_inline)) {
        int pairs[2];
        __builtin_memcpy(pairs, x[r] + 2 * i, 4);
        __builtin_memcpy(pairs + 1, x[r] + 32 + 2 * i, 4);
        const __m512 first = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)_mm512_set1_epi32(pairs[0]), (__m512bh)turned[0][i]);
        return _mm512_dpbf16_ps(first, (__m512bh)_mm512_set1_epi32(pairs[1]), (__m512bh)turned[1][i]);
      };
      const auto both = [&](int i) __attribute__((always_inline)) { return _mm512_add_ps(lane(i), lane(i + 8)); };
      const auto four = [&](int i) __attribute__((always_inline)) {
        return _mm512_add_ps(_mm512_add_ps(both(i), both(i + 1)), _mm512_add_ps(both(i + 2), both(i + 3)));
      };
      _mm512_storeu_ps(y[r] + n, _mm512_add_ps(four(0), four(4)));
    }
  }
  for (int n = N / 16 * 16; n < N; n++)
    for (int r = 0; r < rows; r++) tile<1, 1, 0, 0>(x + r, w + n * stride, stride, 0, kHead, true, true, nullptr, y + r, n);
}

void tiles(const void* const* x, int rows, const void* w, int64_t stride, int N, int K, float* const* y, int64_t ahead) {
  const uint16_t* const* a = reinterpret_cast<const uint16_t* const*>(x);
  const uint16_t* b = static_cast<const uint16_t*>(w);
  if (K == kHead) return short_rows(a, rows, b, stride, N, y, ahead);
  switch (rows) {
    case 1: return few<1>(a, b, stride, 0, N, K, y);
    case 2: return few<2>(a, b, stride, 0, N, K, y);
    case 3: return few<3>(a, b, stride, 0, N, K, y);
  }
  if (rows > kSome) return many(false, a, rows, b, stride, 0, N, K, y);
  // The first two bring the weights from memory, for the others too.
  for (int n = 0; n < N; n += kNear) {
    const int end = n + kNear < N ? n + kNear : N;
    few<2>(a, b, stride, n, end, K, y);
    many(true, a + 2, rows - 2, b, stride, n, end, K, y + 2);
  }
}

// Few rows of activations stay near while the weights pass, from the second cache but for the first time.
void mx_four(const void* const* x, int rows, const uint8_t* blocks, const uint8_t* scales, int N, int K, float* const* y) {
  const uint16_t* const* a = reinterpret_cast<const uint16_t* const*>(x);
  const int64_t units = K / 32;
  const int passes = (rows + kRows - 1) / kRows;
  for (int pass = 0; pass < passes; pass++) {
    const int m = rows * pass / passes, some = rows * (pass + 1) / passes - m;
    for (int n = 0; n < N; n += 4) by_rows<TileMx>(some, a + m, blocks + n * units * 16, scales + n * units, K, y + m, n);
  }
}

void unpack(const uint8_t* blocks, const uint8_t* scales, int K, void* out) {
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int k = 0; k < K; k += 32, blocks += 16, scales++) {
    // of a byte's word pair the first is looked up by its low nibble, the second by its high one
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)blocks));
    const __m512i codes = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
    _mm512_storeu_si512(to + k, _mm512_permutexvar_epi16(codes, table_of(*scales)));
  }
}

// Pairs of rows beside each other: [N / 2, K, 2], columns of every 32 in the order 0-3 8-11 16-19 24-27, 4-7 ... (what
// unpacking within 128-bit lanes gives); spread undoes it when it reads and writes sums.
void panel(const void* const* w, int N, int K, void* out, int64_t ahead) {
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int n = 0; n < N; n += 2) {
    const uint16_t *a = static_cast<const uint16_t*>(w[n]), *b = static_cast<const uint16_t*>(w[n + 1]);
    for (int k = 0; k < K; k += 32, to += 64) {
      if (ahead) ask(a + k, ahead), ask(b + k, ahead);
      const __m512i x = _mm512_loadu_si512(a + k), y = _mm512_loadu_si512(b + k);
      _mm512_storeu_si512(to, _mm512_unpacklo_epi16(x, y));
      _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi16(x, y));
    }
  }
}

// Two vectors of sums in the panel's order <-> 32 columns in order.
inline void in_order(__m512 low, __m512 high, __m512& first, __m512& second) {
  const __m512i a = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i b = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  first = _mm512_permutex2var_ps(low, a, high);
  second = _mm512_permutex2var_ps(low, b, high);
}

inline void in_pairs(__m512 first, __m512 second, __m512& low, __m512& high) {
  const __m512i a = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i b = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  low = _mm512_permutex2var_ps(first, a, second);
  high = _mm512_permutex2var_ps(first, b, second);
}

template <int R>
struct Spread {
  static void run(const uint16_t* const* g, const uint16_t* panel, int N, int K, float* y, int64_t stride) {
    for (int k = 0; k < K; k += 64) {
      __m512 sums[R][4];
      for (int r = 0; r < R; r++)
        for (int v = 0; v < 4; v += 2) {
          const float* at = y + r * stride + k + 16 * v;
          in_pairs(_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16), sums[r][v], sums[r][v + 1]);
        }
      for (int n = 0; n < N; n += 2) {
        const uint16_t* from = panel + int64_t(n) * K + 2 * k;
        __m512bh b[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) b[v] = load(from + 32 * v);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          int pair;
          __builtin_memcpy(&pair, g[r] + n, 4);
          const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
          for (int v = 0; v < 4; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], a, b[v]);
        }
      }
      for (int r = 0; r < R; r++)
        for (int v = 0; v < 4; v += 2) {
          __m512 first, second;
          in_order(sums[r][v], sums[r][v + 1], first, second);
          _mm512_storeu_ps(y + r * stride + k + 16 * v, first);
          _mm512_storeu_ps(y + r * stride + k + 16 * v + 16, second);
        }
    }
  }
};

void spread(const void* const* g, int rows, const void* from, int N, int K, float* y, int64_t stride) {
  const uint16_t* const* a = reinterpret_cast<const uint16_t* const*>(g);
  const uint16_t* b = static_cast<const uint16_t*>(from);
  for (int m = 0; m < rows; m += kRows)
    by_rows<Spread>(rows - m < kRows ? rows - m : kRows, a + m, b, N, K, y + m * stride, stride);
}

// Without a panel, for one kv head's queries: pairs are made as they are read, half a head's columns at a time.
void spread_eight(const void* const* g, const void* const* w, int N, int K, float* y, int64_t stride, int64_t ahead) {
  const uint16_t* const* from = reinterpret_cast<const uint16_t* const*>(w);
  for (int k = 0; k < K; k += 32) {
    __m512 sums[8][2];
    for (int r = 0; r < 8; r++) {
      const float* at = y + r * stride + k;
      in_pairs(_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16), sums[r][0], sums[r][1]);
    }
    for (int n = 0; n < N; n += 2) {
      if (ahead) ask(from[n] + k, ahead), ask(from[n + 1] + k, ahead);
      const __m512i first = _mm512_loadu_si512(from[n] + k), second = _mm512_loadu_si512(from[n + 1] + k);
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(first, second);
      const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(first, second);
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++) {
        int pair;
        __builtin_memcpy(&pair, static_cast<const uint16_t*>(g[r]) + n, 4);
        const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], a, low);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], a, high);
      }
    }
    for (int r = 0; r < 8; r++) {
      float* at = y + r * stride + k;
      __m512 first, second;
      in_order(sums[r][0], sums[r][1], first, second);
      _mm512_storeu_ps(at, first);
      _mm512_storeu_ps(at + 16, second);
    }
  }
}

#include "compact_avx512.h"

float largest(const float* scores, int count) {
  __m512 found = _mm512_loadu_ps(scores);
  for (int i = 16; i < count; i += 16) found = _mm512_max_ps(found, _mm512_loadu_ps(scores + i));
  return _mm512_reduce_max_ps(found);
}

// exp(x) for x <= 0 to 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf); 0 below -87.
inline __m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  const float rest[5] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (float next : rest) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(next));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ), p, n);
}

float exponentials(const float* scores, int count, float largest, void* out) {
  uint16_t* to = static_cast<uint16_t*>(out);
  const __m512 most = _mm512_set1_ps(largest);
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < count; i += 16) {
    const __m512 value = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), most));
    sum = _mm512_add_ps(sum, value);
    _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(value));
  }
  return _mm512_reduce_add_ps(sum);
}

}  // namespace

extern "C" const Arithmetic gptoss_bfloat16_avx512 = {2,     kCompactRows, tiles,          mx_four, unpack, nullptr,
                                                      compact, unpack_compact, panel, spread, spread_eight, largest, exponentials};
