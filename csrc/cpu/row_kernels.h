// Row kernels of the CPU engine, compiled once per instruction set and chosen at run time.
//
// All pointers are to contiguous float32 rows of n elements unless said otherwise. No kernel
// allocates, throws or reads past its row.
#pragma once

#include <cstdint>

#include "../common/mixture.h"

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

// One row of scores of both sides: a query's, or a token's logits.
struct ScoreRow {
  const float* student;  // raw
  const float* teacher;  // raw
  float* grad;   // becomes the gradient by the student's raw scores; may be `student`
  float* spare;  // room for n elements; may be `teacher`
  float* slope;  // likewise, where the student has a softcap
  int64_t n;
  ScoreSide student_side, teacher_side;
  ScoreDistance distance;
  Mixture mixture = {};              // of jsd
  int64_t label = -1;                // -1: none
  float* label_powers = nullptr;     // room for n elements, where there is a label
  int64_t student_ahead = 0, teacher_ahead = 0;  // to the rows that come next, to ask for them
};

// Rows that score_rows takes at once: short ones would wait for their sums longer than these take.
constexpr int64_t SHORT_COLUMNS = 256, SHORT_ROWS = 8;
inline int64_t rows_at_once(int64_t n) { return n <= SHORT_COLUMNS ? SHORT_ROWS : 1; }

struct ScoreValues {
  double distance = 0, cross_entropy = 0;
};

// Columns up to which rows are narrow, and the most lanes that a vector has.
constexpr int64_t NARROW = 16, WIDEST_VECTOR = 16;

// A few rows of narrow logits of both sides, for their KL; neither softcap nor scale.
struct NarrowRows {
  const float *student, *teacher;
  int64_t student_stride, teacher_stride, grad_stride;
  int64_t count, n;  // rows, at most `lanes`; columns, at most NARROW
  float inverse_temperature;
  const float* gains;        // [count], of the distance
  const int64_t* labels;     // [count], or absent
  const float* label_gains;  // [count], with labels
  ScoreValues* values;       // [count]
  float* grad;               // absent: values only; may be `student`
};

// Of a row of powers: their sum, and the score (capped, if it is) from which they were taken.
struct Powers {
  double sum = 0;
  float most = 0;
};

// What multiply_tiles takes; strides in elements.
struct TileProduct {
  const float* a;
  int64_t row_stride, k_stride;  // within a tile
  int64_t tile_stride;           // from a tile to the next
  int64_t rows;
  const float* panels;
  int64_t panel_stride, b_stride;
  int64_t columns, n;
  bool is_added;
  float* out;
  int64_t out_stride;
  // Memory that is needed next, asked for meanwhile: so many lines of 64 bytes.
  const float* next;
  int64_t next_lines;
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
  // The distance of a row and the cross-entropy with its label; their gradients, times gain and
  // label_gain, in one.
  ScoreValues (*score_row)(const ScoreRow& row, float gain, float label_gain, bool wants_grad);
  // The distances of some rows without labels; their gradients, times a gain each.
  void (*score_rows)(
      const ScoreRow* rows, const float* gains, int64_t count, bool wants_grad, double* distances);
  // The same of up to `lanes` narrow rows at once.
  int64_t lanes;
  void (*narrow_kl_rows)(const NarrowRows& rows);
  // What follows takes base-2 logarithms of probabilities. From raw scores, which `out` may be; with
  // the slope of capped ones.
  void (*log_softmax_row)(
      const float* x, int64_t n, const ScoreSide& side, float* slope, float* out);
  // Of the mean over heads, whose rows are a stride apart.
  void (*log_mean_rows)(
      const float* x, int64_t heads, int64_t head_stride, int64_t n, float* out);
  // The distance, and in place of the teacher its derivative by the student's probabilities.
  double (*log_map_row)(
      const float* student, float* teacher, int64_t n, ScoreDistance distance,
      const Mixture& mixture, bool wants_grad);
  // In place of logarithms the gradient by raw scores, from what log_map_row left in place of the
  // teacher and the student it saw; `products` is room for a row, the former or another.
  void (*softmax_gradient_row)(
      float* x, const float* student, const float* by_map, float* products, const float* slope,
      int64_t n, ScoreDistance distance, float gain);
  // The same in fewer powers, where no average underflows. In place of raw scores 2^(score - maximum).
  Powers (*powers_row)(float* x, int64_t n, const ScoreSide& side, float* slope);
  // log2 in place; false, and nothing done, if a number is too small to have kept its bits, or NaN.
  bool (*log2_row)(float* x, int64_t n);
  // The derivative that log_map_row does not write for kl, -T / S, in place of the teacher.
  void (*ratio_row)(const float* student, float* teacher, int64_t n);
  // In place of powers the gradient by raw scores, from that by probabilities.
  void (*powers_gradient_row)(
      float* x, const float* by_map, const float* slope, int64_t n, float inverse_sum, float gain);
  // The distance of two rows of probabilities, numbers below 2^-126 counting as that; its derivative by
  // the student's, times gain, in `grad`, which may be the student or absent.
  double (*compare_row)(
      const float* student, const float* teacher, int64_t n, ScoreDistance distance,
      const Mixture& mixture, float gain, float* grad);
  // out = cap tanh(scale x / cap), and its slope by scale x. `out` may be x.
  void (*cap_row)(const float* x, int64_t n, float scale, float cap, float* out, float* slope);
  // x *= factors, element by element.
  void (*multiply_row)(const float* factors, int64_t n, float* x);
  void (*widen)(const void* x, Dtype dtype, int64_t n, float* out);
  // Round to nearest even; NaN stays NaN.
  void (*narrow_bfloat16)(const float* x, int64_t n, uint16_t* out);
  // out[i][j] = sum_k a[i][k] b[j][k] for few rows of a. These are packed first, `panel` of them at a
  // time, into n floats for each row of whole panels; on a 64-byte boundary. A panel of 0 rows: there
  // are no such functions for this set.
  int64_t panel;
  void (*pack_rows)(const float* a, int64_t stride, int64_t rows, int64_t n, float* out);
  void (*multiply_rows)(
      const float* panels, int64_t a_rows, int64_t n, const float* b, int64_t b_stride,
      int64_t b_rows, float* out, int64_t out_stride);
  // out[j][i] of the same, for many rows of a.
  void (*multiply_panels)(
      const float* panels, int64_t a_rows, int64_t n, const float* b, int64_t b_stride,
      int64_t b_rows, float* out, int64_t out_stride);
  // out = a b, or out += a b, for up to `sum_depth` rows of b. 0: there are no such functions for this
  // set. b is panels of columns, packed, with rows of `panel`, or where they lie in rows of whole vectors;
  // a is tiles of `tile` rows, anywhere; packed, from rows that are neighbours, their strides are 1 and
  // `tile`.
  int64_t tile, sum_depth;
  void (*pack_tiles)(const float* a, int64_t k_stride, int64_t rows, int64_t n, float* out);
  void (*pack_columns)(const float* b, int64_t stride, int64_t n, int64_t columns, float* out);
  void (*multiply_tiles)(const TileProduct& product);
};

// The best set this processor runs, or the one FAKD_ISA names. Throws if it names another.
const RowKernels& row_kernels();
// Its name, of what multiplies bfloat16 too.
const char* instruction_set();

// What multiplies bfloat16 here: nothing, dot products of pairs (AVX512-BF16), matrix tiles (AMX-BF16).
enum class BfloatUnit { none, dots, tiles };
BfloatUnit bfloat_unit();
// Whether operands of these two are multiplied by it as they are.
inline bool are_tiled(Dtype a, Dtype b) {
  return a == Dtype::bfloat16 && b == Dtype::bfloat16 && bfloat_unit() != BfloatUnit::none;
}

// Whether products of packed operands are made here, wherever the set has them: dH and dW of 1024 tokens,
// 32000 x 512, took 506 ms by the library and 385 packed (2 cores of an AMD EPYC, 2026-11); attention
// 0.92 to 1.03 of its time and linear_kl 0.97 on the processors for which the library was written (2
// cores of a Sapphire Rapids class Xeon, 2026-11). FAKD_PRODUCTS says packed or library.
bool are_products_packed();
// The same of features, whose operands are wide on all sides: there the library's are faster on its own
// processors, 6 pairs of 384 to 768 took 163 ms by it and 175 packed.
bool are_feature_products_packed();

}  // namespace fakd
