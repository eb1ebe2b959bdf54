// The gradient of attention with sinks (Dao 2023, FlashAttention-2, algorithm 2).
//
// A task has one kv head of one row of the batch: its keys' and values' gradients are sums over all queries, taken a few
// queries after another. Weights are made again from the forward pass's logarithms of sums, block by block of keys, and
// keys that none of these queries sees are not read. All products are of float32: bfloat16 is widened first.
#include "attention.h"

#include <cmath>

namespace {

struct Gradient {
  const Arithmetic* use;
  Kind kind;
  const char *q, *k, *v, *out, *d_out;
  const float *sinks, *norm;
  int64_t N, H, K;
  char *d_q, *d_k, *d_v;
  double* d_sinks;  // [B, N]
};

void one_head(const Gradient& p, const Visibility& keys, int64_t b, int64_t head) {
  const Arithmetic& use = *p.use;
  const int64_t G = p.N / p.K, H = p.H, S = keys.S, step = p.K * H, size = p.kind == Kind::kBfloat16 ? 2 : 4;
  const int64_t most = std::max<int64_t>(1, kUsualRows / G), across = keys.count() * kKeys;
  const float scale = 1.0f / std::sqrt(float(H));
  float* k = static_cast<float*>(scratch<0>(2 * S * H * 4));
  float* k_columns = static_cast<float*>(scratch<1>(2 * across * H * 4));
  float* d_k = static_cast<float*>(scratch<2>(2 * S * H * 4));
  float* q = static_cast<float*>(scratch<3>(4 * most * G * H * 4));
  float* weights = static_cast<float*>(scratch<4>(2 * most * G * kKeys * 4));
  float* scores = static_cast<float*>(scratch<5>(most * G * kKeys * 4));
  float *v = k + S * H, *v_columns = k_columns + across * H, *d_v = d_k + S * H;
  float *d_out = q + most * G * H, *d_q = d_out + most * G * H, *out = d_q + most * G * H;
  float* d_scores = weights + most * G * kKeys;

  const int64_t keys_at = (b * S * p.K + head) * H;
  copy_rows(p.kind, p.k + keys_at * size, step, S, H, k);
  copy_rows(p.kind, p.v + keys_at * size, step, S, H, v);
  use.transpose(k, H, int(S), int(H), k_columns, across);
  use.transpose(v, H, int(S), int(H), v_columns, across);
  for (int64_t h = 0; h < 2 * H; h++) std::memset(k_columns + h * across + S, 0, (across - S) * 4);
  std::memset(d_k, 0, 2 * S * H * 4);

  for (int64_t t0 = 0; t0 < keys.T; t0 += most) {
    const int64_t count = std::min(most, keys.T - t0), rows = count * G;
    const Range queries = keys.queries(b, t0, count);
    const auto place = [&](int64_t t) { return ((b * keys.T + t0 + t) * p.N + head * G) * H; };
    float mean[kMostRows];
    for (int64_t t = 0; t < count; t++) {
      copy_rows(p.kind, p.q + place(t) * size, H, G, H, q + t * G * H);
      copy_rows(p.kind, p.d_out + place(t) * size, H, G, H, d_out + t * G * H);
      copy_rows(p.kind, p.out + place(t) * size, H, G, H, out + t * G * H);
    }
    for (int64_t r = 0; r < rows; r++) {
      float parts[8] = {}, sum = 0;
      for (int64_t h = 0; h < H; h += 8)
        for (int64_t i = 0; i < 8; i++) parts[i] += out[r * H + h + i] * d_out[r * H + h + i];
      for (float part : parts) sum += part;
      for (int64_t h = 0; h < H; h++) q[r * H + h] *= scale;
      mean[r] = sum;
      const int64_t n = head * G + r % G;
      p.d_sinks[b * p.N + n] -= double(std::exp(p.sinks[n] - p.norm[place(r / G) / H + r % G])) * sum;
    }
    std::memset(d_q, 0, rows * H * 4);

    for (int64_t block = 0; block < keys.count(); block++) {
      const Visibility::Part part = keys.part(queries, b, block);
      if (part.start == part.end) continue;
      const int64_t some = part.end - part.start, padded = (some + 15) / 16 * 16;
      use.product(q, H, 1, int(rows), k_columns + part.start, across, int(H), int(padded), scores, kKeys, false);
      use.product(d_out, H, 1, int(rows), v_columns + part.start, across, int(H), int(padded), d_scores, kKeys, false);
      for (int64_t r = 0; r < rows; r++) {
        float *row = scores + r * kKeys, *weight = weights + r * kKeys;
        if (!part.all) keys.hide(use, row, b, t0 + r / G, part);
        use.exponentials(row, int(padded), p.norm[place(r / G) / H + r % G], weight);
        use.through_softmax(weight, mean[r], int(padded), d_scores + r * kKeys);
      }
      const int64_t at = part.start * H;
      use.product(d_scores, kKeys, 1, int(rows), k + at, H, int(some), int(H), d_q, H, true);
      use.product(d_scores, 1, kKeys, int(some), q, H, int(rows), int(H), d_k + at, H, true);
      use.product(weights, 1, kKeys, int(some), d_out, H, int(rows), int(H), d_v + at, H, true);
    }
    for (int64_t i = 0; i < rows * H; i++) d_q[i] *= scale;
    for (int64_t t = 0; t < count; t++) write_row(p.kind, d_q + t * G * H, G * H, p.d_q + place(t) * size);
  }
  for (int64_t s = 0; s < S; s++) {
    write_row(p.kind, d_k + s * H, H, p.d_k + (keys_at + s * step) * size);
    write_row(p.kind, d_v + s * H, H, p.d_v + (keys_at + s * step) * size);
  }
}

// What gptoss_attention takes, its two results, and the gradient of the first -> those of q, k, v and (float32) sinks.
ffi::Error attention_gradient(ffi::ThreadPool pool, int64_t window, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                              ffi::Buffer<ffi::F32> sinks, ffi::Buffer<ffi::S32> q_positions,
                              ffi::Buffer<ffi::S32> k_positions, ffi::Buffer<ffi::S32> q_segments,
                              ffi::Buffer<ffi::S32> k_segments, ffi::AnyBuffer out, ffi::Buffer<ffi::F32> norm,
                              ffi::AnyBuffer d_out, ffi::Result<ffi::AnyBuffer> d_q, ffi::Result<ffi::AnyBuffer> d_k,
                              ffi::Result<ffi::AnyBuffer> d_v, ffi::ResultBuffer<ffi::F32> d_sinks) {
  const auto kind = kind_of(q.element_type());
  if (!kind.has_value()) return kind.error();
  for (ffi::DataType type : {k.element_type(), v.element_type(), out.element_type(), d_out.element_type()})
    if (type != q.element_type()) return ffi::Error::InvalidArgument("all but sums must be of one type");
  const auto bytes = [](ffi::AnyBuffer x) { return static_cast<const char*>(x.untyped_data()); };
  const auto d = q.dimensions(), e = k.dimensions();
  const int64_t B = d[0], N = d[2];
  std::vector<double> sums(B * N, 0.0);
  const Gradient p{arithmetic_for(Kind::kFloat32), kind.value(), bytes(q), bytes(k), bytes(v), bytes(out), bytes(d_out),
                   sinks.typed_data(), norm.typed_data(), N, d[3], e[2], static_cast<char*>(d_q->untyped_data()),
                   static_cast<char*>(d_k->untyped_data()), static_cast<char*>(d_v->untyped_data()), sums.data()};
  if (p.H % 32 || N / p.K > kMostRows) return ffi::Error::InvalidArgument("heads must be a multiple of 32 values");
  const Visibility keys(q_positions, k_positions, q_segments, k_segments, window);
  const int64_t seen = window ? std::min(keys.S, 2 * window) : keys.S;
  parallel(pool, B * p.K, 5 * B * keys.T * seen * N * p.H, [&](int64_t i) { one_head(p, keys, i / p.K, i % p.K); });
  for (int64_t n = 0; n < N; n++) {
    double sum = 0;
    for (int64_t b = 0; b < B; b++) sum += sums[b * N + n];
    d_sinks->typed_data()[n] = float(sum);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_attention_gradient, attention_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("window")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
