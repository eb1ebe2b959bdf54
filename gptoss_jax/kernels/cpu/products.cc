// Products of activations with rows of weights (bfloat16, float32 or packed MXFP4), for XLA's CPU client.
//
// Every row of activations names the experts whose weights it is multiplied with; dense weights are one expert. Rows are
// grouped by expert, an expert's outputs are cut into tasks, and XLA's own threads take one task after another. A task
// unpacks its few rows of weights into the second cache once, and multiplies all rows of activations with them.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "host.h"

Tuning gptoss_tuning;

namespace {

constexpr int kSpreadColumns = 256;  // inputs of one task of the transposed product
constexpr int kSpreadRows = 256;     // rows of weights that it unpacks at once

struct Problem {
  const Arithmetic* use;
  const void* x;  // [rows, inputs]: bfloat16 or float32
  Kind x_kind;
  const int32_t* experts;  // [rows, choices]
  const void* w;           // [E, N, K] or blocks [E, N, K / 32, 16] or, four rows in turn, [E, N / 4, K / 32, 64]
  const uint8_t* scales;
  Kind kind;
  bool four;
  int64_t rows, choices, E, N, K;
  float* y;

  bool in_place() const { return kind == (use->bytes == 2 ? Kind::kBfloat16 : Kind::kFloat32); }
  // Rows of activations as operands; `made` is used where they must be made.
  const char* activations(ffi::ThreadPool& pool, int64_t count, int64_t width, std::vector<float>& made) const {
    if (x_kind == Kind::kFloat32 || use->bytes == 2) return static_cast<const char*>(x);
    made = widened(pool, x, count, width);
    return reinterpret_cast<const char*>(made.data());
  }
  const uint8_t* blocks(int64_t row) const { return static_cast<const uint8_t*>(w) + row * K / 2; }
  // Rows of an expert's weights as operands; `to` is used where they must be made.
  const void* weights(int64_t expert, int64_t n, int64_t count, char* to) const {
    const int64_t row = expert * N + n, bytes = use->bytes;
    if (in_place()) return static_cast<const char*>(w) + row * K * bytes;
    if (kind == Kind::kBfloat16) {
      copy_rows(kind, static_cast<const uint16_t*>(w) + row * K, K, count, K, reinterpret_cast<float*>(to));
      return to;
    }
    const auto unpack = four ? use->unpack_four : use->unpack;
    for (int64_t c = 0; c < count; c += four ? 4 : 1)
      unpack(blocks(row + c), scales + (row + c) * (K / 32), int(K), to + c * K * bytes);
    return to;
  }
};

// Pairs (row, choice) of every expert, in order; of those that are nobody's the results are zeros.
struct Groups {
  std::vector<int64_t> pairs, starts;
  Groups(const Problem& p, int64_t outputs) : pairs(p.rows * p.choices), starts(p.E + 1, 0) {
    for (size_t i = 0; i < pairs.size(); i++) {
      const int64_t expert = p.experts[i];
      if (expert >= 0 && expert < p.E)
        starts[expert + 1]++;
      else
        std::memset(p.y + i * outputs, 0, 4 * outputs);
    }
    for (int64_t e = 0; e < p.E; e++) starts[e + 1] += starts[e];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (size_t i = 0; i < pairs.size(); i++) {
      const int64_t expert = p.experts[i];
      if (expert >= 0 && expert < p.E) pairs[next[expert]++] = int64_t(i);
    }
  }
};

// y [rows, choices, N] = x [rows, K] with the rows of each chosen expert. Tasks begin at multiples of four rows.
void multiply(ffi::ThreadPool& pool, const Problem& p) {
  const Groups groups(p, p.N);
  const int64_t bytes = p.use->bytes;
  std::vector<float> made;
  const char* x = p.activations(pool, p.rows, p.K, made);
  const bool direct = p.four && p.use->mx_four;
  const int64_t step = gptoss_tuning.columns;
  struct Task {
    int64_t expert, n, count;
  };
  std::vector<Task> tasks;
  for (int64_t e = 0; e < p.E; e++) {
    const int64_t rows = groups.starts[e + 1] - groups.starts[e];
    for (int64_t n = 0; rows && n < p.N; n += step) tasks.push_back({e, n, std::min(step, p.N - n)});
  }
  const int64_t block = std::max<int64_t>(6, gptoss_tuning.cache / (p.K * bytes) / 6 * 6);
  parallel(pool, int64_t(tasks.size()), p.rows * p.choices * p.N * p.K, [&](int64_t i) {
    const auto [e, n, count] = tasks[i];
    const int64_t* pairs = groups.pairs.data() + groups.starts[e];
    const int64_t rows = groups.starts[e + 1] - groups.starts[e];
    char* room = direct || p.in_place() ? nullptr : static_cast<char*>(scratch<0>(count * p.K * bytes));
    const void* w = direct ? nullptr : p.weights(e, n, count, room);
    const void** at = static_cast<const void**>(scratch<1>(block * sizeof(void*)));
    float** to = static_cast<float**>(scratch<4>(block * sizeof(float*)));
    for (int64_t start = 0; start < rows; start += block) {
      const int64_t some = std::min(block, rows - start);
      for (int64_t m = 0; m < some; m++) {
        at[m] = x + pairs[start + m] / p.choices * p.K * bytes;
        to[m] = p.y + pairs[start + m] * p.N + n;
      }
      const int64_t row = e * p.N + n;
      if (direct)
        p.use->mx_four(at, int(some), p.blocks(row), p.scales + row * (p.K / 32), int(count), int(p.K), to);
      else
        p.use->tiles(at, int(some), w, p.K, int(count), int(p.K), to, 0);
    }
  });
}

// y [rows, choices, K] = g [rows, choices, N] times the chosen experts' rows: the gradient of `multiply`.
void multiply_transposed(ffi::ThreadPool& pool, const Problem& p) {
  const Groups groups(p, p.K);
  const int64_t bytes = p.use->bytes;
  std::vector<float> made;
  const char* g = p.activations(pool, p.rows * p.choices, p.N, made);
  struct Task {
    int64_t expert, k;
  };
  std::vector<Task> tasks;
  for (int64_t e = 0; e < p.E; e++)
    for (int64_t k = 0; groups.starts[e + 1] > groups.starts[e] && k < p.K; k += kSpreadColumns)
      tasks.push_back({e, k});
  constexpr int64_t kBlock = 96;
  parallel(pool, int64_t(tasks.size()), p.rows * p.choices * p.N * p.K, [&](int64_t i) {
    const auto [e, k] = tasks[i];
    const int64_t* pairs = groups.pairs.data() + groups.starts[e];
    const int64_t rows = groups.starts[e + 1] - groups.starts[e];
    const int64_t columns = std::min<int64_t>(kSpreadColumns, p.K - k), wide = (columns + 63) / 64 * 64;
    char* unpacked = static_cast<char*>(scratch<0>(2 * wide * bytes));
    char* panel = static_cast<char*>(scratch<2>(kSpreadRows * wide * bytes));
    float* sums = static_cast<float*>(scratch<3>(kBlock * wide * 4));
    const void* at[kBlock];
    for (int64_t start = 0; start < rows; start += kBlock) {
      const int64_t some = std::min(kBlock, rows - start);
      std::memset(sums, 0, some * wide * 4);
      for (int64_t n = 0; n < p.N; n += kSpreadRows) {
        const int64_t deep = std::min<int64_t>(kSpreadRows, p.N - n);
        for (int64_t d = 0; d < deep; d += 2) {
          const void* two[2];
          for (int64_t j = 0; j < 2; j++) {
            char* to = unpacked + j * wide * bytes;
            const int64_t row = e * p.N + n + d + j;
            if (p.kind == Kind::kPacked) {
              p.use->unpack(p.blocks(row) + k / 2, p.scales + (row * p.K + k) / 32, int(columns), to);
            } else if (p.in_place()) {
              std::memcpy(to, static_cast<const char*>(p.w) + (row * p.K + k) * bytes, columns * bytes);
            } else {
              const uint16_t* from = static_cast<const uint16_t*>(p.w) + row * p.K + k;
              for (int64_t c = 0; c < columns; c++) reinterpret_cast<float*>(to)[c] = widen(from[c]);
            }
            // What lies behind the last column is multiplied and not written; only its bits must be numbers.
            std::memset(to + columns * bytes, 0, (wide - columns) * bytes);
            two[j] = to;
          }
          p.use->panel(two, 2, int(wide), panel + d * wide * bytes, 0);
        }
        for (int64_t m = 0; m < some; m++) at[m] = g + (pairs[start + m] * p.N + n) * bytes;
        p.use->spread(at, int(some), panel, int(deep), int(wide), sums, wide);
      }
      for (int64_t m = 0; m < some; m++) std::memcpy(p.y + pairs[start + m] * p.K + k, sums + m * wide, columns * 4);
    }
  });
}

// x [rows, K] (or g [rows, choices, N] if transposed), experts [rows, choices], weights [E, N, K] or blocks [E, N, U, 16]
// and scales [E, N, U] (any array for plain weights), or, four rows in turn and not transposed, [E, N / 4, U, 64] and [E, N /
// 4, U, 4] -> float32 [rows, choices, N] (or K).
ffi::Error product(ffi::ThreadPool pool, bool transposed, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> experts,
                   ffi::AnyBuffer weights, ffi::AnyBuffer scales, ffi::ResultBuffer<ffi::F32> y) {
  const auto x_kind = kind_of(x.element_type()), kind = kind_of(weights.element_type());
  if (!x_kind.has_value()) return x_kind.error();
  if (!kind.has_value()) return kind.error();
  Problem p;
  p.x_kind = x_kind.value(), p.kind = kind.value();
  p.use = arithmetic_for(p.x_kind == Kind::kBfloat16 && p.kind != Kind::kFloat32 ? Kind::kBfloat16 : Kind::kFloat32);
  p.x = x.untyped_data(), p.w = weights.untyped_data();
  p.scales = static_cast<const uint8_t*>(scales.untyped_data());
  p.experts = experts.typed_data(), p.y = y->typed_data();
  p.rows = experts.dimensions()[0], p.choices = experts.dimensions()[1];
  p.four = p.kind == Kind::kPacked && weights.dimensions()[3] == 64;
  p.E = weights.dimensions()[0], p.N = weights.dimensions()[1] * (p.four ? 4 : 1);
  p.K = weights.dimensions()[2] * (p.kind == Kind::kPacked ? 32 : 1);
  const int64_t inputs = transposed ? p.choices * p.N : p.K;
  if (p.K % 32 || (transposed && (p.N % 2 || p.four)) || int64_t(x.element_count()) != p.rows * inputs)
    return ffi::Error::InvalidArgument(
        "shapes do not fit: K must be a multiple of 32, and for the transposed product N even and rows one after the other");
  if (transposed)
    multiply_transposed(pool, p);
  else
    multiply(pool, p);
  return ffi::Error::Success();
}

}  // namespace

// Names of what this machine can compute with, the best first, by spaces.
extern "C" void gptoss_tune(int64_t columns, int64_t cache) {
  gptoss_tuning = {columns, cache};
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("transposed")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
