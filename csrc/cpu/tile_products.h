// Products of bfloat16 matrices into float32, tile by tile, on processors with matrix tiles (AMX-BF16)
// or dot products of pairs (AVX512-BF16): they are exact and summed in float32, so logits are never
// rounded.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "memory.h"

namespace fakd {

constexpr int64_t TILE = 16;        // rows and columns of a result
constexpr int64_t TILE_DEPTH = 32;  // products that one instruction sums

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Rows of 16 columns each as tiles want them of their right operand: pairs of rows side by side, zeros
// behind the last row and column.
struct Pairs {
  const uint16_t* data;
  int64_t rows, columns;
  int64_t stride;  // elements from 16 columns to the next

  int64_t depths() const { return (rows + TILE_DEPTH - 1) / TILE_DEPTH; }
  int64_t size() const { return round_up(columns, TILE) / TILE * stride; }
  const uint16_t* tile(int64_t column) const { return data + column / TILE * stride; }
  // Those from `first` on, a multiple of TILE_DEPTH or of TILE.
  Pairs some_rows(int64_t first, int64_t count) const {
    return {data + first * TILE, count, columns, stride};
  }
  Pairs some_columns(int64_t first, int64_t count) const {
    return {tile(first), rows, count, stride};
  }
};

inline Pairs pairs_at(const uint16_t* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, round_up(rows, TILE_DEPTH) * TILE};
}
Pairs reserve_pairs(int64_t rows, int64_t columns, Scratch& room);
// Of row-major matrices and of transposes of such: rows from `first` on, a multiple of TILE_DEPTH, and
// zeros behind them to a whole depth.
void pack_pairs(const BfloatMatrix& rows, int64_t first, const Pairs& out);
Pairs pack_pairs(const BfloatMatrix& rows, Scratch& room);

// Float32 as a sum of two bfloat16, good to 16 bits.
struct SplitRows {
  BfloatMatrix high = {};
  int64_t low = 0;  // elements from the high part of a row to its low part; 0: there is none
};

// What follows has zeros behind its last row and column, to whole depths.
SplitRows split_rows(const Matrix& from, Scratch& room);
// The high parts alone.
BfloatMatrix round_rows(const Matrix& from, Scratch& room);
// The transpose of such rows.
BfloatMatrix transpose_rows(const BfloatMatrix& from, Scratch& room);
void transpose_rows(const BfloatMatrix& from, uint16_t* to, int64_t stride);

// out = a b, or out += a b.
void multiply_split(const Matrix& out, const SplitRows& a, const Pairs& b, bool is_added);
// out = (a b)^T, of rows of a where they lie.
void multiply_head_rows(const Matrix& out, const BfloatMatrix& a, const Pairs& b);

}  // namespace fakd
