// The threads that share a row of scores, and what they find together.
#pragma once

#include "shared_array.h"
#include "warp.h"

namespace fakd::cuda {

// The threads that share a row: a warp, or the whole block.
template <int ROOM>
struct RowTeam {
  int size, member;
  SharedArray<float, ROOM>& shared;
  int taken = 0;  // of shared memory: no reduction waits until another's has been read

  // combine(mine, others) into every thread, the same bits in all, since it is symmetric.
  template <int COUNT, class Combine>
  __device__ __forceinline__ void reduce(float (&values)[COUNT], const Combine& combine) {
    float other[COUNT];
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) other[k] = __shfl_xor_sync(ALL_LANES, values[k], offset);
      combine(values, other);
    }
    if (size == WARP_SIZE) return;
    if (member % WARP_SIZE == 0) {
      for (int k = 0; k < COUNT; ++k) shared[taken + member / WARP_SIZE * COUNT + k] = values[k];
    }
    __syncthreads();
    for (int k = 0; k < COUNT; ++k) values[k] = shared[taken + k];
    for (int warp = 1; warp < WARPS; ++warp) {
      for (int k = 0; k < COUNT; ++k) other[k] = shared[taken + warp * COUNT + k];
      combine(values, other);
    }
    taken += WARPS * COUNT;
  }

  template <int COUNT>
  __device__ __forceinline__ void add_up(float (&values)[COUNT]) {
    reduce(values, [](float (&mine)[COUNT], const float (&other)[COUNT]) {
      for (int k = 0; k < COUNT; ++k) mine[k] += other[k];
    });
  }
};

}  // namespace fakd::cuda
