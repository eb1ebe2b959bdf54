// A training step in float32: dense products, and what lies between products: SwiGLU with the experts' biases, the weighted
// sum of their outputs, rotation, RMSNorm, the softmax of the loss, and their gradients. XLA's CPU compiler leaves most of
// these as loops of single values, and computes products of some hundred rows by one thread.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "host.h"

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
using Result = ffi::ResultBuffer<ffi::F32>;

constexpr int64_t kRows = 32;    // of a task
constexpr int64_t kWork = 16;    // a value costs as much as so many multiplications of a product

const Arithmetic& arithmetic() { return *arithmetic_for(Kind::kFloat32); }

// Calls one(row) for rows of `width` values.
template <typename F>
void by_rows(ffi::ThreadPool& pool, int64_t rows, int64_t width, const F& one) {
  parallel(pool, (rows + kRows - 1) / kRows, rows * width * kWork, [&](int64_t i) {
    for (int64_t row = kRows * i; row < std::min(kRows * (i + 1), rows); row++) one(row);
  });
}

// Nobody's rows have the last expert's bias; their weights are zero.
inline int64_t of(const int32_t* experts, int64_t row, int64_t count) {
  return std::clamp<int64_t>(experts[row], 0, count - 1);
}

// A row of float32 or bfloat16 to be read.
struct Read {
  const float* row;
  Read(Kind kind, const void* from, int64_t index, int64_t count) {
    if (kind == Kind::kFloat32) {
      row = static_cast<const float*>(from) + index * count;
      return;
    }
    float* room = static_cast<float*>(scratch<0>(4 * count));
    copy_rows(kind, static_cast<const uint16_t*>(from) + index * count, 0, 1, count, room);
    row = room;
  }
};

// One that is written in float32, and rounded at the end.
class Written {
 public:
  Written(Kind kind, void* to, int64_t index, int64_t count) : kind_(kind), count_(count) {
    if (kind == Kind::kFloat32) {
      row_ = static_cast<float*>(to) + index * count;
      return;
    }
    to_ = static_cast<uint16_t*>(to) + index * count;
    row_ = static_cast<float*>(scratch<1>(4 * count));
  }
  ~Written() {
    if (to_) write_row(kind_, row_, count_, to_);
  }
  float* row() const { return row_; }

 private:
  Kind kind_;
  int64_t count_;
  float* row_;
  uint16_t* to_ = nullptr;
};

// h [P, 2 F], experts [P], bias [E, 2 F] -> float32 or bfloat16 [P, F].
ffi::Error swiglu(ffi::ThreadPool pool, float alpha, float limit, Floats h, Integers experts, Floats bias,
                  ffi::Result<ffi::AnyBuffer> act) {
  const auto kind = kind_of(act->element_type());
  if (!kind.has_value()) return kind.error();
  const int64_t P = act->dimensions()[0], F = act->dimensions()[1], E = bias.dimensions()[0];
  if (F % 16) return ffi::Error::InvalidArgument("expert hidden sizes must be a multiple of 16");
  by_rows(pool, P, 2 * F, [&](int64_t p) {
    const Written to(kind.value(), act->untyped_data(), p, F);
    arithmetic().swiglu(h.typed_data() + 2 * F * p, bias.typed_data() + 2 * F * of(experts.typed_data(), p, E), int(F),
                        alpha, limit, to.row());
  });
  return ffi::Error::Success();
}

// The gradient of [P, F], and what swiglu takes -> that of h.
ffi::Error swiglu_gradient(ffi::ThreadPool pool, float alpha, float limit, Floats d_act, Floats h, Integers experts,
                           Floats bias, Result d_h) {
  const int64_t P = d_act.dimensions()[0], F = d_act.dimensions()[1], E = bias.dimensions()[0];
  if (F % 16) return ffi::Error::InvalidArgument("expert hidden sizes must be a multiple of 16");
  by_rows(pool, P, 2 * F, [&](int64_t p) {
    arithmetic().swiglu_gradient(h.typed_data() + 2 * F * p, bias.typed_data() + 2 * F * of(experts.typed_data(), p, E),
                                 d_act.typed_data() + F * p, int(F), alpha, limit, d_h->typed_data() + 2 * F * p);
  });
  return ffi::Error::Success();
}

// y [M, X, D], experts and weights [M, X], bias [E, D] -> sum_x weights (y + bias) [M, D].
ffi::Error weighted(ffi::ThreadPool pool, Floats y, Integers experts, Floats bias, Floats weights, Result out) {
  const int64_t M = y.dimensions()[0], X = y.dimensions()[1], D = y.dimensions()[2], E = bias.dimensions()[0];
  by_rows(pool, M, X * D, [&](int64_t m) {
    float* to = out->typed_data() + m * D;
    std::memset(to, 0, 4 * D);
    for (int64_t x = m * X; x < m * X + X; x++) {
      const float *from = y.typed_data() + x * D, *more = bias.typed_data() + of(experts.typed_data(), x, E) * D;
      const float weight = weights.typed_data()[x];
      for (int64_t d = 0; d < D; d++) to[d] += weight * (from[d] + more[d]);
    }
  });
  return ffi::Error::Success();
}

// The gradient of [M, D], and what weighted takes -> those of y and weights.
ffi::Error weighted_gradient(ffi::ThreadPool pool, Floats d_out, Floats y, Integers experts, Floats bias, Floats weights,
                             Result d_y, Result d_weights) {
  const int64_t M = y.dimensions()[0], X = y.dimensions()[1], D = y.dimensions()[2], E = bias.dimensions()[0];
  by_rows(pool, M, X * D, [&](int64_t m) {
    const float* d = d_out.typed_data() + m * D;
    for (int64_t x = m * X; x < m * X + X; x++) {
      const float *from = y.typed_data() + x * D, *more = bias.typed_data() + of(experts.typed_data(), x, E) * D;
      const float weight = weights.typed_data()[x];
      float* to = d_y->typed_data() + x * D;
      for (int64_t i = 0; i < D; i++) to[i] = weight * d[i];
      d_weights->typed_data()[x] =
          arithmetic().triple(d, from, nullptr, int(D)) + arithmetic().triple(d, more, nullptr, int(D));
    }
  });
  return ffi::Error::Success();
}

// x [rows, heads, 2 half] of float32 or bfloat16, cos and sin [rows, half] -> x rotated, back if sign is -1.
ffi::Error rotate(ffi::ThreadPool pool, float sign, ffi::AnyBuffer x, Floats cos, Floats sin,
                  ffi::Result<ffi::AnyBuffer> out) {
  const auto kind = kind_of(x.element_type());
  if (!kind.has_value()) return kind.error();
  const int64_t rows = x.dimensions()[0], heads = x.dimensions()[1], half = cos.dimensions()[1];
  by_rows(pool, rows, heads * 2 * half, [&](int64_t r) {
    for (int64_t i = r * heads; i < (r + 1) * heads; i++) {
      const Read from(kind.value(), x.untyped_data(), i, 2 * half);
      const Written to(kind.value(), out->untyped_data(), i, 2 * half);
      arithmetic().rotate(from.row, cos.typed_data() + r * half, sin.typed_data() + r * half, int(half), sign, to.row());
    }
  });
  return ffi::Error::Success();
}

// x [rows, D] of float32 or bfloat16, scale [D] -> x / root * scale, and 1 / root [rows], root of the mean of squares + eps.
ffi::Error norm(ffi::ThreadPool pool, float eps, ffi::AnyBuffer x, Floats scale, ffi::Result<ffi::AnyBuffer> y,
                Result inverse) {
  const auto kind = kind_of(x.element_type());
  if (!kind.has_value()) return kind.error();
  const int64_t rows = x.dimensions()[0], D = x.dimensions()[1];
  by_rows(pool, rows, D, [&](int64_t r) {
    const Read from(kind.value(), x.untyped_data(), r, D);
    const Written to(kind.value(), y->untyped_data(), r, D);
    const float found = 1.0f / std::sqrt(arithmetic().triple(from.row, from.row, nullptr, int(D)) / D + eps);
    inverse->typed_data()[r] = found;
    arithmetic().scaled(from.row, nullptr, scale.typed_data(), found, 0, int(D), to.row());
  });
  return ffi::Error::Success();
}

// The gradient of y, what norm takes, and 1 / root -> that of x.
ffi::Error norm_gradient(ffi::ThreadPool pool, Floats d_y, Floats x, Floats scale, Floats inverse, Result d_x) {
  const int64_t rows = x.dimensions()[0], D = x.dimensions()[1];
  by_rows(pool, rows, D, [&](int64_t r) {
    const float *from = x.typed_data() + r * D, *d = d_y.typed_data() + r * D, by = inverse.typed_data()[r];
    const float mean = arithmetic().triple(from, d, scale.typed_data(), int(D)) / D;
    arithmetic().scaled(from, d, scale.typed_data(), by, -by * by * by * mean, int(D), d_x->typed_data() + r * D);
  });
  return ffi::Error::Success();
}

// Logits [rows, V] (the same array as the first result), targets and weights [rows] -> the gradient of the loss, and
// weight (log sum exp - logit of the target) of every row.
ffi::Error cross_entropy(ffi::ThreadPool pool, Floats logits, Integers targets, Floats weights, Result gradient,
                         Result loss) {
  const int64_t rows = logits.dimensions()[0], V = logits.dimensions()[1];
  float* at = gradient->typed_data();
  if (at != logits.typed_data()) std::memcpy(at, logits.typed_data(), logits.size_bytes());
  by_rows(pool, rows, V, [&](int64_t r) {
    const int64_t target = of(targets.typed_data(), r, V);
    const float weight = weights.typed_data()[r], chosen = at[r * V + target];
    float most, sum;
    arithmetic().cross_entropy(at + r * V, int(V), int(target), weight, &most, &sum);
    loss->typed_data()[r] = weight * (std::log(sum) + most - chosen);
  });
  return ffi::Error::Success();
}

// x [rows, V], all numbers -> the first place of each row's largest.
ffi::Error first_largest(ffi::ThreadPool pool, Floats x, ffi::ResultBuffer<ffi::S32> places) {
  const int64_t rows = x.dimensions()[0], V = x.dimensions()[1], whole = V / 16 * 16;
  parallel(pool, rows, rows * V, [&](int64_t r) {
    const float* row = x.typed_data() + r * V;
    float most = whole ? arithmetic().largest(row, int(whole)) : row[0];
    for (int64_t v = whole; v < V; v++) most = std::max(most, row[v]);
    int64_t place = 0;
    while (place < V - 1 && row[place] != most) place++;
    places->typed_data()[r] = int32_t(place);
  });
  return ffi::Error::Success();
}

// x [M, K] with the rows of w [N, K] -> [M, N]; if `transposed`, [M, N] with its columns -> [M, K].
ffi::Error dense(ffi::ThreadPool pool, bool transposed, Floats x, Floats w, Result y) {
  constexpr int64_t kBlock = 192, kOutputs = 64;  // of a task
  const int64_t M = x.dimensions()[0], N = w.dimensions()[0], K = w.dimensions()[1];
  const int64_t outputs = transposed ? K : N, depth = transposed ? N : K;
  if (x.dimensions()[1] != depth) return ffi::Error::InvalidArgument("shapes do not fit");
  const int64_t across = (outputs + kOutputs - 1) / kOutputs;
  parallel(pool, (M + kBlock - 1) / kBlock * across, M * N * K, [&](int64_t i) {
    const int64_t m = i / across * kBlock, n = i % across * kOutputs;
    const int64_t rows = std::min(kBlock, M - m), columns = std::min(kOutputs, outputs - n), wide = (columns + 15) / 16 * 16;
    const float* panel = w.typed_data() + n;  // [depth, wide]
    int64_t stride = K;
    if (!transposed || columns < wide) {
      float* made = static_cast<float*>(scratch<0>(4 * depth * wide));
      if (columns < wide) std::memset(made, 0, 4 * depth * wide);
      const float* from = w.typed_data() + n * K;
      if (transposed)
        for (int64_t d = 0; d < depth; d++) std::memcpy(made + d * wide, panel + d * K, 4 * columns);
      else if (K % 4 == 0)
        arithmetic().transpose(from, K, int(columns), int(K), made, wide);
      else
        for (int64_t c = 0; c < columns; c++)
          for (int64_t d = 0; d < depth; d++) made[d * wide + c] = from[c * K + d];
      panel = made, stride = wide;
    }
    float* to = y->typed_data() + m * outputs + n;
    float* out = columns < wide ? static_cast<float*>(scratch<1>(4 * rows * wide)) : to;
    const int64_t step = columns < wide ? wide : outputs;
    arithmetic().product(x.typed_data() + m * depth, depth, 1, int(rows), panel, stride, int(depth), int(wide), out, step,
                         false);
    for (int64_t r = 0; columns < wide && r < rows; r++) std::memcpy(to + r * outputs, out + r * wide, 4 * columns);
  });
  return ffi::Error::Success();
}

}  // namespace

#define BINDING ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_swiglu, swiglu,
                              BINDING.Attr<float>("alpha").Attr<float>("limit").Arg<Floats>().Arg<Integers>().Arg<Floats>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_swiglu_gradient, swiglu_gradient,
                              BINDING.Attr<float>("alpha").Attr<float>("limit").Arg<Floats>().Arg<Floats>().Arg<Integers>()
                                  .Arg<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_weighted, weighted,
                              BINDING.Arg<Floats>().Arg<Integers>().Arg<Floats>().Arg<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_weighted_gradient, weighted_gradient,
                              BINDING.Arg<Floats>().Arg<Floats>().Arg<Integers>().Arg<Floats>().Arg<Floats>().Ret<Floats>()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_rotate, rotate,
                              BINDING.Attr<float>("sign").Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<Floats>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_norm, norm,
                              BINDING.Attr<float>("eps").Arg<ffi::AnyBuffer>().Arg<Floats>().Ret<ffi::AnyBuffer>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_norm_gradient, norm_gradient,
                              BINDING.Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_cross_entropy, cross_entropy,
                              BINDING.Arg<Floats>().Arg<Integers>().Arg<Floats>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_dense, dense,
                              BINDING.Attr<bool>("transposed").Arg<Floats>().Arg<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_first_largest, first_largest,
                              BINDING.Arg<Floats>().Ret<ffi::Buffer<ffi::S32>>());
