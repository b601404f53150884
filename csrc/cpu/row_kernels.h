// Row kernels of the CPU engine, compiled once per instruction set and chosen at run time.
//
// All pointers are to contiguous float32 rows of n elements unless said otherwise. No kernel
// allocates, throws or reads past its row.
#pragma once

#include <cstdint>

namespace fakd {

enum class Dtype { float32, float16, bfloat16 };

// r1 = |p|^2, r2 = p.t, r3 = |t|^2 and |p - t|^2, which cancels if taken from the other three.
struct RowSums {
  double r1, r2, r3, distance;
};

struct RowWeights {
  float student, teacher, difference;
};

enum class ScoreDistance { kl, reverse_kl, mse, jsd };

// What becomes of raw products q.k: softcap * tanh(scale q.k / softcap) / temperature.
struct ScoreSide {
  float scale = 1, softcap = 0, inverse_temperature = 1;  // softcap 0: none
};

// One query row.
struct ScoreRow {
  float* student_scores;  // raw; become the gradient by them
  float* teacher_scores;  // raw; lost
  float* slope;           // room for n elements, where the student has a softcap
  int64_t n;
  ScoreSide student, teacher;
  ScoreDistance distance;
};

struct RowKernels {
  const char* name;  // "avx512" | "avx2" | "neon" | "baseline"

  void (*sums)(const float* p, const float* t, int64_t n, RowSums* out);
  double (*square)(const float* x, int64_t n);  // |x|^2
  // Two dot products that share a factor: x.u and x.v.
  void (*two_dots)(const float* x, const float* u, const float* v, int64_t n, double out[2]);
  // out = weights.student * p + weights.teacher * t + weights.difference * (p - t). `out` may be p.
  void (*combine)(
      const float* p, const float* t, const RowWeights& weights, int64_t n, float* out);
  // The same past the caches, for results larger than them. `out` on a 64-byte boundary.
  void (*combine_stream)(
      const float* p, const float* t, const RowWeights& weights, int64_t n, float* out);
  // out = scale * x. `out` may be `x`.
  void (*scale)(const float* x, float scale, int64_t n, float* out);
  // out += scale * x.
  void (*add_scaled)(const float* x, float scale, int64_t n, float* out);
  // out += x * y, element by element.
  void (*add_product)(const float* x, const float* y, int64_t n, float* out);
  // The distance of a row, and in place of the student's scores its gradient times gain.
  double (*score_row)(const ScoreRow& row, float gain, bool wants_grad);
  // What follows takes base-2 logarithms of probabilities. In place of raw scores; with the slope of
  // capped ones.
  void (*log_softmax_row)(float* x, int64_t n, const ScoreSide& side, float* slope);
  // Of the mean over heads, whose rows are a stride apart.
  void (*log_mean_rows)(
      const float* x, int64_t heads, int64_t head_stride, int64_t n, float* out);
  // The distance, and in place of the teacher its derivative by the student's probabilities.
  double (*log_map_row)(
      const float* student, float* teacher, int64_t n, ScoreDistance distance, bool wants_grad);
  // In place of logarithms the gradient by raw scores, from what log_map_row left in place of the
  // teacher; `products` is room for a row, that one or another.
  void (*softmax_gradient_row)(
      float* x, const float* by_map, float* products, const float* slope, int64_t n,
      ScoreDistance distance, float gain);
  // The same in fewer powers, where no average underflows. In place of raw scores 2^(score - maximum);
  // returns their sum.
  double (*powers_row)(float* x, int64_t n, const ScoreSide& side, float* slope);
  // log2 in place; false, and nothing done, if a number is too small to have kept its bits, or NaN.
  bool (*log2_row)(float* x, int64_t n);
  // -2^x in place: of the logarithm that log_map_row leaves for kl.
  void (*negative_powers_row)(float* x, int64_t n);
  // In place of powers the gradient by raw scores, from that by probabilities.
  void (*powers_gradient_row)(
      float* x, const float* by_map, const float* slope, int64_t n, float inverse_sum, float gain);
  void (*widen)(const void* x, Dtype dtype, int64_t n, float* out);
  // Round to nearest even; NaN stays NaN.
  void (*narrow_bfloat16)(const float* x, int64_t n, uint16_t* out);
};

// The best set this processor runs, or the one FAKD_ISA names. Throws if it names another.
const RowKernels& row_kernels();

}  // namespace fakd
