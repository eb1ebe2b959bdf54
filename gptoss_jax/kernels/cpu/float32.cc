// Float32 arithmetic by the compiler's vectors: compiled once for every instruction set, which NAME and WIDTH tell apart.
#include "arithmetic.h"

#if WIDTH > 4
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
    for (int c = 0; c < C; c++) y[r][n + c] = total(sums[r][c]);
}

template <int R>
void columns(const float* const* x, const float* w, int64_t stride, int N, int K, float* const* y) {
  int n = 0;
  for (; n + kColumns <= N; n += kColumns) tile<R, kColumns>(x, w + n * stride, stride, K, y, n);
  for (; n < N; n++) tile<R, 1>(x, w + n * stride, stride, K, y, n);
}

void tiles(const void* const* x, int rows, const void* w, int64_t stride, int N, int K, float* const* y) {
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

void unpack(const uint8_t* blocks, const uint8_t* scales, int K, void* out) {
  float* to = static_cast<float*>(out);
  for (int u = 0; u < K / 32; u++, to += 32, blocks += 16) {
    const uint32_t bits = scales[u] > 1 ? uint32_t(scales[u] - 1) << 23 : 0;  // 2^(scale - 128)
    float half;
    __builtin_memcpy(&half, &bits, 4);
    for (int i = 0; i < 16; i += WIDTH) {
      const Integers codes = codes_of(blocks + i);
      store(to + i, halves_of(codes & 15) * half);
      store(to + 16 + i, halves_of(codes >> 4) * half);
    }
  }
}

void panel(const void* const* w, int N, int K, void* out) {
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
  float found = scores[0];
  for (int i = 1; i < count; i++) found = scores[i] > found ? scores[i] : found;
  return found;
}

// exp(x) for x <= 0 to 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf); 0 below -87.
void exponentials_of(const float* x, float largest, int count, float* to) {
  for (int i = 0; i < count; i++) {
    const float wanted = x[i] - largest, value = wanted > -87.0f ? wanted : -87.0f;
    const int n = int(value * 1.44269504f - 0.5f);
    const float r = (value - float(n) * 0.693359375f) + float(n) * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int bits = (n + 127) << 23;
    float scale;
    __builtin_memcpy(&scale, &bits, 4);
    to[i] = wanted > -87.0f ? p * scale : 0.0f;
  }
}

float exponentials(const float* scores, int count, float largest, void* out) {
  float* to = static_cast<float*>(out);
  exponentials_of(scores, largest, count, to);
  Vector sum = {};
  for (int i = 0; i < count; i += WIDTH) sum += load(to + i);
  return total(sum);
}

}  // namespace

extern "C" const Arithmetic NAME = {4,      32,    0,      tiles,   nullptr,
                                    unpack, panel, spread, largest, exponentials};
