// The row-Gram family in float32: sums of a row -> its two values and the scalars of its gradient.
//
// csrc/common/row_gram.h derives the formulas and computes them in float64. Here that would cost
// more than the row itself on cards with one float64 unit for 64 of float32 (sm_86, 89, 120), so
// nothing is left to cancel instead. In a close row, |p - t|^2 < (|p|^2 + |t|^2) / 8, A p + B t is
// rewritten as (A + B) p - B (p - t), and 1 - cos and A + B come from numbers that are small
// themselves, |p - t|^2 and |p| - |t|:
//   1 - cos = (|p - t|^2 - (|p| - |t|)^2) / (2 |p| |t|)
//   A + B   = g (|t| - |p| - (1 - cos) |t|) / (|p|^2 |t|)
// Squares overflow beyond 1e19 per element, as eager's do.
#pragma once

namespace fakd::cuda {

enum Sum { R1, R2, R3, DISTANCE, EXCESS, SUMS };  // |p|^2, p.t, |t|^2, |p - t|^2, |p|^2 - |t|^2

// EXCESS is summed as products of p - t, so that it keeps its digits where p is close to t.
__device__ __forceinline__ void add_element(float p, float t, float (&sums)[SUMS]) {
  const float gap = p - t;
  sums[R1] += p * p;
  sums[R2] += p * t;
  sums[R3] += t * t;
  sums[DISTANCE] += gap * gap;
  sums[EXCESS] += gap * (p + t);
}

// dL/dp = A p + B t + S (p - t)
struct RowTerms {
  float cosine = 0;     // 1 - cos(p, t)
  float euclidean = 0;  // |p - t|^2 / D, or |p - t|
  float along_student = 0, along_teacher = 0, along_difference = 0;  // A, B, S
};

// Comparisons are written so that a NaN passes through them.
__device__ __forceinline__ RowTerms row_terms(
    const float (&sums)[SUMS], float cosine_gain, float euclidean_gain, bool is_squared,
    float width, float eps) {
  const float norm_p = sqrtf(sums[R1]), norm_t = sqrtf(sums[R3]);
  const float p = norm_p < eps ? eps : norm_p, t = norm_t < eps ? eps : norm_t;
  RowTerms terms;
  if (is_squared) {
    terms.euclidean = sums[DISTANCE] / width;
    terms.along_difference = 2 * euclidean_gain / width;
  } else {
    terms.euclidean = sqrtf(sums[DISTANCE]);
    terms.along_difference = sums[DISTANCE] == 0 ? 0.0f : euclidean_gain / terms.euclidean;
  }
  const float along_teacher = -cosine_gain / p / t;
  const bool is_close = sums[DISTANCE] < 0.125f * (sums[R1] + sums[R3]);
  if (is_close && norm_p >= eps && norm_t >= eps) {
    const float longer = sums[EXCESS] / (p + t);  // |p| - |t|
    terms.cosine = 0.5f * (sums[DISTANCE] - longer * longer) / p / t;
    terms.along_student = along_teacher * (longer + terms.cosine * t) / p;
    terms.along_difference -= along_teacher;
  } else {
    const float cosine = sums[R2] / p / t;
    terms.cosine = 1 - cosine;
    terms.along_student = norm_p < eps ? 0.0f : cosine_gain * cosine / p / p;
    terms.along_teacher = along_teacher;
  }
  return terms;
}

}  // namespace fakd::cuda
