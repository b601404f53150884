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
// Rows of a that are packed at a time, whole tiles: they stay in the first cache for all panels of b. dW
// of 80 tokens, 1024 wide, ran at 272 GFLOP/s in groups of 64 and at 225 in groups of 128 (2 cores of a
// Sapphire Rapids class Xeon, 2026-11).
constexpr int64_t SUM_ROWS = 64;

inline void multiply_slices(const Matrix& out, const Matrix& a, const Matrix& b, bool is_added) {
  for (int64_t row = 0; row < out.rows; row += SUM_SLICE) {
    const int64_t rows = std::min(SUM_SLICE, out.rows - row);
    multiply(out.some_rows(row, rows), a.some_rows(row, rows), b, is_added);
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

// The same of packed columns of b, and of a transposed matrix.
inline void multiply_packed(
    const RowKernels& kernels, const Matrix& out, const Matrix& a, const float* b, bool is_added,
    Scratch& room) {
  const int64_t n = a.columns, tile = kernels.tile;
  float* tiles = room.reserve(SUM_ROWS * n);
  for (int64_t first = 0; first < a.rows; first += SUM_ROWS) {
    const int64_t rows = std::min(SUM_ROWS, a.rows - first);
    kernels.pack_tiles(a.data + first, a.column_stride, rows, n, tiles);
    kernels.multiply_tiles(
        {tiles, 1, tile, tile * n, rows, b, kernels.panel * n, kernels.panel, out.columns, n, is_added,
         const_cast<float*>(out.data) + first * out.row_stride, out.row_stride, nullptr, 0});
  }
}

// The same of few rows of a: a panel of b is packed, and used by all of them at once. The rows of b that
// come next are asked for meanwhile.
inline void multiply_few(
    const RowKernels& kernels, const Matrix& out, const Matrix& a, const Matrix& b, bool is_added,
    Scratch& room) {
  const int64_t panel = kernels.panel, depth = kernels.sum_depth;
  const int64_t panels = (b.columns + panel - 1) / panel;
  float* packed = room.reserve(panel * depth);
  for (int64_t k = 0; k < a.columns; k += depth) {
    const int64_t n = std::min(depth, a.columns - k);
    const float* next = b.data + (k + n) * b.row_stride;
    const bool goes_on = k + n < a.columns && b.row_stride == b.columns;
    const int64_t next_lines = goes_on ? n * b.columns / 16 / panels : 0;
    for (int64_t first = 0; first < b.columns; first += panel, next += next_lines * 16) {
      const int64_t columns = std::min(panel, b.columns - first);
      kernels.pack_columns(b.data + k * b.row_stride + first, b.row_stride, n, columns, packed);
      kernels.multiply_tiles(
          {a.data + k, a.row_stride, 1, kernels.tile * a.row_stride, a.rows, packed, 0, panel, columns,
           n, is_added || k > 0, const_cast<float*>(out.data) + first, out.row_stride, next,
           next_lines});
    }
  }
}

// Columns of b, for sums over its rows, `sum_depth` of them at a time.
inline const float* pack_sum(const RowKernels& kernels, const Matrix& b, Scratch& room) {
  const int64_t depth = kernels.sum_depth;
  float* packed = room.reserve(packed_size(kernels, b.rows, b.columns));
  for (int64_t k = 0; k < b.rows; k += depth) {
    kernels.pack_columns(
        b.data + k * b.row_stride, b.row_stride, std::min(depth, b.rows - k), b.columns,
        packed + packed_size(kernels, k, b.columns));
  }
  return packed;
}

// out = a b, or out += a b, of packed columns of b, on this thread: a is the transpose of a row-major
// matrix.
inline void multiply_sum(
    const RowKernels& kernels, const Matrix& out, const Matrix& a, const float* packed, bool is_added,
    SumScratch& scratch) {
  for (int64_t k = 0; k < a.columns; k += kernels.sum_depth) {
    const int64_t n = std::min(kernels.sum_depth, a.columns - k);
    multiply_packed(
        kernels, out, a.some_columns(k, n),
        packed + packed_size(kernels, k, out.columns), is_added || k > 0, scratch.tiles);
  }
}

// The same of a row-major matrix or the transpose of one, and of rows of b that are contiguous.
inline void multiply_sum(
    const RowKernels& kernels, const Matrix& out, const Matrix& a, const Matrix& b, bool is_added,
    SumScratch& scratch) {
  if (!are_products_packed()) return multiply_slices(out, a, b, is_added);
  if (a.column_stride == 1) return multiply_few(kernels, out, a, b, is_added, scratch.panels);
  for (int64_t k = 0; k < a.columns; k += kernels.sum_depth) {
    const int64_t n = std::min(kernels.sum_depth, a.columns - k);
    multiply_packed(
        kernels, out, a.some_columns(k, n), pack_sum(kernels, b.some_rows(k, n), scratch.panels),
        is_added || k > 0, scratch.tiles);
  }
}

}  // namespace fakd
