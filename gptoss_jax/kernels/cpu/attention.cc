// Attention with sinks over keys whose positions are known, for decode, for prefill and for training.
//
// A task has the queries of a kv head's group for a few positions, or of several heads if they are few, and reads keys and
// values in blocks, all its heads' of one block before the next: their values are neighbours in memory, and while those of
// one are multiplied, the next are asked for. Sums are scaled as the largest score grows (Milakov and Gimelshein 2018,
// algorithm 3), and begin with the sink. Keys that none of the task's queries sees are not read, so that the cost follows
// what is visible and not the cache's size. A query's result does not depend on the others of its task: keys that it does
// not see add zeros.
#include "attention.h"

#include <cmath>

namespace {

struct Attention {
  const Arithmetic *use, *rows;  // of products; of scores, which are float32
  Kind kind;
  const char *q, *k, *v;
  const float* sinks;
  int64_t N, H, K;
  char* out;
  float* norm;
};

void one_task(const Attention& p, const Visibility& keys, int64_t b, int64_t head, int64_t heads, int64_t t0,
              int64_t count) {
  const Arithmetic& use = *p.use;
  const int64_t G = p.N / p.K, rows = G * count, all = heads * rows, H = p.H, bytes = use.bytes;
  const int64_t size = p.kind == Kind::kBfloat16 ? 2 : 4;
  const bool wide = bytes == 4, in_place = size == bytes;
  const float scale = 1.0f / std::sqrt(float(H));
  const Range queries = keys.queries(b, t0, count);

  float* scores = static_cast<float*>(scratch<5>(rows * kKeys * 4));
  char* weights = static_cast<char*>(scratch<6>(rows * kKeys * bytes));
  float* const all_sums = static_cast<float*>(scratch<3>(all * H * 4));
  char* panel = static_cast<char*>(scratch<2>(kKeys * H * bytes));
  float* widened = in_place ? nullptr : static_cast<float*>(scratch<0>(2 * kKeys * H * 4));
  float* const q_all = wide ? static_cast<float*>(scratch<1>(all * H * 4)) : nullptr;
  float all_most[kMostRows], all_total[kMostRows];
  const void *all_q[kMostRows], *weight_rows[kMostRows], *v_rows[kKeys];
  float* score_rows[kMostRows];
  const auto place = [&](int64_t r) {  // row r: of kv head r / rows, query r % rows / G, head r % G of the group
    return ((b * keys.T + t0 + r % rows / G) * p.N + (head + r / rows) * G + r % G) * H;
  };
  for (int64_t r = 0; r < all; r++) {
    all_q[r] = p.q + place(r) * size;
    if (wide) copy_rows(p.kind, all_q[r], 0, 1, H, q_all + r * H);
    all_most[r] = p.sinks[(head + r / rows) * G + r % G];
    all_total[r] = 1.0f;
  }
  for (int64_t r = 0; r < rows; r++) {
    score_rows[r] = scores + r * kKeys;
    weight_rows[r] = weights + r * kKeys * bytes;
  }
  std::memset(all_sums, 0, all * H * 4);

  // `ahead`: bytes from its keys and values to the next ones; 0 if there are none.
  const auto add = [&](const Visibility::Part& part, int64_t h, int64_t ahead) {
    const void* const* q_rows = all_q + h * rows;
    const float* q_wide = q_all + h * rows * H;
    float *sums = all_sums + h * rows * H, *most = all_most + h * rows, *total = all_total + h * rows;
    const int64_t some = part.end - part.start, padded = (some + 15) / 16 * 16, step = p.K * H;
    const int64_t from = (b * keys.S + part.start) * step + (head + h) * H;
    const char *k = p.k + from * size, *v = p.v + from * size;
    int64_t stride = step;
    if (!in_place) {
      copy_rows(p.kind, k, step, some, H, widened);
      copy_rows(p.kind, v, step, some, H, widened + kKeys * H);
      k = reinterpret_cast<char*>(widened), v = reinterpret_cast<char*>(widened + kKeys * H), stride = H;
    }
    if (wide) {
      float* columns = reinterpret_cast<float*>(panel);
      use.transpose(reinterpret_cast<const float*>(k), stride, int(some), int(H), columns, kKeys);
      for (int64_t h = 0; h < H; h++)
        for (int64_t s = some; s < padded; s++) columns[h * kKeys + s] = 0;
      // Two sums of half a head each: one after another they would be less exact.
      float* others = reinterpret_cast<float*>(weights);
      const int64_t half = H / 2;
      use.product(q_wide, H, 1, int(rows), columns, kKeys, int(half), int(padded), scores, kKeys, false);
      use.product(q_wide + half, H, 1, int(rows), columns + half * kKeys, kKeys, int(half), int(padded), others, kKeys,
                  false);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t s = 0; s < padded; s++) scores[r * kKeys + s] += others[r * kKeys + s];
    } else {
      use.tiles(q_rows, int(rows), k, stride, int(some), int(H), score_rows, ahead);
    }
    for (int64_t r = 0; r < rows; r++) {
      float* row = score_rows[r];
      for (int64_t s = 0; s < some; s++) row[s] *= scale;
      for (int64_t s = some; s < padded; s++) row[s] = -std::numeric_limits<float>::infinity();
      if (!part.all) keys.hide(*p.rows, row, b, t0 + r / G, part);
      const float grown = std::max(most[r], use.largest(row, int(padded)));
      if (grown != most[r]) {
        const float shrink = std::exp(most[r] - grown);
        total[r] *= shrink;
        for (int64_t h = 0; h < H; h++) sums[r * H + h] *= shrink;
        most[r] = grown;
      }
      total[r] += use.exponentials(row, int(padded), grown, weights + r * kKeys * bytes);
    }
    if (wide) {
      use.product(reinterpret_cast<float*>(weights), kKeys, 1, int(rows), reinterpret_cast<const float*>(v), stride,
                  int(some), int(H), sums, H, true);
      return;
    }
    const int64_t even = (some + 1) / 2 * 2;  // of an odd number of keys the last is read twice, with a weight of 0
    for (int64_t s = 0; s < even; s++) v_rows[s] = v + std::min(s, some - 1) * stride * bytes;
    if (rows == 8) return use.spread_eight(weight_rows, v_rows, int(even), int(H), sums, H, ahead);
    use.panel(v_rows, int(even), int(H), panel, ahead);
    use.spread(weight_rows, int(rows), panel, int(even), int(H), sums, H);
  };
  int64_t block = 0;
  const auto following = [&]() -> Visibility::Part {
    while (block < keys.count())
      if (const Visibility::Part part = keys.part(queries, b, block++); part.start < part.end) return part;
    return {0, 0, false};
  };
  for (Visibility::Part part = following(), next; part.start < part.end; part = next) {
    next = following();
    const int64_t last = next.start < next.end ? (next.start - part.start) * p.K - (heads - 1) : 0;
    for (int64_t h = 0; h < heads; h++) add(part, h, (h + 1 < heads ? 1 : last) * H * size);
  }
  for (int64_t r = 0; r < all; r++) {
    float* sums = all_sums + r * H;
    for (int64_t h = 0; h < H; h++) sums[h] /= all_total[r];
    write_row(p.kind, sums, H, p.out + place(r) * size);
    p.norm[place(r) / H] = all_most[r] + std::log(all_total[r]);
  }
}

// q [B, T, N, H], k and v [B, S, K, H], sinks float32 [N], positions int32 [B, T] and [B, S], -1 for nothing, segments of
// the same shapes or empty; window 0 for none -> [B, T, N, H], and float32 [B, T, N]: the logarithm of the sum of
// exponentials, that of the sink among them.
ffi::Error attention(ffi::ThreadPool pool, int64_t window, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::F32> sinks, ffi::Buffer<ffi::S32> q_positions, ffi::Buffer<ffi::S32> k_positions,
                     ffi::Buffer<ffi::S32> q_segments, ffi::Buffer<ffi::S32> k_segments, ffi::Result<ffi::AnyBuffer> out,
                     ffi::ResultBuffer<ffi::F32> norm) {
  const auto kind = kind_of(q.element_type());
  if (!kind.has_value()) return kind.error();
  if (k.element_type() != q.element_type() || v.element_type() != q.element_type())
    return ffi::Error::InvalidArgument("queries, keys and values must be of one type");
  const auto d = q.dimensions(), e = k.dimensions();
  const Arithmetic* rows = arithmetic_for(Kind::kFloat32);
  // bfloat16's columns of values come in 64.
  Attention p{d[3] % 64 ? rows : arithmetic_for(kind.value()), rows, kind.value(),
              static_cast<const char*>(q.untyped_data()), static_cast<const char*>(k.untyped_data()),
              static_cast<const char*>(v.untyped_data()), sinks.typed_data(), d[2], d[3], e[2],
              static_cast<char*>(out->untyped_data()), norm->typed_data()};
  const int64_t G = p.N / p.K;
  if (p.H % 32 || G > kMostRows) return ffi::Error::InvalidArgument("heads must be a multiple of 32 values");
  const Visibility keys(q_positions, k_positions, q_segments, k_segments, window);
  const int64_t step = std::max<int64_t>(1, kUsualRows / G), parts = (keys.T + step - 1) / step;
  int64_t seen = 0;
  for (const Range& block : keys.blocks) seen += block.first <= block.last ? kKeys : 0;
  if (window) seen = std::min(seen, keys.B * (window + keys.T));
  const int64_t threads = pool.num_threads(), share = (keys.B * p.K * parts + threads - 1) / threads;
  const int64_t heads = std::max<int64_t>(1, std::min({p.K, share, kUsualRows / (G * std::min(step, keys.T))}));
  const int64_t groups = (p.K + heads - 1) / heads;
  parallel(pool, keys.B * groups * parts, 2 * seen * keys.T * p.N * p.H, [&](int64_t i) {
    const int64_t t0 = i % parts * step, head = i / parts % groups * heads, b = i / parts / groups;
    one_task(p, keys, b, head, std::min(heads, p.K - head), t0, std::min(step, keys.T - t0));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_attention, attention,
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
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
