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
         const_cast<float*>(out.data), out.row_stride, nullptr, 0});
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
  const bool is_packed = a.column_stride != 1;
  float* tiles = scratch.tiles.reserve(is_packed ? SUM_ROWS * depth : 0);
  float* panels = scratch.panels.reserve(packed_size(kernels, depth, b.columns));
  for (int64_t k = 0; k < a.columns; k += depth) {
    const int64_t count = std::min(depth, a.columns - k);
    kernels.pack_columns(b.data + k * b.row_stride, b.row_stride, count, b.columns, panels);
    const float* next = b.data + (k + count) * b.row_stride;
    const int64_t blocks = (a.rows + SUM_ROWS - 1) / SUM_ROWS;
    const bool goes_on = a.columns > depth && b.row_stride == b.columns;
    const int64_t next_lines = goes_on ? count * b.columns / 16 / blocks : 0;
    for (int64_t first = 0; first < a.rows; first += SUM_ROWS, next += next_lines * 16) {
      const int64_t rows = std::min(SUM_ROWS, a.rows - first);
      const float* from = a.data + first * a.row_stride + k * a.column_stride;
      for (int64_t row = 0; is_packed && row < rows; row += kernels.tile) {
        kernels.pack_tile(
            from + row * a.row_stride, a.row_stride, a.column_stride,
            std::min(kernels.tile, rows - row), count, tiles + row * count);
      }
      TileProduct call = {
          from, a.row_stride, a.column_stride, kernels.tile * a.row_stride, rows, panels,
          count * kernels.panel, kernels.panel, b.columns, count, is_added || k > 0,
          const_cast<float*>(out.data) + first * out.row_stride, out.row_stride, next, next_lines};
      if (is_packed) {
        call.a = tiles;
        call.row_stride = 1;
        call.k_stride = kernels.tile;
        call.tile_stride = kernels.tile * count;
      }
      kernels.multiply_tiles(call);
    }
  }
}

}  // namespace fakd
