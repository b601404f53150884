// Feature alignment on the CPU: what the launcher resolved, and the call that fills its results.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/row_gram.h"
#include "rows.h"

namespace fakd {

enum class Route { none, direct, gram };

struct FeaturePair {
  Rows student;       // [N, Ds]
  Rows teacher;       // [N, Dt]
  Rows projection;    // [Dt, Ds], absent on Route::none
  Rows bias;          // [1, Dt], or absent
  const float* row_weights = nullptr;  // [N], or absent
  Rows grad_student;  // [N, Ds] float32 or bfloat16, or absent
  int64_t grad_projection = -1;  // place in FeatureProblem::grad_projections, -1: not wanted
  int64_t grad_bias = -1;        // place in FeatureProblem::grad_biases, -1: not wanted
  double cosine_gain = 0, euclidean_gain = 0;  // the pair's coefficients
  Route route = Route::none;
};

struct FeatureProblem {
  std::vector<FeaturePair> pairs;
  std::vector<Rows> grad_projections;  // [Dt, Ds] float32 or bfloat16
  std::vector<Rows> grad_biases;       // [1, Dt]
  float* sums = nullptr;               // [L, 2]
  // The gram route was asked for by name; otherwise it serves where p and t do not correlate.
  bool is_route_forced = false;
  bool is_squared = true;
  double eps = 1e-8;
};

// Sums of one task, added up in task order when all are done.
struct Totals {
  double cosine = 0, euclidean = 0;
  float* wide = nullptr;    // [Dt, Ds] of the projection's gradient
  // gram: X^T diag(c) X [Ds, Ds] below its diagonal, and the diagonal; to be multiplied by W. The
  // diagonal is large, and summed apart for the sake of the rest.
  float* narrow = nullptr;
  float* diagonal = nullptr;  // [Ds]
  float* bias = nullptr;    // [Dt]
  Scratch wide_memory, narrow_memory, diagonal_memory, bias_memory;
  bool is_wide_started = false, is_narrow_started = false;
};

inline RowWeights weights_of(const RowTerms& terms) {
  return {
      float(terms.along_student), float(terms.along_teacher), float(terms.along_difference)};
}

void feature_alignment(const FeatureProblem& problem);

}  // namespace fakd
