// The kernels of projected_rows.h. Compiled by nvcc, and by the tests for a CPU.
#pragma once

#include "feature_row.h"
#include "projected_rows.h"

namespace fakd::cuda {

template <class T, class G>
__device__ __forceinline__ float2 align_projected_row(
    const ProjectedParams& params, const ProjectedLine& line, int row, const Team& team) {
  const float* projected = line.projected + int64_t(row) * line.width;
  G* grad = nullptr;
  if (line.grad != nullptr) {
    if constexpr (sizeof(G) == 4) grad = const_cast<float*>(projected);
    else grad = static_cast<G*>(line.grad) + int64_t(row) * line.width;
  }
  const RowTask task{
      line.width, line.row_weights == nullptr ? 1.0f : line.row_weights[row],
      params.coefficients + 2 * int64_t(line.pair), params.is_squared, params.eps};
  const T* teacher = static_cast<const T*>(line.teacher) + row * line.teacher_stride;
  return compare_row(projected, teacher, grad, task, team);
}

// A block takes one wide row, or as many rows as it has warps. G is that of all gradients.
template <class G>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
    align_projected_rows(const __grid_constant__ ProjectedParams params) {
  __shared__ SharedArray<float, WARPS * SUMS> sums;
  const int thread = int(threadIdx.x);
  const ProjectedLine& line = params.lines[find_line(params, int(blockIdx.x))];
  const int block = int(blockIdx.x) - line.first_block;
  const bool is_wide = line.width > WIDEST_OF_WARP;
  const Team team{is_wide ? THREADS : WARP_SIZE, is_wide ? thread : thread % WARP_SIZE, sums};
  const int row = is_wide ? block : block * WARPS + thread / WARP_SIZE;
  if (row >= line.rows) return;  // the warps of a narrow row await no barrier

  float2 value;
  switch (line.teacher_dtype) {
    case Dtype::float16: value = align_projected_row<__half, G>(params, line, row, team); break;
    case Dtype::bfloat16:
      value = align_projected_row<__nv_bfloat16, G>(params, line, row, team);
      break;
    default: value = align_projected_row<float, G>(params, line, row, team);
  }
  if (team.member == 0) {
    line.values[2 * int64_t(row)] = value.x;
    line.values[2 * int64_t(row) + 1] = value.y;
  }
}

// A block adds the values of one pair.
__global__ void __launch_bounds__(THREADS)
    sum_row_values(const __grid_constant__ ValueParams params) {
  __shared__ SharedArray<double, WARPS * 2> sums;
  const ValueLine& line = params.lines[blockIdx.x];
  add_values(line.values, line.rows, line.sums, sums);
}

}  // namespace fakd::cuda
