// What every kernel needs around its arithmetic: threads, scratch memory, operands made of activations.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

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

// Rows [rows, width] of bfloat16 for float32 arithmetic.
std::vector<float> widened(ffi::ThreadPool& pool, const void* x, int64_t rows, int64_t width) {
  std::vector<float> out(rows * width);
  parallel(pool, (rows + 15) / 16, rows * width, [&](int64_t i) {
    const int64_t start = 16 * i * width, some = std::min<int64_t>(16, rows - 16 * i);
    copy_rows(Kind::kBfloat16, static_cast<const uint16_t*>(x) + start, width, some, width, out.data() + start);
  });
  return out;
}

// Asks the system for pages of 2 MiB before the first byte is written: memory is read a tenth faster through them. NumPy
// asks for them by itself, XLA's allocator does not.
inline void ask_for_huge_pages(void* begin, int64_t size) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), from = (uintptr_t(begin) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(begin) + size) / page * page;
  if (from < end) madvise((void*)from, end - from, MADV_HUGEPAGE);  // it may refuse: nothing depends on it but time
#endif
}

}  // namespace
