// The products of one side with its head, slice by slice: logits, and gradients of hidden states.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "head_slices.h"
#include "memory.h"
#include "output_kl.h"
#include "product_sums.h"
#include "row_kernels.h"
#include "tile_products.h"

namespace fakd {

// Operands of one thread.
struct HeadScratch {
  SumScratch sums;
  Scratch split, pairs, head_rows;
};

// A slice of dS, [tokens, rows of the slice], and as products of tiles take it.
struct LogitGradient {
  Matrix wide = {};
  SplitRows split = {};
};

class HeadProducts {
 public:
  explicit HeadProducts(const OutputHead& side)
      : kernels_(row_kernels()), is_tiled_(are_tiled(side.hidden.dtype, side.head.dtype)) {}

  bool is_tiled() const { return is_tiled_; }

  // Hidden states of the tokens whose logits come next.
  void take_for_logits(const Matrix& hidden) {
    hidden_ = hidden;
    if (hidden.rows == 0) return;
    if (is_tiled_) {
      pairs_ = pack_pairs(round_rows(hidden, split_).transposed(), room_);
    } else if (kernels_.panel > 0 && hidden.columns > 0) {
      packed_ = room_.reserve(packed_size(kernels_, hidden.columns, hidden.rows));
      kernels_.pack_rows(hidden.data, hidden.row_stride, hidden.rows, hidden.columns, packed_);
    }
  }

  // out = hidden slice^T
  void multiply_logits(const Matrix& out, const HeadSlice& slice) const {
    if (hidden_.rows == 0) return;
    if (is_tiled_) return multiply_head_rows(out, slice.bits(), pairs_);
    const Matrix& head = slice.wide();
    if (packed_ == nullptr) return multiply(out, hidden_, head.transposed());
    kernels_.multiply_rows(
        packed_, hidden_.rows, hidden_.columns, head.data, head.row_stride, head.rows,
        const_cast<float*>(out.data), out.row_stride);
  }

  LogitGradient gradient(const Matrix& wide, HeadScratch& scratch) const {
    return {wide, is_tiled_ ? split_rows(wide, scratch.split) : SplitRows{}};
  }

  // grad_hidden = dS slice, or += dS slice
  void multiply_gradient(
      const LogitGradient& gradient, const HeadSlice& slice, const Matrix& grad_hidden,
      bool is_added, HeadScratch& scratch) const {
    if (is_tiled_) {
      multiply_by_head(grad_hidden, gradient.split, slice.bits(), is_added, scratch.pairs);
    } else {
      multiply_sum(kernels_, grad_hidden, gradient.wide, slice.wide(), is_added, scratch.sums);
    }
  }

 private:
  // Pairs of so many rows of a head, 1024 wide, take a quarter of a private cache of 2 MiB.
  static constexpr int64_t PAIRED_ROWS = 256;

  static void multiply_by_head(
      const Matrix& out, const SplitRows& gradient, const BfloatMatrix& head, bool is_added,
      Scratch& room) {
    for (int64_t first = 0; first < head.rows; first += PAIRED_ROWS) {
      const int64_t rows = std::min(PAIRED_ROWS, head.rows - first);
      multiply_split(
          out, {gradient.high.some_columns(first, rows), gradient.low},
          pack_pairs(head.some_rows(first, rows), room), is_added || first > 0);
    }
  }

  const RowKernels& kernels_;
  const bool is_tiled_;
  Matrix hidden_ = {};
  float* packed_ = nullptr;  // hidden_ as multiply_rows takes it
  Pairs pairs_ = {};         // likewise multiply_head_rows
  Scratch room_, split_;
};

}  // namespace fakd
