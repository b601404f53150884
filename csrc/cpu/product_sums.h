// Sums of products into matrices that may be large: the gradients of a head and of hidden states.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "memory.h"
#include "row_kernels.h"

namespace fakd {

// Room for packed operands, of one thread.
struct SumScratch {
  Scratch tiles, panels;
};

// Rows of out at a time, by the library: at 64 tokens dW ran at 150 GFLOP/s in slices of 128 and at 100
// as a whole (one core of a Sapphire Rapids class Xeon, 2026-11).
constexpr int64_t SUM_SLICE = 128;
// Rows of a that are packed at a time, whole tiles: they stay in the second cache for all panels of b.
constexpr int64_t SUM_ROWS = 128;

inline void multiply_slices(const Matrix& out, const Matrix& a, const Matrix& b, bool is_added) {
  for (int64_t row = 0; row < out.rows; row += SUM_SLICE) {
    const int64_t rows = std::min(SUM_SLICE, out.rows - row);
    multiply(
        {out.data + row * out.row_stride, rows, out.columns, out.row_stride, out.column_stride},
        {a.data + row * a.row_stride, rows, a.columns, a.row_stride, a.column_stride}, b, is_added);
  }
}

// Panels of columns of b: packed, or where they lie in rows of whole vectors.
struct Panels {
  const float* data;
  int64_t stride;      // from a panel to the next
  int64_t row_stride;  // within a panel
};

// out = a b, or out += a b, on this thread, of rows of a that lie close together.
inline void multiply_by_panels(
    const RowKernels& kernels, const Matrix& out, const Matrix& a, const Panels& b, bool is_added) {
  for (int64_t k = 0; k < a.columns; k += kernels.sum_depth) {
    kernels.multiply_tiles(
        {a.data + k * a.column_stride, a.row_stride, a.column_stride, kernels.tile * a.row_stride,
         a.rows, b.data + k * b.row_stride, b.stride, b.row_stride, out.columns,
         std::min(kernels.sum_depth, a.columns - k), is_added || k > 0,
         const_cast<float*>(out.data), out.row_stride});
  }
}

// Floats of n rows of packed columns.
inline int64_t packed_size(const RowKernels& kernels, int64_t n, int64_t columns) {
  return (columns + kernels.panel - 1) / kernels.panel * kernels.panel * n;
}

// The same of any a, and of rows of b that are contiguous.
inline void multiply_sum(
    const RowKernels& kernels, const Matrix& out, const Matrix& a, const Matrix& b, bool is_added,
    SumScratch& scratch) {
  if (!are_products_packed()) return multiply_slices(out, a, b, is_added);
  const int64_t depth = std::min(kernels.sum_depth, a.columns);
  float* tiles = scratch.tiles.reserve(SUM_ROWS * depth);
  float* panels = scratch.panels.reserve(packed_size(kernels, depth, b.columns));
  for (int64_t k = 0; k < a.columns; k += depth) {
    const int64_t count = std::min(depth, a.columns - k);
    kernels.pack_columns(b.data + k * b.row_stride, b.row_stride, count, b.columns, panels);
    for (int64_t first = 0; first < a.rows; first += SUM_ROWS) {
      const int64_t rows = std::min(SUM_ROWS, a.rows - first);
      for (int64_t row = 0; row < rows; row += kernels.tile) {
        const float* from = a.data + (first + row) * a.row_stride + k * a.column_stride;
        kernels.pack_tile(
            from, a.row_stride, a.column_stride, std::min(kernels.tile, rows - row), count,
            tiles + row * count);
      }
      kernels.multiply_tiles(
          {tiles, 1, kernels.tile, kernels.tile * count, rows, panels, count * kernels.panel,
           kernels.panel, b.columns, count, is_added || k > 0,
           const_cast<float*>(out.data) + first * out.row_stride, out.row_stride});
    }
  }
}

}  // namespace fakd
