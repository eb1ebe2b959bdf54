// Float32 arithmetic by the compiler's vectors: compiled once for every instruction set, which NAME and WIDTH tell apart.
#include "arithmetic.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
constexpr int kRows = WIDTH == 16 ? 6 : 3, kColumns = WIDTH == 4 ? 2 : 4;

inline Vector load(const float* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vector v) { __builtin_memcpy(p, &v, sizeof v); }

inline float total(Vector v) {
  float lanes[WIDTH];
  store(lanes, v);
  for (int half = WIDTH / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Sums of the lanes of four vectors, each in the order of `total`.
inline void totals(const Vector* v, float* to) {
#if WIDTH == 16
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all)));
#elif WIDTH == 8
  const __m256 a = (__m256)v[0], b = (__m256)v[1], c = (__m256)v[2], d = (__m256)v[3];
  const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  const __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
  __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  all = _mm256_add_ps(_mm256_shuffle_ps(all, all, 0x88), _mm256_shuffle_ps(all, all, 0xdd));
  const __m256 order = _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  _mm_storeu_ps(to, _mm256_castps256_ps128(order));
#else
  for (int i = 0; i < 4; i++) to[i] = total(v[i]);
#endif
}

template <int R, int C>
void tile(const float* const* x, const float* w, int64_t stride, int K, float* const* y, int n) {
  Vector sums[R][C] = {};
  for (int k = 0; k < K; k += WIDTH) {
    Vector b[C];
    for (int c = 0; c < C; c++) b[c] = load(w + c * stride + k);
    for (int r = 0; r < R; r++) {
      const Vector a = load(x[r] + k);
      for (int c = 0; c < C; c++) sums[r][c] += a * b[c];
    }
  }
  for (int r = 0; r < R; r++)
    if constexpr (C == 4)
      totals(sums[r], y[r] + n);
    else
      for (int c = 0; c < C; c++) y[r][n + c] = total(sums[r][c]);
}

template <int R>
void columns(const float* const* x, const float* w, int64_t stride, int N, int K, float* const* y) {
  int n = 0;
  for (; n + kColumns <= N; n += kColumns) tile<R, kColumns>(x, w + n * stride, stride, K, y, n);
  for (; n < N; n++) tile<R, 1>(x, w + n * stride, stride, K, y, n);
}

void tiles(const void* const* x, int rows, const void* w, int64_t stride, int N, int K, float* const* y, int64_t) {
  const float* const* a = reinterpret_cast<const float* const*>(x);
  const float* b = static_cast<const float*>(w);
  int m = 0;
  // Few columns stay in the first cache while all rows pass.
  for (int n = 0; n < N; n += kColumns) {
    const int count = N - n < kColumns ? N - n : kColumns;
    float* at[kRows];
    for (m = 0; m + kRows <= rows; m += kRows) {
      for (int r = 0; r < kRows; r++) at[r] = y[m + r] + n;
      columns<kRows>(a + m, b + n * stride, stride, count, K, at);
    }
    for (; m < rows; m++) {
      at[0] = y[m] + n;
      columns<1>(a + m, b + n * stride, stride, count, K, at);
    }
  }
}

typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));

inline Integers codes_of(const uint8_t* bytes) {
#if WIDTH == 16
  return (Integers)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
#elif WIDTH == 8
  return (Integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
#else
  Bytes loaded;
  __builtin_memcpy(&loaded, bytes, sizeof loaded);
  return __builtin_convertvector(loaded, Integers);
#endif
}

// Values of 4-bit codes in halves, signed: small integers, so that nothing passes through a subnormal.
inline Vector halves_of(Integers codes) {
#if WIDTH == 16
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12);
  return (Vector)_mm512_permutexvar_ps((__m512i)codes, table);
#elif WIDTH == 8
  const __m256 table = _mm256_setr_ps(0, 1, 2, 3, 4, 6, 8, 12);
  const __m256 size = _mm256_permutevar8x32_ps(table, (__m256i)codes);  // by three bits
  return (Vector)_mm256_or_ps(size, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)(codes & 8), 28)));
#else
  const Integers m = codes & 7;
  const Integers halves = m + ((m > 4) & (m - 4)) + ((m > 6) & 2);
  return (Vector)((Integers)__builtin_convertvector(halves, Vector) | (codes & 8) << 28);
#endif
}

inline float half_of(uint8_t scale) {
  const uint32_t bits = scale > 1 ? uint32_t(scale - 1) << 23 : 0;  // 2^(scale - 128)
  float half;
  __builtin_memcpy(&half, &bits, 4);
  return half;
}

void unpack(const uint8_t* blocks, const uint8_t* scales, int K, void* out) {
  float* to = static_cast<float*>(out);
  for (int u = 0; u < K / 32; u++, to += 32, blocks += 16) {
    const float half = half_of(scales[u]);
    float low[16], high[16];
    for (int i = 0; i < 16; i += WIDTH) {
      const Integers codes = codes_of(blocks + i);
      store(low + i, halves_of(codes & 15) * half);
      store(high + i, halves_of(codes >> 4) * half);
    }
    for (int i = 0; i < 16; i++) to[2 * i] = low[i], to[2 * i + 1] = high[i];
  }
}

void unpack_four(const uint8_t* blocks, const uint8_t* scales, int K, void* out) {
  float* to = static_cast<float*>(out);
  for (int k = 0; k < K; k += 32, blocks += 64, scales += 4)
    for (int c = 0; c < 4; c++) {
      const float half = half_of(scales[c]);
      for (int i = 0; i < 32; i += WIDTH) {
        uint16_t words __attribute__((vector_size(2 * WIDTH)));
        __builtin_memcpy(&words, blocks + 2 * i, sizeof words);
        const Integers codes = __builtin_convertvector(words, Integers);
        store(to + int64_t(c) * K + k + i, halves_of(codes >> 4 * c & 15) * half);
      }
    }
}

void unpack_compact(const Compact& w, int64_t n, void* out) {
  float* to = static_cast<float*>(out);
  const uint8_t* group = w.bytes + offset_of(w, n);
  const auto widened = [](uint32_t bits) {
    float value;
    bits <<= 16;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  };
  each_unit(w, n, [&](int64_t pair, int64_t k, int width, int64_t at) {
    for (int64_t row = 2 * pair; row < 2 * pair + 2; row++, at += width / 2 * 3) {
      const uint8_t *low = group + at, *codes = low + width;
      for (int b = 0; b < width; b++) {
        const int code = b < width / 2 ? codes[b] & 15 : codes[b - width / 2] >> 4, run = b % 64 / 8;
        const uint32_t high = (code >> 3 << 7) | (w.exponents[n + row] + (code & 7));
        to[row * w.K + k + b / 64 * 64 + 32 * (run % 2) + 8 * (run / 2) + b % 8] = widened(high << 8 | low[b]);
      }
    }
  });
  for (int64_t row = 0; row < rows_of(w, n); row++)
    for (int32_t i = w.starts[n + row]; i < w.starts[n + row + 1]; i++) to[row * w.K + w.places[i]] = widened(w.values[i]);
}

void panel(const void* const* w, int N, int K, void* out, int64_t) {
  for (int n = 0; n < N; n++) __builtin_memcpy(static_cast<float*>(out) + int64_t(n) * K, w[n], 4 * uint64_t(K));
}

template <int R>
void spread_rows(const float* const* g, const float* panel, int N, int K, float* y, int64_t stride) {
  constexpr int kVectors = 2;
  for (int k = 0; k < K; k += kVectors * WIDTH) {
    Vector sums[R][kVectors];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kVectors; v++) sums[r][v] = load(y + r * stride + k + v * WIDTH);
    for (int n = 0; n < N; n++)
      for (int v = 0; v < kVectors; v++) {
        const Vector b = load(panel + int64_t(n) * K + k + v * WIDTH);
        for (int r = 0; r < R; r++) sums[r][v] += b * g[r][n];
      }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < kVectors; v++) store(y + r * stride + k + v * WIDTH, sums[r][v]);
  }
}

void spread(const void* const* g, int rows, const void* from, int N, int K, float* y, int64_t stride) {
  const float* const* a = reinterpret_cast<const float* const*>(g);
  const float* b = static_cast<const float*>(from);
  int m = 0;
  for (; m + kRows <= rows; m += kRows) spread_rows<kRows>(a + m, b, N, K, y + m * stride, stride);
  for (; m < rows; m++) spread_rows<1>(a + m, b, N, K, y + m * stride, stride);
}

float largest(const float* scores, int count) {
  Vector most = load(scores);
  for (int i = WIDTH; i < count; i += WIDTH) {
    const Vector next = load(scores + i);
    most = next > most ? next : most;
  }
  float found = most[0];
  for (int i = 1; i < WIDTH; i++) found = most[i] > found ? most[i] : found;
  return found;
}

// exp(x) for x <= 0 to 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf); 0 below -87. Written in
// vectors: compilers leave the loop of scalars as it is.
inline Vector exponential(Vector x) {
  const Vector least = Vector{} - 87.0f, value = x > least ? x : least;
  const Integers n = __builtin_convertvector(value * 1.44269504f - 0.5f, Integers);
  const Vector whole = __builtin_convertvector(n, Vector);
  const Vector r = (value - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vector power = (Vector)((n + 127) << 23);
  return x > least ? p * power : Vector{};
}

float exponentials(const float* scores, int count, float largest, void* out) {
  float* to = static_cast<float*>(out);
  Vector sum = {};
  for (int i = 0; i < count; i += WIDTH) {
    const Vector value = exponential(load(scores + i) - largest);
    store(to + i, value);
    sum += value;
  }
  return total(sum);
}

template <int R, int V>
void product_tile(const float* g, int64_t g_row, int64_t g_step, const float* w, int64_t w_row, int N, float* y,
                  int64_t y_row, bool add) {
  Vector sums[R][V] = {};
  if (add)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sums[r][v] = load(y + r * y_row + v * WIDTH);
  for (int n = 0; n < N; n++, g += g_step, w += w_row) {
    Vector b[V];
    for (int v = 0; v < V; v++) b[v] = load(w + v * WIDTH);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sums[r][v] += b[v] * g[r * g_row];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(y + r * y_row + v * WIDTH, sums[r][v]);
}

template <int R>
void product_rows(const float* g, int64_t g_row, int64_t g_step, const float* w, int64_t w_row, int N, int K, float* y,
                  int64_t y_row, bool add) {
  constexpr int kVectors = WIDTH == 16 ? 4 : 2;
  int k = 0;
  for (; k + kVectors * WIDTH <= K; k += kVectors * WIDTH)
    product_tile<R, kVectors>(g, g_row, g_step, w + k, w_row, N, y + k, y_row, add);
  for (; k + 2 * WIDTH <= K; k += 2 * WIDTH)
    product_tile<R, 2>(g, g_row, g_step, w + k, w_row, N, y + k, y_row, add);
  if (k < K) product_tile<R, 1>(g, g_row, g_step, w + k, w_row, N, y + k, y_row, add);
}

void product(const float* g, int64_t g_row, int64_t g_step, int rows, const float* w, int64_t w_row, int N, int K,
             float* y, int64_t y_row, bool add) {
  for (; rows >= kRows; rows -= kRows, g += kRows * g_row, y += kRows * y_row)
    product_rows<kRows>(g, g_row, g_step, w, w_row, N, K, y, y_row, add);
  switch (rows) {
    case 5: return product_rows<kRows == 6 ? 5 : 1>(g, g_row, g_step, w, w_row, N, K, y, y_row, add);
    case 4: return product_rows<kRows == 6 ? 4 : 1>(g, g_row, g_step, w, w_row, N, K, y, y_row, add);
    case 3: return product_rows<kRows == 6 ? 3 : 1>(g, g_row, g_step, w, w_row, N, K, y, y_row, add);
    case 2: return product_rows<2>(g, g_row, g_step, w, w_row, N, K, y, y_row, add);
    case 1: return product_rows<1>(g, g_row, g_step, w, w_row, N, K, y, y_row, add);
  }
}

void transpose(const float* w, int64_t w_row, int N, int K, float* out, int64_t out_row) {
  int n = 0;
#if defined(__SSE__)
  for (; n + 4 <= N; n += 4)
    for (int k = 0; k < K; k += 4) {
      const float* from = w + n * w_row + k;
      float* to = out + k * out_row + n;
      __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + w_row), c = _mm_loadu_ps(from + 2 * w_row),
             d = _mm_loadu_ps(from + 3 * w_row);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(to, a);
      _mm_storeu_ps(to + out_row, b);
      _mm_storeu_ps(to + 2 * out_row, c);
      _mm_storeu_ps(to + 3 * out_row, d);
    }
#endif
  for (; n < N; n++)
    for (int k = 0; k < K; k++) out[k * out_row + n] = w[n * w_row + k];
}

void mask(float* scores, const int32_t* positions, const int32_t* segments, int count, int32_t after, int32_t last,
          int32_t segment) {
  const float none = -__builtin_inff();
  if (segments)
    for (int i = 0; i < count; i++) {
      const bool seen = (positions[i] > after) & (positions[i] <= last) & (segments[i] == segment);
      scores[i] = seen ? scores[i] : none;
    }
  else
    for (int i = 0; i < count; i++) {
      const bool seen = (positions[i] > after) & (positions[i] <= last);
      scores[i] = seen ? scores[i] : none;
    }
}

void through_softmax(const float* weights, float mean, int count, float* d) {
  for (int i = 0; i < count; i++) d[i] = weights[i] * (d[i] - mean);
}

#include "between.h"

}  // namespace

extern "C" const Arithmetic NAME = {
    4,       0,            tiles,   nullptr,   unpack, unpack_four,     nullptr, unpack_compact, panel, spread, nullptr,
    largest, exponentials, product, transpose, mask,   through_softmax, swiglu,  swiglu_gradient, rotate, triple,
    scaled,  cross_entropy};
