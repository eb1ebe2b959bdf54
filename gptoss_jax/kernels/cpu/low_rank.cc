// Low-rank additions to products with the weights of the experts that each row names: y + b (gain * (a x)) + bias, and
// their gradient. A plain weight is one expert. All products are of float32; bfloat16 is widened first.
//
// A task has some rows of one expert, copied beside each other, and its a and b as the products want them.
#include <cstdint>
#include <cstring>
#include <vector>

#include "host.h"

namespace {

constexpr int64_t kCached = 1 << 17;  // values of a task's rows
constexpr int64_t kMostRows = 126;
constexpr int64_t kPart = 4;  // as many blocks of rows share one sum of gradients of a and b

struct Values {
  const void* at;
  Kind kind;
  float operator[](int64_t i) const {
    return kind == Kind::kFloat32 ? static_cast<const float*>(at)[i] : widen(static_cast<const uint16_t*>(at)[i]);
  }
  void row(int64_t from, int64_t count, int64_t padded, float* to) const {
    if (kind == Kind::kFloat32)
      std::memcpy(to, static_cast<const float*>(at) + from, 4 * count);
    else
      for (int64_t i = 0; i < count; i++) to[i] = (*this)[from + i];
    std::memset(to + count, 0, 4 * (padded - count));
  }
};

struct Task {
  int64_t expert, start, count;  // of `pairs`
};

struct LowRank {
  const Arithmetic* use;
  Values x, a, b;          // [rows, I], [E, R, I], [E, O, R]
  const float* gain;       // [rows, R]
  const int32_t* experts;  // [rows, choices]
  int64_t rows, choices, E, I, O, R;
  const float* y;     // [rows, choices, O]: what is added to
  const float* bias;  // [O], or null
  float* h;           // [rows, choices, R]: a x
  std::vector<int64_t> pairs;
  std::vector<Task> tasks;

  int64_t I16() const { return (I + 15) / 16 * 16; }
  int64_t O16() const { return (O + 15) / 16 * 16; }
  int64_t R16() const { return (R + 15) / 16 * 16; }
  int64_t block() const {
    return std::max<int64_t>(6, std::min(kMostRows, kCached / (I16() + O16()) / 6 * 6));
  }

  // Pairs (row, choice) of every expert, in order, cut into tasks of `most`.
  void group(int64_t most) {
    std::vector<int64_t> starts(E + 1, 0);
    const auto here = [&](int64_t i) { return experts[i] >= 0 && experts[i] < E; };
    for (int64_t i = 0; i < rows * choices; i++)
      if (here(i)) starts[experts[i] + 1]++;
    for (int64_t e = 0; e < E; e++) starts[e + 1] += starts[e];
    for (int64_t e = 0; e < E; e++)
      for (int64_t i = starts[e]; i < starts[e + 1]; i += most)
        tasks.push_back({e, i, std::min(most, starts[e + 1] - i)});
    pairs.resize(starts[E]);
    for (int64_t i = 0; i < rows * choices; i++)
      if (here(i)) pairs[starts[experts[i]]++] = i;
  }
};

// A matrix [N, K] turned over: [K, N16], zeros behind.
void turned(const LowRank& p, const Values& from, int64_t at, int64_t N, int64_t K, float* to) {
  const int64_t N16 = (N + 15) / 16 * 16;
  if (N < N16) std::memset(to, 0, 4 * K * N16);
  if (from.kind == Kind::kFloat32 && K % 4 == 0)
    return p.use->transpose(static_cast<const float*>(from.at) + at, K, int(N), int(K), to, N16);
  for (int64_t n = 0; n < N; n++)
    for (int64_t k = 0; k < K; k++) to[k * N16 + n] = from[at + n * K + k];
}

void forward(const LowRank& p, const Task& task, float* to) {
  const int64_t I = p.I16(), O = p.O16(), R = p.R16(), block = p.block();
  float* a = static_cast<float*>(scratch<0>(4 * I * R));  // [I, R16]
  float* b = static_cast<float*>(scratch<1>(4 * p.R * O));
  float* x = static_cast<float*>(scratch<2>(4 * block * (I + O + R)));
  float *out = x + block * I, *h = out + block * O;
  turned(p, p.a, task.expert * p.R * p.I, p.R, p.I, a);
  turned(p, p.b, task.expert * p.O * p.R, p.O, p.R, b);
  for (int64_t from = 0; from < task.count; from += block) {
    const int64_t* pairs = p.pairs.data() + task.start + from;
    const int64_t some = std::min(block, task.count - from);
    for (int64_t m = 0; m < some; m++) p.x.row(pairs[m] / p.choices * p.I, p.I, I, x + m * I);
    p.use->product(x, I, 1, int(some), a, R, int(p.I), int(R), h, R, false);
    for (int64_t m = 0; m < some; m++) {
      const float* gain = p.gain + pairs[m] / p.choices * p.R;
      std::memcpy(p.h + pairs[m] * p.R, h + m * R, 4 * p.R);
      for (int64_t r = 0; r < p.R; r++) h[m * R + r] *= gain[r];
    }
    p.use->product(h, R, 1, int(some), b, O, int(p.R), int(O), out, O, false);
    for (int64_t m = 0; m < some; m++) {
      const float* y = p.y + pairs[m] * p.O;
      for (int64_t o = 0; o < p.O; o++) to[pairs[m] * p.O + o] = y[o] + out[m * O + o];
      for (int64_t o = 0; p.bias && o < p.O; o++) to[pairs[m] * p.O + o] += p.bias[o];
    }
  }
}

struct Gradients {
  const float *y, *base;  // [rows, choices, O], and the base's gradient of x [rows, choices, I]
  float *x, *gain;        // [rows, choices, I], [rows, choices, R]
};

// Sums of a task's rows: a's gradient [R, I16] and b's [R, O16].
void backward(const LowRank& p, const Task& task, const Gradients& d, float* d_a, float* d_b) {
  const int64_t I = p.I16(), O = p.O16(), R = p.R16(), block = p.block();
  float* a = static_cast<float*>(scratch<0>(4 * p.R * I));
  float* b = static_cast<float*>(scratch<1>(4 * p.O * R));  // [O, R16]
  float* x = static_cast<float*>(scratch<2>(4 * block * (2 * I + O + 2 * R)));
  float *d_x = x + block * I, *d_y = d_x + block * I, *h = d_y + block * O, *d_h = h + block * R;
  for (int64_t r = 0; r < p.R; r++) p.a.row((task.expert * p.R + r) * p.I, p.I, I, a + r * I);
  for (int64_t o = 0; o < p.O; o++) p.b.row((task.expert * p.O + o) * p.R, p.R, R, b + o * R);
  std::memset(d_a, 0, 4 * p.R * I);
  std::memset(d_b, 0, 4 * p.R * O);
  for (int64_t from = 0; from < task.count; from += block) {
    const int64_t* pairs = p.pairs.data() + task.start + from;
    const int64_t some = std::min(block, task.count - from);
    for (int64_t m = 0; m < some; m++) {
      p.x.row(pairs[m] / p.choices * p.I, p.I, I, x + m * I);
      Values{d.y, Kind::kFloat32}.row(pairs[m] * p.O, p.O, O, d_y + m * O);
    }
    p.use->product(d_y, O, 1, int(some), b, R, int(p.O), int(R), d_h, R, false);
    for (int64_t m = 0; m < some; m++) {
      const float *gain = p.gain + pairs[m] / p.choices * p.R, *kept = p.h + pairs[m] * p.R;
      for (int64_t r = 0; r < p.R; r++) {
        d.gain[pairs[m] * p.R + r] = d_h[m * R + r] * kept[r];
        h[m * R + r] = kept[r] * gain[r];
        d_h[m * R + r] *= gain[r];
      }
    }
    p.use->product(d_h, 1, R, int(p.R), x, I, int(some), int(I), d_a, I, true);
    p.use->product(h, 1, R, int(p.R), d_y, O, int(some), int(O), d_b, O, true);
    p.use->product(d_h, R, 1, int(some), a, I, int(p.R), int(I), d_x, I, false);
    for (int64_t m = 0; m < some; m++) {
      const float* base = d.base + pairs[m] * p.I;
      for (int64_t i = 0; i < p.I; i++) d.x[pairs[m] * p.I + i] = base[i] + d_x[m * I + i];
    }
  }
}

ffi::ErrorOr<LowRank> problem(ffi::AnyBuffer& x, ffi::Buffer<ffi::S32>& experts, ffi::AnyBuffer& a, ffi::AnyBuffer& b,
                              ffi::Buffer<ffi::F32>& gain, float* h, const float* y = nullptr,
                              const float* bias = nullptr) {
  Values values[3];
  const ffi::AnyBuffer* given[3] = {&x, &a, &b};
  for (int i = 0; i < 3; i++) {
    const auto kind = kind_of(given[i]->element_type());
    if (!kind.has_value()) return ffi::Unexpected(kind.error());
    values[i] = {given[i]->untyped_data(), kind.value()};
  }
  const auto d = experts.dimensions(), e = a.dimensions(), f = b.dimensions();
  if (int64_t(x.element_count()) != d[0] * e[2] || int64_t(gain.element_count()) != d[0] * e[1] || f[2] != e[1])
    return ffi::Unexpected(ffi::Error::InvalidArgument("shapes of x, a, b and gains do not fit"));
  return LowRank{arithmetic_for(Kind::kFloat32), values[0], values[1], values[2], gain.typed_data(), experts.typed_data(),
                 d[0], d[1], e[0], e[2], f[1], e[1], y, bias, h, {}, {}};
}

// Rows [width] of pairs that are nobody's, as `from` has them.
void pass_by(const LowRank& p, const float* from, int64_t width, float* to) {
  if (int64_t(p.pairs.size()) == p.rows * p.choices) return;
  for (int64_t i = 0; i < p.rows * p.choices; i++)
    if (p.experts[i] < 0 || p.experts[i] >= p.E) std::memcpy(to + i * width, from + i * width, 4 * width);
}

// y float32 [rows, choices, O], x [rows, I], experts [rows, choices], a [E, R, I], b [E, O, R], gain float32 [rows, R], bias
// float32 [O] or none -> y with what is added, and a x float32 [rows, choices, R].
ffi::Error low_rank(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> y, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> experts,
                    ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Buffer<ffi::F32> gain, ffi::Buffer<ffi::F32> bias,
                    ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> h) {
  auto made = problem(x, experts, a, b, gain, h->typed_data(), y.typed_data(),
                      bias.element_count() ? bias.typed_data() : nullptr);
  if (!made.has_value()) return made.error();
  LowRank p = made.value();
  p.group(p.block());
  if (int64_t(p.pairs.size()) < p.rows * p.choices) std::memset(p.h, 0, h->size_bytes());
  pass_by(p, p.y, p.O, out->typed_data());
  parallel(pool, p.tasks.size(), p.pairs.size() * p.R16() * (p.I + p.O),
           [&](int64_t i) { forward(p, p.tasks[i], out->typed_data()); });
  return ffi::Error::Success();
}

// The gradient of y, what `low_rank` takes but for y and bias, a x, and the gradient of x for each choice [rows, choices, I]
// that comes through y -> float32 gradients: the whole one of x, of a, of b, and of gain for each choice [rows, choices, R].
ffi::Error low_rank_gradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> d_y, ffi::AnyBuffer x,
                             ffi::Buffer<ffi::S32> experts, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Buffer<ffi::F32> gain,
                             ffi::Buffer<ffi::F32> h, ffi::Buffer<ffi::F32> base, ffi::ResultBuffer<ffi::F32> d_x,
                             ffi::ResultBuffer<ffi::F32> d_a, ffi::ResultBuffer<ffi::F32> d_b,
                             ffi::ResultBuffer<ffi::F32> d_gain) {
  auto made = problem(x, experts, a, b, gain, h.typed_data());
  if (!made.has_value()) return made.error();
  LowRank p = made.value();
  p.group(kPart * p.block());
  std::memset(d_a->typed_data(), 0, d_a->size_bytes());
  std::memset(d_b->typed_data(), 0, d_b->size_bytes());
  if (int64_t(p.pairs.size()) < p.rows * p.choices) std::memset(d_gain->typed_data(), 0, d_gain->size_bytes());
  pass_by(p, base.typed_data(), p.I, d_x->typed_data());
  const int64_t I = p.I16(), O = p.O16(), each = p.R * (I + O);
  std::vector<float> sums(p.tasks.size() * each);
  const Gradients d{d_y.typed_data(), base.typed_data(), d_x->typed_data(), d_gain->typed_data()};
  parallel(pool, p.tasks.size(), 2 * p.pairs.size() * p.R16() * (p.I + p.O), [&](int64_t i) {
    backward(p, p.tasks[i], d, sums.data() + i * each, sums.data() + i * each + p.R * I);
  });
  parallel(pool, p.E, p.tasks.size() * each, [&](int64_t e) {
    float *to_a = d_a->typed_data() + e * p.R * p.I, *to_b = d_b->typed_data() + e * p.O * p.R;
    for (size_t i = 0; i < p.tasks.size(); i++) {
      if (p.tasks[i].expert != e) continue;
      const float *of_a = sums.data() + i * each, *of_b = of_a + p.R * I;
      for (int64_t r = 0; r < p.R; r++)
        for (int64_t c = 0; c < p.I; c++) to_a[r * p.I + c] += of_a[r * I + c];
      for (int64_t o = 0; o < p.O; o++)
        for (int64_t r = 0; r < p.R; r++) to_b[o * p.R + r] += of_b[r * O + o];
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_low_rank, low_rank,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptoss_low_rank_gradient, low_rank_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
