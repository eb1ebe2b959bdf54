// Rows of a table, copied as they are: XLA's CPU compiler has no gather of bfloat16.
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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gptoss_rows, rows,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::AnyBuffer>());
