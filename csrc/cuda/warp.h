// What the threads of a warp find together, and which line of its launch a block belongs to.
#pragma once

#include "launch_shape.h"

namespace fakd::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(ALL_LANES, value, offset);
  }
  return value;
}

// The line of a block: the last that begins at or before it.
template <class Params>
__device__ __forceinline__ int find_line(const Params& params, int block) {
  int line = 0;
  for (int end = params.count; end - line > 1;) {
    const int middle = (line + end) / 2;
    if (params.lines[middle].first_block <= block) line = middle;
    else end = middle;
  }
  return line;
}

}  // namespace fakd::cuda
