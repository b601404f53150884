// Feature alignment on CUDA, pairs with a projection, between the matrix products of torch's
// library: what a launch is given. Plain C++: no framework, no CUDA header.
//
// The direct route: P = X W^T in float32 -> one launch for the rows of many pairs: values, and dP
// -> dX = dP W, dW += dP^T X. P and dP of a launch fit the L2 of a card, so that the kernel reads
// the teacher's rows alone from memory. Rows are held in registers, as in feature_alignment.h.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "launch_shape.h"

namespace fakd::cuda {

constexpr int PROJECTED_PER_LAUNCH = 56;  // as many as 4 KiB of kernel parameters hold
constexpr int SUMS_PER_LAUNCH = 160;

// Some rows of one layer pair. Strides are in elements; P and dP have no gap between rows.
struct ProjectedLine {
  const float* projected;    // P [rows, width]
  const void* teacher;       // [rows, width] of teacher_dtype, rows teacher_stride apart
  const float* row_weights;  // [rows], or nullptr: 1 each. Rows of weight 0 are never read
  void* grad;                // dP [rows, width] of grad_dtype: P itself if float32; or nullptr
  float* values;             // [rows, 2]: weighted cosine and Euclidean distance of every row
  int64_t teacher_stride;
  int32_t rows, width;
  int32_t first_block;  // of these rows in their launch
  int32_t pair;         // whose coefficients are taken
  Dtype teacher_dtype;
  Dtype grad_dtype;  // float32, or bfloat16 where the products that follow are
};

struct ProjectedParams {
  ProjectedLine lines[PROJECTED_PER_LAUNCH];
  const float* coefficients;  // [pairs, 2]: gain of the cosine and of the Euclidean term
  int32_t count;              // of lines
  int32_t blocks;
  float eps;
  bool is_squared;
};
static_assert(sizeof(ProjectedParams) <= 4096, "kernel parameters are limited to 4 KiB");

// The values of all rows of a pair -> its two sums.
struct ValueLine {
  const float* values;  // [rows, 2]
  float* sums;          // [2]
  int64_t rows;
};

struct ValueParams {
  ValueLine lines[SUMS_PER_LAUNCH];
};
static_assert(sizeof(ValueParams) <= 4096, "kernel parameters are limited to 4 KiB");

// Fills values and dP of all lines on the current device, in the order of the stream, a
// cudaStream_t. `all` is as in `plan`.
void align_projected(
    const std::vector<ProjectedLine>& lines, const ProjectedParams& all, void* stream);

// Fills the sums of all lines, likewise.
void sum_values(const std::vector<ValueLine>& lines, void* stream);

// One entry per launch, whose gradients are of one dtype. `all` holds what concerns the whole call:
// coefficients, eps and is_squared.
inline std::vector<ProjectedParams> plan(
    const std::vector<ProjectedLine>& lines, const ProjectedParams& all) {
  std::vector<ProjectedParams> launches;
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
    bool is_full = true;  // as a launch of another dtype is
    for (ProjectedLine line : lines) {
      const int64_t more = count_blocks(line);
      if (line.grad_dtype != dtype || more == 0) continue;
      is_full = is_full || launches.back().count == PROJECTED_PER_LAUNCH ||
                launches.back().blocks + more > std::numeric_limits<int32_t>::max();
      if (is_full) {
        launches.push_back(all);
        launches.back().count = launches.back().blocks = 0;
        is_full = false;
      }
      ProjectedParams& launch = launches.back();
      line.first_block = launch.blocks;
      launch.lines[launch.count++] = line;
      launch.blocks += int32_t(more);
    }
  }
  return launches;
}

// Likewise. SUMS_PER_LAUNCH lines at most.
struct ValueLaunch {
  ValueParams params;
  unsigned count;  // of lines
};

inline std::vector<ValueLaunch> plan(const std::vector<ValueLine>& lines) {
  std::vector<ValueLaunch> launches;
  for (const ValueLine& line : lines) {
    if (launches.empty() || launches.back().count == SUMS_PER_LAUNCH) launches.push_back({});
    launches.back().params.lines[launches.back().count++] = line;
  }
  return launches;
}

}  // namespace fakd::cuda
