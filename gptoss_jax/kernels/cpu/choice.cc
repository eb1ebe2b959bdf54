// Which arithmetic this machine has; chosen once, when the library is loaded.
#include <cstdint>
#include <cstring>

#include "host.h"

#if defined(__x86_64__)
alignas(64) uint16_t gptoss_mxfp4_table[256][32];
#endif

namespace {

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
      for (int half = 0; half < 32; half += 16) gptoss_mxfp4_table[scale][half + code] = uint16_t(whole >> 16);
    }
  __builtin_cpu_init();
#endif
  bfloat16 = bfloat16_arithmetic();
  float32 = float32_arithmetic();
  return true;
}();

}  // namespace

const Arithmetic* arithmetic_for(Kind kind) { return kind == Kind::kBfloat16 ? bfloat16 : float32; }

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
