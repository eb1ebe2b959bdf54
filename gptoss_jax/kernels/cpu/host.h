// What every kernel needs around its arithmetic: threads, scratch memory, operands made of activations.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "arithmetic.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

enum class Kind { kBfloat16, kFloat32, kPacked };

// What `gptoss bench --tune` chooses; no result depends on it.
struct Tuning {
  int64_t columns = 32;         // outputs of one task
  int64_t direct_columns = 64;  // of one that unpacks in registers
  int64_t direct_rows = 4;      // of one expert, up to which it does; more unpack into the cache first
  int64_t cache = 512 << 10;    // bytes of activations that stay in the second cache
};
extern Tuning gptoss_tuning;

// What activations of this type are computed with: for bfloat16 the machine's own products of bfloat16, or float32 ones,
// which are as exact.
const Arithmetic* arithmetic_for(Kind kind);

namespace {

inline float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Multiplications that a thread is called for: it takes as long to come as these do.
constexpr int64_t kWorthwhile = 1 << 17;

// Calls task(i) for i < count on as many threads as XLA has, this one among them; `work` is what there is to multiply.
void parallel(ffi::ThreadPool& pool, int64_t count, int64_t work, const std::function<void(int64_t)>& task) {
  const int64_t helpers = std::min({int64_t(pool.num_threads()), count, work / kWorthwhile + 1}) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
  run_tasks(count, helpers, task);
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

ffi::ErrorOr<Kind> kind_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16: return Kind::kBfloat16;
    case ffi::DataType::F32: return Kind::kFloat32;
    case ffi::DataType::U8: return Kind::kPacked;
    default: return ffi::Unexpected(ffi::Error::InvalidArgument("expected bfloat16, float32 or uint8"));
  }
}

// Rows of float32, of `count` values each `stride` apart, made of bfloat16 or float32.
inline void copy_rows(Kind kind, const void* from, int64_t stride, int64_t rows, int64_t count, float* to) {
  for (int64_t r = 0; r < rows; r++, to += count)
    if (kind == Kind::kFloat32)
      std::memcpy(to, static_cast<const float*>(from) + r * stride, 4 * count);
    else
      for (int64_t i = 0; i < count; i++) to[i] = widen(static_cast<const uint16_t*>(from)[r * stride + i]);
}

// Float32 values rounded to the result's type, to the nearest, ties to even.
inline void write_row(Kind kind, const float* from, int64_t count, void* to) {
  if (kind == Kind::kFloat32) {
    std::memcpy(to, from, 4 * count);
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    bits += 0x7fff + (bits >> 16 & 1);
    static_cast<uint16_t*>(to)[i] = uint16_t(bits >> 16);
  }
}

// Activations [rows, width] as operands of `padded` values, zeros behind; in the unpacked order if `group` is not 0.
std::vector<char> operands(ffi::ThreadPool& pool, const Arithmetic* use, const void* x, Kind kind, int64_t rows,
                           int64_t width, int64_t padded, int group) {
  std::vector<char> out(rows * padded * use->bytes);
  const auto one = [&](int64_t row) {
    const auto fill = [&](const auto* from, auto* to) {
      const auto as = [](auto value) {
        if constexpr (sizeof *from < sizeof *to)
          return widen(value);
        else
          return value;
      };
      const int64_t half = group / 2, whole = group ? width / group * group : width;
      if (!group)
        for (int64_t k = 0; k < width; k++) to[k] = as(from[k]);
      for (int64_t start = 0; group && start < whole; start += group)
        for (int64_t i = 0; i < half; i++) {
          to[start + i] = as(from[start + 2 * i]);
          to[start + half + i] = as(from[start + 2 * i + 1]);
        }
      for (int64_t k = whole; k < padded; k++) to[k] = 0;
      for (int64_t i = 0; i < width - whole; i++) to[whole + i % 2 * half + i / 2] = as(from[whole + i]);
    };
    char* to = out.data() + row * padded * use->bytes;
    if (use->bytes == 2)
      fill(static_cast<const uint16_t*>(x) + row * width, reinterpret_cast<uint16_t*>(to));
    else if (kind == Kind::kBfloat16)
      fill(static_cast<const uint16_t*>(x) + row * width, reinterpret_cast<float*>(to));
    else
      fill(static_cast<const float*>(x) + row * width, reinterpret_cast<float*>(to));
  };
  if (rows < 16)
    for (int64_t row = 0; row < rows; row++) one(row);
  else
    parallel(pool, (rows + 15) / 16, rows * width, [&](int64_t i) {
      for (int64_t row = 16 * i; row < std::min(16 * i + 16, rows); row++) one(row);
    });
  return out;
}

}  // namespace
