// Rows copied as they are: XLA's CPU compiler neither gathers nor replaces bfloat16, but turns whole arrays into float32.
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// table [V, D], ids [R] -> [R, D]; ids out of range are clamped, as everywhere in JAX.
ffi::Error rows(ffi::AnyBuffer table, ffi::Buffer<ffi::S32> ids, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t count = table.dimensions()[0];
  const size_t bytes = table.size_bytes() / count;
  const char* from = static_cast<const char*>(table.untyped_data());
  char* to = static_cast<char*>(out->untyped_data());
  for (size_t i = 0; i < ids.element_count(); i++) {
    const int64_t id = ids.typed_data()[i];
    std::memcpy(to + i * bytes, from + (id < 0 ? 0 : id < count ? id : count - 1) * bytes, bytes);
  }
  return ffi::Error::Success();
}

// stored [B, S, ...] becomes out, the same memory; of new [B, T, ...] each row goes to its slot [B, T], or nowhere.
ffi::Error store(ffi::AnyBuffer stored, ffi::AnyBuffer added, ffi::Buffer<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t B = slots.dimensions()[0], T = slots.dimensions()[1], S = stored.dimensions()[1];
  const size_t bytes = added.size_bytes() / (B * T);
  char* to = static_cast<char*>(out->untyped_data());
  if (to != stored.untyped_data()) std::memcpy(to, stored.untyped_data(), stored.size_bytes());
  const char* from = static_cast<const char*>(added.untyped_data());
  for (int64_t i = 0; i < B * T; i++) {
    const int64_t slot = slots.typed_data()[i];
    if (slot >= 0 && slot < S) std::memcpy(to + (i / T * S + slot) * bytes, from + i * bytes, bytes);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_store, store,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gptoss_rows, rows,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::AnyBuffer>());
