// Rows of float32 between the products of training; part of float32.cc. What is no number stays none.
#pragma once

inline Vector sigmoid(Vector z) {
  const Vector e = exponential(z < 0.0f ? z : -z), one = Vector{} + 1.0f;
  return (z < 0.0f ? e : one) / (e + 1.0f);
}

// 16 pairs (gate, up) and their bias, gates first.
inline void pairs_of(const float* h, const float* bias, float* gate, float* up) {
  for (int j = 0; j < 16; j++) {
    gate[j] = h[2 * j] + bias[2 * j];
    up[j] = h[2 * j + 1] + bias[2 * j + 1];
  }
}

void swiglu(const float* h, const float* bias, int F, float alpha, float limit, float* act) {
  const Vector most = Vector{} + limit;
  alignas(64) float gate[16], up[16];
  for (int i = 0; i < F; i += 16) {
    pairs_of(h + 2 * i, bias + 2 * i, gate, up);
    for (int j = 0; j < 16; j += WIDTH) {
      Vector g = load(gate + j), u = load(up + j);
      g = g > most ? most : g;
      u = u > most ? most : u < -most ? -most : u;
      store(act + i + j, g * sigmoid(g * alpha) * (u + 1.0f));
    }
  }
}

void swiglu_gradient(const float* h, const float* bias, const float* d_act, int F, float alpha, float limit, float* d_h) {
  const Vector most = Vector{} + limit, none = {};
  alignas(64) float gate[16], up[16];
  for (int i = 0; i < F; i += 16) {
    pairs_of(h + 2 * i, bias + 2 * i, gate, up);
    for (int j = 0; j < 16; j += WIDTH) {
      const Vector gate_here = load(gate + j), up_here = load(up + j), d = load(d_act + i + j);
      const Vector g = gate_here > most ? most : gate_here;
      const Vector u = up_here > most ? most : up_here < -most ? -most : up_here;
      const Vector s = sigmoid(g * alpha);
      const Vector d_g = d * (u + 1.0f) * (s + g * alpha * s * (1.0f - s)), d_u = d * g * s;
      store(gate + j, gate_here > most ? none : d_g);
      store(up + j, up_here > most ? none : up_here < -most ? none : d_u);
    }
    for (int j = 0; j < 16; j++) {
      d_h[2 * (i + j)] = gate[j];
      d_h[2 * (i + j) + 1] = up[j];
    }
  }
}

void rotate(const float* x, const float* cos, const float* sin, int half, float sign, float* out) {
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half], s = sign * sin[i];
    out[i] = a * cos[i] - b * s;
    out[i + half] = b * cos[i] + a * s;
  }
}

// Sum of x[i] y[i] scale[i], i < count; without scale if it is null.
float triple(const float* x, const float* y, const float* scale, int count) {
  Vector sum = {};
  int i = 0;
  for (; i + WIDTH <= count; i += WIDTH) {
    const Vector both = load(x + i) * load(y + i);
    sum += scale ? both * load(scale + i) : both;
  }
  float all = total(sum);
  for (; i < count; i++) all += x[i] * y[i] * (scale ? scale[i] : 1.0f);
  return all;
}

// y[i] = x[i] a scale[i]; or, with z, z[i] a scale[i] + x[i] b.
void scaled(const float* x, const float* z, const float* scale, float a, float b, int count, float* y) {
  if (z)
    for (int i = 0; i < count; i++) y[i] = z[i] * a * scale[i] + x[i] * b;
  else
    for (int i = 0; i < count; i++) y[i] = x[i] * a * scale[i];
}

// Logits become their softmax's gradient, weight (softmax - 1 at the target); what it gives are the largest and the sum of
// exponentials over it.
void cross_entropy(float* logits, int V, int target, float weight, float* most, float* sum) {
  alignas(64) float last[16];
  const int whole = V / 16 * 16;
  for (int i = 0; i < 16; i++) last[i] = whole + i < V ? logits[whole + i] : -__builtin_inff();
  float largest_here = largest(last, 16);
  if (whole) {
    const float of_whole = largest(logits, whole);
    largest_here = of_whole > largest_here ? of_whole : largest_here;
  }
  Vector sums = {}, check = {};
  for (int i = 0; i < whole; i += WIDTH) {
    const Vector z = load(logits + i), e = exponential(z - largest_here);
    sums += e;
    check += z * 0.0f;
    store(logits + i, e);
  }
  float all = total(sums) + total(check);
  float ends[16];
  for (int i = 0; i < 16; i += WIDTH) store(ends + i, exponential(load(last + i) - largest_here));
  for (int i = whole; i < V; i++) {
    all += ends[i - whole] + 0.0f * logits[i];
    logits[i] = ends[i - whole];
  }
  const float share = weight / all;
  for (int i = 0; i < V; i++) logits[i] *= share;
  logits[target] -= weight;
  *most = largest_here, *sum = all;
}
