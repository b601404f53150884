// The products of one side's hidden states with its head, slice by slice: logits, and gradients.
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
  Scratch split, transposed, pairs;
};

class HeadProducts {
 public:
  explicit HeadProducts(const OutputHead& side)
      : kernels_(row_kernels()), is_tiled_(
            side.hidden.dtype == Dtype::bfloat16 && side.head.dtype == Dtype::bfloat16 &&
            are_products_tiled()) {}

  bool is_tiled() const { return is_tiled_; }

  // Hidden states of the tokens whose logits come next.
  void take_for_logits(const Matrix& hidden) {
    hidden_ = hidden;
    if (hidden.rows == 0) return;
    if (is_tiled_) {
      hidden_pairs_ = pack_transposed_pairs(split_rows(hidden, split_).high, hidden_room_);
    } else if (kernels_.panel > 0) {
      packed_ = hidden_room_.reserve(packed_size(kernels_, hidden.columns, hidden.rows));
      kernels_.pack_rows(hidden.data, hidden.row_stride, hidden.rows, hidden.columns, packed_);
    }
  }

  // Hidden states of the tokens whose gradients are summed into the head's.
  void take_for_sums(const Matrix& hidden) {
    summed_ = hidden;
    if (is_tiled_) {
      summed_pairs_ = pack_pairs(split_rows(hidden, split_).high, summed_room_);
    } else if (are_products_packed()) {
      columns_ = pack_sum(kernels_, hidden, summed_room_);
    }
  }

  // out = hidden slice^T
  void multiply_logits(const Matrix& out, const HeadSlice& slice) const {
    if (hidden_.rows == 0) return;
    if (is_tiled_) return multiply_head_rows(out, slice.bits(), hidden_pairs_);
    const Matrix& head = slice.wide();
    if (packed_ == nullptr) return multiply(out, hidden_, head.transposed());
    kernels_.multiply_rows(
        packed_, hidden_.rows, hidden_.columns, head.data, head.row_stride, head.rows,
        const_cast<float*>(out.data), out.row_stride);
  }

  // grad_hidden = or += dS slice, and grad_head = or += dS^T hidden; either may be absent.
  void multiply_gradients(
      const Matrix& gradient, const HeadSlice& slice, const Matrix& grad_hidden,
      bool is_hidden_added, const Matrix& grad_head, bool is_head_added,
      HeadScratch& scratch) const {
    if (is_tiled_) {
      const SplitRows split = split_rows(gradient, scratch.split);
      if (grad_hidden.data != nullptr) {
        multiply_by_head(grad_hidden, split, slice.bits(), is_hidden_added, scratch.pairs);
      }
      if (grad_head.data != nullptr) {
        // Rounded once: a relative error of dW of 2.4e-3 instead of 1.7e-3, where eager has 1.3e-2.
        const BfloatMatrix columns = transpose_rows(split.high, scratch.transposed);
        multiply_split(grad_head, {columns, 0}, summed_pairs_, is_head_added);
      }
      return;
    }
    if (grad_hidden.data != nullptr) {
      multiply_sum(kernels_, grad_hidden, gradient, slice.wide(), is_hidden_added, scratch.sums);
    }
    if (grad_head.data == nullptr) return;
    if (columns_ != nullptr) {
      multiply_sum(
          kernels_, grad_head, gradient.transposed(), columns_, is_head_added, scratch.sums);
    } else {
      multiply_sum(
          kernels_, grad_head, gradient.transposed(), summed_, is_head_added, scratch.sums);
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
  Matrix hidden_ = {}, summed_ = {};
  float* packed_ = nullptr;          // hidden_ as multiply_rows takes it
  const float* columns_ = nullptr;   // summed_ as multiply_sum does
  Pairs hidden_pairs_ = {}, summed_pairs_ = {};
  Scratch hidden_room_, summed_room_, split_;
};

}  // namespace fakd
