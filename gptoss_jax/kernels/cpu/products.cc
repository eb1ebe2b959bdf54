// Products of activations with rows of weights (bfloat16, float32 or packed MXFP4), for XLA's CPU client.
//
// Every row of activations names the experts whose weights it is multiplied with; dense weights are one expert. Rows are
// grouped by expert, an expert's outputs are cut into tasks, and XLA's own threads take one task after another. A task
// unpacks its few rows of weights into the second cache once, and multiplies all rows of activations with them.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "arithmetic.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__x86_64__)
alignas(64) uint16_t gptoss_mxfp4_table[256][16];
#endif

namespace {

constexpr int kColumns = 32;             // outputs of one task
constexpr int kDirectColumns = 64;       // of one that unpacks nothing ahead
constexpr int kSpreadColumns = 256;      // inputs of one task of the transposed product
constexpr int kSpreadRows = 256;         // rows of weights that it unpacks at once
constexpr int64_t kCache = 512 << 10;    // bytes of activations that stay in the second cache

enum class Kind { kBfloat16, kFloat32, kPacked };

const Arithmetic* float32_arithmetic() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return &gptoss_float32_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &gptoss_float32_avx2;
#endif
  return &gptoss_float32_base;
}

// For activations of bfloat16: the machine's own products of bfloat16, or float32 ones, which are as exact.
const Arithmetic* bfloat16_arithmetic() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return &gptoss_bfloat16_avx512;
#endif
  return float32_arithmetic();
}

const Arithmetic *bfloat16 = nullptr, *float32 = nullptr;

// Chosen once, when the library is loaded.
const bool ready = [] {
#if defined(__x86_64__)
  const float halves[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  for (int scale = 0; scale < 256; scale++)
    for (int code = 0; code < 16; code++) {
      const uint32_t bits = scale > 1 ? uint32_t(scale - 1) << 23 : 0;
      float half;
      std::memcpy(&half, &bits, 4);
      const float value = (code & 8 ? -1.0f : 1.0f) * halves[code & 7] * half;
      uint32_t whole;
      std::memcpy(&whole, &value, 4);
      gptoss_mxfp4_table[scale][code] = uint16_t(whole >> 16);
    }
  __builtin_cpu_init();
#endif
  bfloat16 = bfloat16_arithmetic();
  float32 = float32_arithmetic();
  return true;
}();

inline float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Calls task(i) for i < count on XLA's threads and on this one, which waits for the last.
void parallel(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& task) {
  struct Work {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto work = std::make_shared<Work>();
  // A thread that comes late finds no task, and never touches `task`.
  const auto run = [work, count, &task] {
    int64_t mine = 0;
    for (int64_t i; (i = work->next.fetch_add(1, std::memory_order_relaxed)) < count; mine++) task(i);
    if (mine && work->done.fetch_add(mine) + mine == count) {
      std::lock_guard<std::mutex> lock(work->mutex);
      work->finished.notify_all();
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule([run] { run(); });
  run();
  for (int spins = 0; spins < 2000 && work->done.load() < count; spins++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  if (work->done.load() == count) return;
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done.load() == count; });
}

// A scratch buffer of this thread; what was in it is gone.
template <int Slot>
void* scratch(int64_t bytes) {
  struct Buffer {
    void* at = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(at); }
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.at);
    buffer.size = (bytes + 63) / 64 * 64;
    buffer.at = std::aligned_alloc(64, buffer.size);
  }
  return buffer.at;
}

struct Problem {
  const Arithmetic* use;
  const void* x;  // [rows, inputs]: bfloat16 or float32
  Kind x_kind;
  const int32_t* experts;  // [rows, choices]
  const void* w;           // [E, N, K] or blocks [E, N, K / 32, 16]
  const uint8_t* scales;
  Kind kind;
  int64_t rows, choices, E, N, K;
  float* y;

  int64_t padded() const {
    const int64_t group = kind == Kind::kPacked ? use->group : 32;
    return (K + group - 1) / group * group;
  }
  // A row of weights as operands; `to` is used where they must be made.
  const void* weights(int64_t expert, int64_t n, void* to) const {
    const int64_t row = expert * N + n;
    if (kind == Kind::kPacked) {
      const uint8_t* blocks = static_cast<const uint8_t*>(w);
      use->unpack(blocks + row * K / 2, scales + row * (K / 32), int(K), to);
      return to;
    }
    if (kind == Kind::kBfloat16 && use->bytes == 4) {
      const uint16_t* from = static_cast<const uint16_t*>(w) + row * K;
      for (int64_t k = 0; k < K; k++) static_cast<float*>(to)[k] = widen(from[k]);
      return to;
    }
    return static_cast<const char*>(w) + row * K * use->bytes;
  }
  bool in_place() const { return kind == (use->bytes == 2 ? Kind::kBfloat16 : Kind::kFloat32); }
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

// Activations [rows, width] as operands of `padded` values, zeros behind; in the unpacked order if `group` is not 0.
std::vector<char> operands(ffi::ThreadPool& pool, const Arithmetic* use, const void* x, Kind kind, int64_t rows,
                           int64_t width, int64_t padded, int group) {
  std::vector<char> out(rows * padded * use->bytes);
  const auto one = [&](int64_t row) {
    const auto value = [&](int64_t k, auto& to) {
      if constexpr (sizeof to == 2)
        to = static_cast<const uint16_t*>(x)[row * width + k];
      else
        to = kind == Kind::kBfloat16 ? widen(static_cast<const uint16_t*>(x)[row * width + k])
                                     : static_cast<const float*>(x)[row * width + k];
    };
    const auto fill = [&](auto* to) {
      if (!group) {
        for (int64_t k = 0; k < width; k++) value(k, to[k]);
        for (int64_t k = width; k < padded; k++) to[k] = 0;
        return;
      }
      for (int64_t start = 0; start < padded; start += group)
        for (int64_t i = 0; i < group; i++) {
          const int64_t k = start + i, at = start + (i % 2) * (group / 2) + i / 2;
          if (k < width)
            value(k, to[at]);
          else
            to[at] = 0;
        }
    };
    char* to = out.data() + row * padded * use->bytes;
    if (use->bytes == 2)
      fill(reinterpret_cast<uint16_t*>(to));
    else
      fill(reinterpret_cast<float*>(to));
  };
  if (rows < 16)
    for (int64_t row = 0; row < rows; row++) one(row);
  else
    parallel(pool, (rows + 15) / 16, [&](int64_t i) {
      for (int64_t row = 16 * i; row < std::min(16 * i + 16, rows); row++) one(row);
    });
  return out;
}

// y [rows, choices, N] = x [rows, K] with the rows of each chosen expert.
void multiply(ffi::ThreadPool& pool, const Problem& p) {
  const Groups groups(p, p.N);
  const int64_t padded = p.padded(), bytes = p.use->bytes;
  const bool plain = p.x_kind == (bytes == 2 ? Kind::kBfloat16 : Kind::kFloat32) && p.kind != Kind::kPacked;
  std::vector<char> made;
  const char* x = static_cast<const char*>(p.x);
  if (!plain) {
    made = operands(pool, p.use, p.x, p.x_kind, p.rows, p.K, padded, p.kind == Kind::kPacked ? p.use->group : 0);
    x = made.data();
  }
  struct Task {
    int64_t expert, n, count;
  };
  std::vector<Task> tasks;
  for (int64_t e = 0; e < p.E; e++) {
    const int64_t rows = groups.starts[e + 1] - groups.starts[e];
    const int64_t step = rows <= p.use->direct ? kDirectColumns : kColumns;
    for (int64_t n = 0; rows && n < p.N; n += step) tasks.push_back({e, n, std::min(step, p.N - n)});
  }
  const int64_t block = std::max<int64_t>(6, kCache / (padded * bytes) / 6 * 6);
  parallel(pool, int64_t(tasks.size()), [&](int64_t i) {
    const auto [e, n, count] = tasks[i];
    const int64_t* pairs = groups.pairs.data() + groups.starts[e];
    const int64_t rows = groups.starts[e + 1] - groups.starts[e];
    const bool direct = p.kind == Kind::kPacked && rows <= p.use->direct;
    const void* w = nullptr;
    if (!direct) {
      if (p.in_place()) {
        w = p.weights(e, n, nullptr);
      } else {
        char* to = static_cast<char*>(scratch<0>(count * padded * bytes));
        for (int64_t c = 0; c < count; c++) p.weights(e, n + c, to + c * padded * bytes);
        w = to;
      }
    }
    const int64_t stride = p.in_place() ? p.K : padded;
    const void** at = static_cast<const void**>(scratch<1>(block * sizeof(void*)));
    float** to = static_cast<float**>(scratch<4>(block * sizeof(float*)));
    for (int64_t start = 0; start < rows; start += block) {
      const int64_t some = std::min(block, rows - start);
      for (int64_t m = 0; m < some; m++) {
        at[m] = x + pairs[start + m] / p.choices * padded * bytes;
        to[m] = p.y + pairs[start + m] * p.N + n;
      }
      if (direct) {
        const int64_t row = e * p.N + n;
        p.use->mx_direct(at, int(some), static_cast<const uint8_t*>(p.w) + row * p.K / 2, p.scales + row * (p.K / 32),
                         int(count), int(p.K), to);
      } else {
        p.use->tiles(at, int(some), w, stride, int(count), int(p.in_place() ? p.K : padded), to);
      }
    }
  });
}

// y [rows, choices, K] = g [rows, choices, N] times the chosen experts' rows: the gradient of `multiply`.
void multiply_transposed(ffi::ThreadPool& pool, const Problem& p) {
  const Groups groups(p, p.K);
  const int64_t bytes = p.use->bytes, pairs_count = p.rows * p.choices;
  const bool plain = p.x_kind == (bytes == 2 ? Kind::kBfloat16 : Kind::kFloat32);
  std::vector<char> made;
  const char* g = static_cast<const char*>(p.x);
  if (!plain) {
    made = operands(pool, p.use, p.x, p.x_kind, pairs_count, p.N, p.N, 0);
    g = made.data();
  }
  struct Task {
    int64_t expert, k;
  };
  std::vector<Task> tasks;
  for (int64_t e = 0; e < p.E; e++)
    for (int64_t k = 0; groups.starts[e + 1] > groups.starts[e] && k < p.K; k += kSpreadColumns)
      tasks.push_back({e, k});
  constexpr int64_t kBlock = 96;
  parallel(pool, int64_t(tasks.size()), [&](int64_t i) {
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
              p.use->unpack(static_cast<const uint8_t*>(p.w) + (row * p.K + k) / 2, p.scales + (row * p.K + k) / 32,
                            int(columns), to);
            } else if (p.in_place()) {
              std::memcpy(to, static_cast<const char*>(p.w) + (row * p.K + k) * bytes, columns * bytes);
            } else {
              const uint16_t* from = static_cast<const uint16_t*>(p.w) + row * p.K + k;
              for (int64_t c = 0; c < columns; c++) reinterpret_cast<float*>(to)[c] = widen(from[c]);
            }
            // What lies behind the last column is multiplied and not written; only its bits must be numbers.
            const int64_t filled = p.kind == Kind::kPacked ? (columns + p.use->group - 1) / p.use->group * p.use->group
                                                           : columns;
            if (filled < wide) std::memset(to + filled * bytes, 0, (wide - filled) * bytes);
            two[j] = to;
          }
          p.use->panel(two, 2, int(wide), panel + d * wide * bytes);
        }
        for (int64_t m = 0; m < some; m++) at[m] = g + (pairs[start + m] * p.N + n) * bytes;
        p.use->spread(at, int(some), panel, int(deep), int(wide), sums, wide);
      }
      const int64_t group = p.kind == Kind::kPacked ? p.use->group : 1, half = group / 2;
      for (int64_t m = 0; m < some; m++) {
        const float* from = sums + m * wide;
        float* to = p.y + pairs[start + m] * p.K + k;
        if (group == 1)
          std::memcpy(to, from, columns * 4);
        else
          for (int64_t c = 0; c < columns; c++) to[c] = from[c / group * group + c % 2 * half + c % group / 2];
      }
    }
  });
}

ffi::ErrorOr<Kind> kind_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16: return Kind::kBfloat16;
    case ffi::DataType::F32: return Kind::kFloat32;
    case ffi::DataType::U8: return Kind::kPacked;
    default: return ffi::Unexpected(ffi::Error::InvalidArgument("expected bfloat16, float32 or uint8"));
  }
}

// x [rows, K] (or g [rows, choices, N] if transposed), experts [rows, choices], weights [E, N, K] or blocks [E, N, U, 16],
// scales [E, N, U] (any array for plain weights) -> float32 [rows, choices, N] (or K).
ffi::Error product(ffi::ThreadPool pool, bool transposed, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> experts,
                   ffi::AnyBuffer weights, ffi::AnyBuffer scales, ffi::ResultBuffer<ffi::F32> y) {
  const auto x_kind = kind_of(x.element_type()), kind = kind_of(weights.element_type());
  if (!x_kind.has_value()) return x_kind.error();
  if (!kind.has_value()) return kind.error();
  Problem p;
  p.x_kind = x_kind.value(), p.kind = kind.value();
  p.use = p.x_kind == Kind::kBfloat16 && p.kind != Kind::kFloat32 ? bfloat16 : float32;
  p.x = x.untyped_data(), p.w = weights.untyped_data();
  p.scales = static_cast<const uint8_t*>(scales.untyped_data());
  p.experts = experts.typed_data(), p.y = y->typed_data();
  p.rows = experts.dimensions()[0], p.choices = experts.dimensions()[1];
  p.E = weights.dimensions()[0], p.N = weights.dimensions()[1];
  p.K = weights.dimensions()[2] * (p.kind == Kind::kPacked ? 32 : 1);
  const int64_t inputs = transposed ? p.choices * p.N : p.K;
  if (p.K % 32 || (transposed && p.N % 2) || int64_t(x.element_count()) != p.rows * inputs)
    return ffi::Error::InvalidArgument("shapes do not fit: K must be a multiple of 32, N even for the transposed product");
  if (transposed)
    multiply_transposed(pool, p);
  else
    multiply(pool, p);
  return ffi::Error::Success();
}

}  // namespace

// Names of what this machine can compute with, the best first, by spaces.
extern "C" const char* gptoss_arithmetics() {
#if defined(__x86_64__)
  if (bfloat16_arithmetic()->bytes == 2) return "avx512_bf16 avx512 avx2 portable";
  if (float32_arithmetic() == &gptoss_float32_avx512) return "avx512 avx2 portable";
  if (float32_arithmetic() == &gptoss_float32_avx2) return "avx2 portable";
#endif
  return "portable";
}

// Computes with one of them from now on.
extern "C" void gptoss_choose(const char* name) {
  bfloat16 = float32 = &gptoss_float32_base;
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx2")) bfloat16 = float32 = &gptoss_float32_avx2;
  if (!std::strncmp(name, "avx512", 6)) bfloat16 = float32 = &gptoss_float32_avx512;
  if (!std::strcmp(name, "avx512_bf16")) bfloat16 = &gptoss_bfloat16_avx512;
#endif
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
