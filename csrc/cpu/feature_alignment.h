// Feature alignment on the CPU: what the launcher resolved, and the call that fills its results.
#pragma once

#include <cstdint>
#include <vector>

#include "row_kernels.h"

namespace fakd {

// A row-major matrix of any dtype; stride in elements.
struct Rows {
  void* data = nullptr;  // nullptr: absent
  Dtype dtype = Dtype::float32;
  int64_t rows = 0, columns = 0, stride = 0;
};

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
  bool is_squared = true;
  double eps = 1e-8;
};

void feature_alignment(const FeatureProblem& problem);

}  // namespace fakd
