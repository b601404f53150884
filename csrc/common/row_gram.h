// The row-Gram family: every supported distance of p and t is a function of four sums per row, and
// its gradient is dL/dp = A p + B t + S (p - t):
//   cosine    A = g r2 / (|p|^3 |t|),  B = -g / (|p| |t|)
//   squared   S = 2 g / Dt
//   distance  S = g / |p - t|    (0 where p = t)
// S is kept apart because A p + B t cancels where p is close to t, and p - t does not.
// No framework header. csrc/cuda has the same in float32.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FAKD_HOST_DEVICE __host__ __device__
#else
#define FAKD_HOST_DEVICE
#endif

namespace fakd {

struct RowTerms {
  double cosine;         // 1 - cos(p, t)
  double euclidean;      // |p - t|^2 / Dt, or |p - t|
  double along_student;  // A
  double along_teacher;  // B
  double along_difference;  // S
};

// r1 = |p|^2, r2 = p.t, r3 = |t|^2, distance = |p - t|^2; norms are clamped at eps as in
// torch.nn.functional.cosine_similarity. Where p is close to t, 1 - cos is taken from |p - t|^2 and
// |p| - |t|, which are small themselves, and not as a difference of large numbers:
//   1 - cos = (|p - t|^2 - (|p| - |t|)^2) / (2 |p| |t|)
FAKD_HOST_DEVICE inline RowTerms row_terms(
    double r1, double r2, double r3, double distance, double cosine_gain, double euclidean_gain,
    bool is_squared, int64_t width, double eps) {
  const double norm_p = std::sqrt(r1), norm_t = std::sqrt(r3);
  const double inverse_p = 1.0 / (norm_p < eps ? eps : norm_p);
  const double inverse_t = 1.0 / (norm_t < eps ? eps : norm_t);
  const double cosine = r2 * inverse_p * inverse_t;
  RowTerms terms;
  terms.cosine = 1.0 - cosine;
  if (norm_p >= eps && norm_t >= eps && distance < 0.25 * (r1 + r3)) {
    const double excess = (r1 - r3) / (norm_p + norm_t);  // |p| - |t|
    terms.cosine = 0.5 * (distance - excess * excess) * inverse_p * inverse_t;
  }
  terms.along_student = norm_p < eps ? 0.0 : cosine_gain * cosine * inverse_p * inverse_p;
  terms.along_teacher = -cosine_gain * inverse_p * inverse_t;
  if (is_squared) {
    terms.euclidean = distance / double(width);
    terms.along_difference = 2.0 * euclidean_gain / double(width);
  } else {
    terms.euclidean = std::sqrt(distance);
    terms.along_difference = terms.euclidean == 0.0 ? 0.0 : euclidean_gain / terms.euclidean;
  }
  return terms;
}

}  // namespace fakd
