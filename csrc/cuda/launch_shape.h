// How rows are laid out over a launch, alike in all kernels. Plain C++.
#pragma once

#include <cstdint>

namespace fakd::cuda {

constexpr int WARP_SIZE = 32;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP_SIZE;
// Occupancy target: two blocks on a multiprocessor of 65536 registers, 128 for each thread.
constexpr int BLOCKS_PER_PROCESSOR = 2;
constexpr int WIDEST_OF_WARP = 1024;
constexpr int64_t WIDEST = int64_t(1) << 30;  // columns are counted in int32

enum class Dtype : uint8_t { float32, float16, bfloat16 };

// A row is a warp's, or a block's where it is wide.
inline int rows_per_block(int32_t width) { return width > WIDEST_OF_WARP ? 1 : WARPS; }

// A pair, or a part of one, has `rows` of `width`.
template <class Line>
int64_t count_blocks(const Line& line) {
  const int64_t rows = rows_per_block(line.width);
  return (line.rows + rows - 1) / rows;
}

}  // namespace fakd::cuda
