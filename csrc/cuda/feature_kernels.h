// The kernels of feature_alignment.h. Compiled by nvcc, and by the tests for a CPU.
#pragma once

#include "feature_row.h"

namespace fakd::cuda {

template <class X, class T>
__device__ __forceinline__ float2 align_row(
    const FeatureParams& params, int pair, int64_t row, const Team& team) {
  const FeatureLine& line = params.lines[pair];
  GradOf<X>* grad = static_cast<GradOf<X>*>(line.grad);
  const RowTask task{
      line.width, line.row_weights == nullptr ? 1.0f : line.row_weights[row],
      params.coefficients + 2 * pair, params.is_squared, params.eps};
  return compare_row(
      static_cast<const X*>(line.student) + row * line.student_stride,
      static_cast<const T*>(line.teacher) + row * line.teacher_stride,
      grad == nullptr ? nullptr : grad + row * line.width, task, team);
}

template <class X>
__device__ __forceinline__ float2 align_row(
    const FeatureParams& params, int pair, int64_t row, const Team& team) {
  switch (params.lines[pair].teacher_dtype) {
    case Dtype::float16: return align_row<X, __half>(params, pair, row, team);
    case Dtype::bfloat16: return align_row<X, __nv_bfloat16>(params, pair, row, team);
    default: return align_row<X, float>(params, pair, row, team);
  }
}

// A block takes one wide row, or as many rows as it has warps.
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
    align_rows(const __grid_constant__ FeatureParams params) {
  __shared__ SharedArray<float, WARPS * SUMS> sums;
  __shared__ SharedArray<float, WARPS * 2> values;
  const int thread = int(threadIdx.x), warp = thread / WARP_SIZE;
  const int pair = find_line(params, int(blockIdx.x));
  const FeatureLine& line = params.lines[pair];
  const int64_t block = int(blockIdx.x) - line.first_block;
  const bool is_wide = line.width > WIDEST_OF_WARP;
  const Team team{is_wide ? THREADS : WARP_SIZE, is_wide ? thread : thread % WARP_SIZE, sums};
  const int64_t row = is_wide ? block : block * WARPS + warp;

  float2 value = make_float2(0, 0);
  if (row < line.rows) {
    switch (line.student_dtype) {
      case Dtype::float16: value = align_row<__half>(params, pair, row, team); break;
      case Dtype::bfloat16: value = align_row<__nv_bfloat16>(params, pair, row, team); break;
      default: value = align_row<float>(params, pair, row, team);
    }
  }
  if (thread % WARP_SIZE == 0) {
    values[2 * warp] = value.x;
    values[2 * warp + 1] = value.y;
  }
  __syncthreads();
  if (thread < 2) {
    float total = 0;
    for (int i = 0; i < (is_wide ? 1 : WARPS); ++i) total += values[2 * i + thread];
    params.slots[2 * int64_t(blockIdx.x) + thread] = total;
  }
}

// A block adds the slots of one pair.
__global__ void __launch_bounds__(THREADS) sum_slots(const __grid_constant__ FeatureParams params) {
  __shared__ SharedArray<double, WARPS * 2> sums;
  const int pair = int(blockIdx.x), begin = params.lines[pair].first_block;
  const int end = pair + 1 < params.count ? params.lines[pair + 1].first_block : params.blocks;
  add_values(params.slots + 2 * int64_t(begin), end - begin, params.sums + 2 * pair, sums);
}

}  // namespace fakd::cuda
