// What an instruction set has to offer: inner loops on plain pointers, no threads, no standard library (a template of it,
// compiled for AVX-512 here and shared by the linker, would stop older machines).
//
// Rows of weights and of activations are multiplied along K. An output is one chain of sums along K, the same whatever else
// is computed with it: a row's result does not depend on which or how many rows come with it.
//
// MXFP4 comes as it was released, blocks [N, K / 32, 16] and scales [N, K / 32], or with four rows in turn: blocks [N / 4,
// K / 32, 64] of 32 words, word i with value i of the four rows' blocks, the first row's in its lowest four bits; scales
// [N / 4, K / 32, 4]. So memory is read from one end to the other, and a value is found by one lookup in a table.
#pragma once
#include <cstdint>

#include "compact.h"

struct Arithmetic {
  int bytes;   // of an operand: 2 (bfloat16) or 4 (float32)
  int compact_rows;  // that `compact` takes at once; 0: there is none

  // y[m][n] = sum_k x[m][k] w[n * stride + k]; K a multiple of 32. A head's rows of 64 values lie too far apart to
  // be read ahead by the machine: what is `ahead` bytes after each is asked for, here and below, unless that is 0.
  void (*tiles)(const void* const* x, int rows, const void* w, int64_t stride, int N, int K, float* const* y,
                int64_t ahead);
  // The same with packed rows, four in turn, unpacked in registers; null where they are unpacked before.
  void (*mx_four)(const void* const* x, int rows, const uint8_t* blocks, const uint8_t* scales, int N, int K, float* const* y);
  // A packed row as it was released -> operands; and four in turn -> operands [4, K], where there is no mx_four.
  void (*unpack)(const uint8_t* blocks, const uint8_t* scales, int K, void* out);
  void (*unpack_four)(const uint8_t* blocks, const uint8_t* scales, int K, void* out);
  // The same with the group of rows of a compact matrix that begins at n, of which `count` are wanted; and that group as
  // operands [rows of the group, K].
  void (*compact)(const void* x, int64_t x_row, int rows, const Compact& w, int64_t n, int count, float* y, int64_t y_row);
  void (*unpack_compact)(const Compact& w, int64_t n, void* out);
  // y[m * stride_y + k] += sum_n g[m][n] w[n][k] for n < N (even), k < K (a multiple of 64 in panels); the panel was made by
  // `panel` from rows of operands.
  void (*panel)(const void* const* w, int N, int K, void* out, int64_t ahead);
  void (*spread)(const void* const* g, int rows, const void* panel, int N, int K, float* y, int64_t stride_y);
  // The same for eight rows of g, straight from the rows of operands; bfloat16's alone.
  void (*spread_eight)(const void* const* g, const void* const* w, int N, int K, float* y, int64_t stride_y, int64_t ahead);

  // Of `count` scores, a multiple of 16: the largest; and exp(score - largest) as operands, whose sum in float32 is given.
  float (*largest)(const float* scores, int count);
  float (*exponentials)(const float* scores, int count, float largest, void* out);

  // Of float32 alone; bfloat16's has none.
  // y[m * y_row + k] = sum_n g[m * g_row + n * g_step] w[n * w_row + k], added to y if `add`; k < K, a multiple of 16.
  void (*product)(const float* g, int64_t g_row, int64_t g_step, int rows, const float* w, int64_t w_row, int N, int K,
                  float* y, int64_t y_row, bool add);
  // out[k * out_row + n] = w[n * w_row + k]; K a multiple of 4.
  void (*transpose)(const float* w, int64_t w_row, int N, int K, float* out, int64_t out_row);
  // Scores of keys that a query does not see become -inf: seen are positions after `after` up to `last`, and of `segment`
  // unless segments is null.
  void (*mask)(float* scores, const int32_t* positions, const int32_t* segments, int count, int32_t after, int32_t last,
               int32_t segment);
  // d[i] = weights[i] (d[i] - mean): from gradients of a softmax's weights to those of its scores.
  void (*through_softmax)(const float* weights, float mean, int count, float* d);

  // Between the products of training: between.h.
  void (*swiglu)(const float* h, const float* bias, int F, float alpha, float limit, float* act);
  void (*swiglu_gradient)(const float* h, const float* bias, const float* d_act, int F, float alpha, float limit,
                          float* d_h);
  void (*rotate)(const float* x, const float* cos, const float* sin, int half, float sign, float* out);
  float (*triple)(const float* x, const float* y, const float* scale, int count);
  void (*scaled)(const float* x, const float* z, const float* scale, float a, float b, int count, float* y);
  void (*cross_entropy)(float* logits, int V, int target, float weight, float* most, float* sum);
};

extern "C" const Arithmetic gptoss_float32_base;
#if defined(__x86_64__)
// bfloat16 of the 16 codes for every scale, twice: a lookup by five bits may find anything in the fifth. Scales 0 and 1 give
// zeros, as everywhere (mxfp4.half_scale).
extern "C" uint16_t gptoss_mxfp4_table[256][32];
extern "C" const Arithmetic gptoss_float32_avx2, gptoss_float32_avx512, gptoss_bfloat16_avx512;
#endif
