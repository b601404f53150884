// Feature alignment on CUDA, pairs without a projection: what a launch is given, and how many
// pairs are laid out over its blocks. Plain C++: no framework, no CUDA header.
//
// A row is held in the registers of a team of threads: a warp up to 1024 elements, a block beyond.
// Rows wider than 8192 elements are read twice, all but their last tile, the second time from L2.
// Bytes per element: student and teacher read once, the gradient written once, as little as can be.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "launch_shape.h"

namespace fakd::cuda {

// Of student and of teacher, in the registers of a thread: a row of a warp as a whole. Of float32 a
// thread loads 64 values before it uses one: 16 warps have up to 128 KiB in flight.
constexpr int ELEMENTS = 32;
static_assert(ELEMENTS * WARP_SIZE == WIDEST_OF_WARP);
// Where student, teacher and gradient are never aligned together, elements are read one by one:
// with fewer in registers, most of a row is read again, by addresses that are no multiple of 16.
constexpr int LOOSE_ELEMENTS = 8;
// Of float32 rows with a bfloat16 gradient, eight elements at a time: with more sm_120 spills.
constexpr int ELEMENTS_OF_OCTETS = 24;
constexpr int PAIRS_PER_LAUNCH = 56;  // as many as the 4 KiB of kernel parameters hold

// One layer pair. Strides are in elements; rows of the gradient follow each other without a gap.
struct FeatureLine {
  const void* student;       // [rows, width] of student_dtype
  const void* teacher;       // [rows, width] of teacher_dtype
  const float* row_weights;  // [rows], or nullptr: 1 each. Rows of weight 0 are never read
  void* grad;                // [rows, width], bfloat16 as the student or float32; or nullptr
  int64_t student_stride, teacher_stride;
  int64_t rows;
  int32_t width;
  int32_t first_block;  // of this pair in its launch
  Dtype student_dtype, teacher_dtype;
};

struct FeatureParams {
  FeatureLine lines[PAIRS_PER_LAUNCH];
  const float* coefficients;  // [count, 2]: gain of the cosine and of the Euclidean term
  float* slots;               // [blocks, 2]: weighted values of the rows of each block
  float* sums;                // [count, 2]
  int32_t count;              // of lines
  int32_t blocks;
  float eps;
  bool is_squared;
};
static_assert(sizeof(FeatureParams) <= 4096, "kernel parameters are limited to 4 KiB");

// Slots that all launches need together.
inline int64_t count_slots(const std::vector<FeatureLine>& lines) {
  int64_t count = 0;
  for (const FeatureLine& line : lines) count += count_blocks(line);
  return count;
}

// Fills the sums and gradients of all lines on the current device, in the order of the stream, a
// cudaStream_t. `all` is as in `plan`.
void align_features(
    const std::vector<FeatureLine>& lines, const FeatureParams& all, void* stream);

// Whether the library holds kernels for the current device.
bool has_device_code();

// One entry per launch. `all` holds what concerns the whole call: coefficients, slots, sums, eps
// and is_squared.
inline std::vector<FeatureParams> plan(
    const std::vector<FeatureLine>& lines, const FeatureParams& all) {
  std::vector<FeatureParams> launches;
  int64_t blocks = 0, pair = 0;
  for (FeatureLine line : lines) {
    const int64_t more = count_blocks(line);
    const bool is_full = launches.empty() || launches.back().count == PAIRS_PER_LAUNCH ||
                         launches.back().blocks + more > std::numeric_limits<int32_t>::max();
    if (is_full) {
      launches.push_back(all);
      launches.back().coefficients += 2 * pair;
      launches.back().sums += 2 * pair;
      launches.back().slots += 2 * blocks;
      launches.back().count = launches.back().blocks = 0;
    }
    FeatureParams& launch = launches.back();
    line.first_block = launch.blocks;
    launch.lines[launch.count++] = line;
    launch.blocks += int32_t(more);
    blocks += more;
    ++pair;
  }
  return launches;
}

}  // namespace fakd::cuda
