// What attention and its gradient share: which keys queries see.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "host.h"

namespace {

constexpr int64_t kKeys = 256;       // of a block
constexpr int64_t kTogether = 16;    // a part of a block begins at a multiple of it, so that sums keep their order
constexpr int64_t kMostRows = 192;   // (query, head) pairs of a task
constexpr int64_t kUsualRows = 96;

// Of some queries or keys.
struct Range {
  int32_t first = std::numeric_limits<int32_t>::max(), last = -1;  // positions; first > last if there is none
  int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();  // segments
  bool whole = true;  // each holds a position

  void add(int32_t position, int32_t segment) {
    if (position < 0) {
      whole = false;
      return;
    }
    first = std::min(first, position), last = std::max(last, position);
    low = std::min(low, segment), high = std::max(high, segment);
  }

  // Many, of segment 0; without a branch, so that the compiler takes several at once: a long context's would be felt.
  void add(const int32_t* positions, int64_t count) {
    uint32_t least = first;  // nothing, as a negative number, is larger than any position
    int32_t most = last, any = 0;
    for (int64_t i = 0; i < count; i++) {
      least = std::min(least, uint32_t(positions[i]));
      most = std::max(most, positions[i]);
      any |= positions[i];
    }
    first = int32_t(least), last = most, whole = whole && any >= 0;
    if (last >= 0) low = std::min(low, 0), high = std::max(high, 0);
  }
};

// Positions int32 [B, T] and [B, S], -1 for no key; segments of the same shapes, null for one; window 0 for none.
struct Visibility {
  const int32_t *q_positions, *k_positions, *q_segments, *k_segments;
  int64_t B, T, S, window;
  std::vector<Range> blocks;  // of keys

  struct Part {
    int64_t start, end;  // slots of a row; none if they are equal
    bool all;            // every query sees each of them
  };

  Visibility(ffi::Buffer<ffi::S32>& q, ffi::Buffer<ffi::S32>& k, ffi::Buffer<ffi::S32>& q_of, ffi::Buffer<ffi::S32>& k_of,
             int64_t window)
      : q_positions(q.typed_data()),
        k_positions(k.typed_data()),
        q_segments(q_of.element_count() ? q_of.typed_data() : nullptr),
        k_segments(q_of.element_count() ? k_of.typed_data() : nullptr),
        B(q.dimensions()[0]),
        T(q.dimensions()[1]),
        S(k.dimensions()[1]),
        window(window),
        blocks(B * count()) {
    for (int64_t i = 0; i < B * count(); i++) {
      const int64_t start = i / count() * S + i % count() * kKeys, end = std::min(start + kKeys, (i / count() + 1) * S);
      if (k_segments)
        for (int64_t s = start; s < end; s++) blocks[i].add(k_positions[s], k_segments[s]);
      else
        blocks[i].add(k_positions + start, end - start);
    }
  }

  int64_t count() const { return (S + kKeys - 1) / kKeys; }

  Range queries(int64_t b, int64_t t, int64_t count) const {
    Range range;
    for (int64_t i = b * T + t; i < b * T + t + count; i++) range.add(q_positions[i], q_segments ? q_segments[i] : 0);
    return range;
  }

  // The keys of a block between the first and the last that one of the queries may see.
  Part part(const Range& queries, int64_t b, int64_t block) const {
    const Range& keys = blocks[b * count() + block];
    int64_t start = block * kKeys, end = std::min(start + kKeys, S);
    const int64_t after = window ? int64_t(queries.first) - window : -1;
    if (keys.first > keys.last || queries.first > queries.last || keys.first > queries.last || keys.last <= after ||
        keys.low > queries.high || keys.high < queries.low)
      return {start, start, false};
    if (keys.whole && keys.last <= queries.first && (!window || keys.first > queries.last - window) &&
        keys.low == queries.high && keys.high == queries.low)
      return {start, end, true};
    const auto hidden = [&](int64_t s) {
      const int32_t position = k_positions[b * S + s], segment = k_segments ? k_segments[b * S + s] : 0;
      return position < 0 || position <= after || position > queries.last || segment < queries.low ||
             segment > queries.high;
    };
    while (end > start && hidden(end - 1)) end--;
    int64_t first = start;
    while (first < end && hidden(first)) first++;
    return {start + (first - start) / kTogether * kTogether, end, false};
  }

  // Scores [count] of query t with the keys of a part; those that it does not see become -inf.
  void hide(const Arithmetic& use, float* scores, int64_t b, int64_t t, const Part& part) const {
    const int32_t last = q_positions[b * T + t];
    const int32_t after = window ? std::max<int64_t>(-1, int64_t(last) - window) : -1;
    const int64_t at = b * S + part.start;
    use.mask(scores, k_positions + at, k_segments ? k_segments + at : nullptr, int(part.end - part.start), after, last,
             q_segments ? q_segments[b * T + t] : 0);
  }
};

}  // namespace
