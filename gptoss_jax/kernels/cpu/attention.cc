// Attention with sinks over keys whose positions are known, for decode and for prefill.
//
// A task has the queries of one kv head's group for a few positions, and reads keys and values in blocks; sums are scaled as
// the largest score grows (Milakov and Gimelshein 2018, algorithm 3), and begin with the sink. Blocks that none of the
// task's queries sees are not read, so that the cost follows what is visible and not the cache's size. A query's result does
// not depend on the others of its task: a block that it does not see adds zeros.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "host.h"

namespace {

constexpr int64_t kKeys = 256;      // of a block
constexpr int64_t kMostRows = 192;  // (query, head) pairs of a task: what `tiles` keeps

struct Extent {
  int32_t first, last;  // positions in a block of keys; first > last if there is none
  bool whole;           // every slot holds a position
};

struct Attention {
  const Arithmetic* use;
  Kind kind;
  const char *q, *k, *v;
  const float* sinks;
  const int32_t *q_positions, *k_positions;
  int64_t B, T, N, H, S, K, window;
  char* out;
};

void one_task(const Attention& p, const char* q, const std::vector<Extent>& extents, int64_t b, int64_t head, int64_t t0,
              int64_t count) {
  const Arithmetic& use = *p.use;
  const int64_t G = p.N / p.K, rows = G * count, H = p.H, bytes = use.bytes;
  const int64_t size = p.kind == Kind::kBfloat16 ? 2 : 4, blocks = (p.S + kKeys - 1) / kKeys;
  const bool in_place = size == bytes;
  const int32_t* at = p.q_positions + b * p.T + t0;
  const auto [lowest, highest] = std::minmax_element(at, at + count);

  float* scores = static_cast<float*>(scratch<5>(rows * kKeys * 4));
  char* weights = static_cast<char*>(scratch<6>(rows * kKeys * bytes));
  float* sums = static_cast<float*>(scratch<3>(rows * H * 4));
  char* panel = static_cast<char*>(scratch<2>(kKeys * H * bytes));
  char* widened = in_place ? nullptr : static_cast<char*>(scratch<0>(2 * kKeys * H * bytes));
  float most[kMostRows], total[kMostRows];
  const void *q_rows[kMostRows], *weight_rows[kMostRows], *v_rows[kKeys];
  float* score_rows[kMostRows];
  for (int64_t r = 0; r < rows; r++) {  // row r: query t0 + r / G, head r % G of the group
    q_rows[r] = q + (((b * p.T + t0 + r / G) * p.N) + head * G + r % G) * H * bytes;
    score_rows[r] = scores + r * kKeys;
    weight_rows[r] = weights + r * kKeys * bytes;
    most[r] = p.sinks[head * G + r % G];
    total[r] = 1.0f;
  }
  std::memset(sums, 0, rows * H * 4);

  const float scale = 1.0f / std::sqrt(float(H));
  for (int64_t block = 0; block < blocks; block++) {
    const Extent& extent = extents[b * blocks + block];
    const bool none = extent.first > extent.last || extent.first > *highest ||
                      (p.window && int64_t(extent.last) <= int64_t(*lowest) - p.window);
    if (none) continue;
    const int64_t start = block * kKeys, keys = std::min(kKeys, p.S - start), padded = (keys + 15) / 16 * 16;
    const bool all = extent.whole && extent.last <= *lowest &&
                     (!p.window || int64_t(extent.first) > int64_t(*highest) - p.window);
    const int64_t from = ((b * p.S + start) * p.K + head) * H, step = p.K * H;
    const char *k = p.k + from * size, *v = p.v + from * size;
    int64_t stride = step;
    if (!in_place) {
      for (int64_t s = 0; s < keys; s++)
        for (int64_t h = 0; h < H; h++) {
          reinterpret_cast<float*>(widened)[s * H + h] = widen(reinterpret_cast<const uint16_t*>(k)[s * step + h]);
          reinterpret_cast<float*>(widened)[(kKeys + s) * H + h] =
              widen(reinterpret_cast<const uint16_t*>(v)[s * step + h]);
        }
      k = widened, v = widened + kKeys * H * bytes, stride = H;
    }
    use.tiles(q_rows, int(rows), k, stride, int(keys), int(H), score_rows);
    const int32_t* positions = p.k_positions + b * p.S + start;
    for (int64_t r = 0; r < rows; r++) {
      float* row = score_rows[r];
      const int64_t position = at[r / G];
      if (all)
        for (int64_t s = 0; s < keys; s++) row[s] *= scale;
      else
        for (int64_t s = 0; s < keys; s++) {
          const bool visible = positions[s] >= 0 && positions[s] <= position &&
                               (!p.window || positions[s] > position - p.window);
          row[s] = visible ? row[s] * scale : -std::numeric_limits<float>::infinity();
        }
      for (int64_t s = keys; s < padded; s++) row[s] = -std::numeric_limits<float>::infinity();
      const float grown = std::max(most[r], use.largest(row, int(padded)));
      if (grown != most[r]) {
        const float shrink = std::exp(most[r] - grown);
        total[r] *= shrink;
        for (int64_t h = 0; h < H; h++) sums[r * H + h] *= shrink;
        most[r] = grown;
      }
      total[r] += use.exponentials(row, int(padded), grown, weights + r * kKeys * bytes);
    }
    const int64_t even = (keys + 1) / 2 * 2;  // of an odd number of keys the last is read twice, with a weight of 0
    for (int64_t s = 0; s < even; s++) v_rows[s] = v + std::min(s, keys - 1) * stride * bytes;
    use.panel(v_rows, int(even), int(H), panel);
    use.spread(weight_rows, int(rows), panel, int(even), int(H), sums, H);
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t to = (((b * p.T + t0 + r / G) * p.N) + head * G + r % G) * H;
    for (int64_t h = 0; h < H; h++) {
      const float value = sums[r * H + h] / total[r];
      if (p.kind == Kind::kFloat32) {
        reinterpret_cast<float*>(p.out)[to + h] = value;
      } else {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits += 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
        reinterpret_cast<uint16_t*>(p.out)[to + h] = uint16_t(bits >> 16);
      }
    }
  }
}

// q [B, T, N, H], k and v [B, S, K, H], sinks float32 [N], positions int32 [B, T] and [B, S], -1 for nothing; window 0 for
// none -> [B, T, N, H].
ffi::Error attention(ffi::ThreadPool pool, int64_t window, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::F32> sinks, ffi::Buffer<ffi::S32> q_positions, ffi::Buffer<ffi::S32> k_positions,
                     ffi::Result<ffi::AnyBuffer> out) {
  const auto kind = kind_of(q.element_type());
  if (!kind.has_value()) return kind.error();
  if (k.element_type() != q.element_type() || v.element_type() != q.element_type())
    return ffi::Error::InvalidArgument("queries, keys and values must be of one type");
  const auto d = q.dimensions(), e = k.dimensions();
  Attention p{arithmetic_for(kind.value()), kind.value(), static_cast<const char*>(q.untyped_data()),
              static_cast<const char*>(k.untyped_data()), static_cast<const char*>(v.untyped_data()), sinks.typed_data(),
              q_positions.typed_data(), k_positions.typed_data(), d[0], d[1], d[2], d[3], e[1], e[2], window,
              static_cast<char*>(out->untyped_data())};
  const int64_t G = p.N / p.K;
  if (p.H % 64 || G > kMostRows) return ffi::Error::InvalidArgument("heads must be a multiple of 64 values");
  const int64_t blocks = (p.S + kKeys - 1) / kKeys;
  std::vector<Extent> extents(p.B * blocks);
  for (int64_t i = 0; i < p.B * blocks; i++) {
    const int64_t start = i % blocks * kKeys;
    const int32_t* at = p.k_positions + i / blocks * p.S + start;
    Extent extent{std::numeric_limits<int32_t>::max(), -1, true};
    for (int64_t s = 0; s < std::min(kKeys, p.S - start); s++) {
      if (at[s] < 0) {
        extent.whole = false;
        continue;
      }
      extent.first = std::min(extent.first, at[s]), extent.last = std::max(extent.last, at[s]);
    }
    extents[i] = extent;
  }
  std::vector<char> made;
  const char* rows = p.q;
  if (p.kind == Kind::kBfloat16 && p.use->bytes == 4) {
    made = operands(pool, p.use, p.q, p.kind, p.B * p.T * p.N, p.H, p.H, 0);
    rows = made.data();
  }
  const int64_t step = std::max<int64_t>(1, 96 / G), parts = (p.T + step - 1) / step;
  int64_t seen = 0;
  for (const Extent& extent : extents) seen += extent.first <= extent.last ? kKeys : 0;
  if (p.window) seen = std::min(seen, p.B * (p.window + p.T));
  parallel(pool, p.B * p.K * parts, 2 * seen * p.T * p.N * p.H, [&](int64_t i) {
    const int64_t t0 = i % parts * step, head = i / parts % p.K, b = i / parts / p.K;
    one_task(p, rows, extents, b, head, t0, std::min(step, p.T - t0));
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
                                  .Ret<ffi::AnyBuffer>());
