// Tests of the emulator itself. A kernel with one bug of each kind, named by argv[1]: the emulator
// must catch every one. With "none" that kernel is right, and the primitives must be as on a card.

#include "emulator.h"

#include "shared_array.h"

namespace {

enum class Bug {
  none, missing_barrier, missing_barrier_before_reuse, missing_syncwarp, unwritten,
  divergent_barrier, divergent_shuffle, left_early, shared_bounds, global_bounds, misaligned,
};
const char* const NAMES[] = {
    "none", "missing-barrier", "missing-barrier-before-reuse", "missing-syncwarp", "unwritten",
    "divergent-barrier", "divergent-shuffle", "left-early", "shared-bounds", "global-bounds",
    "misaligned",
};
constexpr int THREADS = 64;

// Every thread adds what the thread before it was given, then the warp's total. Bugs are in the
// second of two blocks.
__global__ void add_neighbours(float* values, int count, Bug planted) {
  __shared__ fakd::cuda::SharedArray<float, THREADS + 1> shared;  // the last is never written
  const int thread = int(threadIdx.x);
  const Bug bug = blockIdx.x == 1 ? planted : Bug::none;
  if (bug == Bug::left_early && thread == 40) return;

  if (bug == Bug::unwritten && thread == 0) values[0] += shared[THREADS];
  shared[thread] = float(thread);
  if (bug != Bug::missing_barrier) __syncthreads();
  const float before = shared[(thread + THREADS - 1) % THREADS];
  if (bug != Bug::missing_barrier_before_reuse) __syncthreads();

  shared[thread] = before;
  if (bug != Bug::missing_syncwarp) __syncwarp();
  float sum = before + shared[thread ^ 1];
  if (bug != Bug::divergent_shuffle || thread % 2 == 0) {
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  }
  if (bug != Bug::divergent_barrier || thread < 32) __syncthreads();

  if (bug == Bug::shared_bounds) sum += shared[-thread];
  int place = int(blockIdx.x) * THREADS + thread;
  if (bug == Bug::global_bounds && thread == THREADS - 1) place = count;
  if (bug == Bug::misaligned) *reinterpret_cast<float4*>(values + 1) = float4{};
  values[place] = sum;
}

__global__ void use_primitives(int* wrong, int* sum) {
  const int lane = int(threadIdx.x) % 32;
  int failures = __shfl_sync(~0u, lane, 5) != 5;
  failures += __shfl_down_sync(~0u, lane, 3) != (lane < 29 ? lane + 3 : lane);
  failures += __shfl_xor_sync(~0u, double(lane), 16) != double(lane ^ 16);
  if (lane < 8) failures += __shfl_sync(0xffu, lane, lane ^ 1) != (lane ^ 1);
  failures += blockDim.x != unsigned(THREADS) || gridDim.x != 2;
  atomicAdd(sum, int(threadIdx.x));
  if (failures != 0) atomicAdd(wrong, 1);
}

}  // namespace

int main(int, char** arguments) {
  int bug = 0;
  while (std::strcmp(NAMES[bug], arguments[1]) != 0) ++bug;
  std::vector<float> values(2 * THREADS);
  emulator::launch(add_neighbours, 2, THREADS, values.data(), int(values.size()), Bug(bug));
  int wrong = 0, sum = 0;
  emulator::launch(use_primitives, 2, THREADS, &wrong, &sum);
  if (wrong != 0 || sum != 2 * THREADS * (THREADS - 1) / 2) emulator::fail("primitives are wrong");
}
