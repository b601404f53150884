// The gradient of a head, dW = dS^T H, of one block of tokens after the other and slice by slice.
//
// In float32 the sum lies in the caller's memory, or in ours where the head is of another dtype. It is
// read and written for every block; of products of tiles no such sum is needed for up to 2 D tokens:
// dS is kept instead, rounded to bfloat16, and one product of all tokens makes dW of it. Of more tokens
// dS is kept for D at a time, and the sum is there.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "head_products.h"
#include "head_slices.h"
#include "memory.h"
#include "product_sums.h"
#include "rows.h"
#include "tile_products.h"

namespace fakd {

class HeadGradient {
 public:
  // Of `tokens` tokens in blocks of `block`.
  HeadGradient(const Rows& grad, bool is_tiled, int64_t tokens, int64_t block)
      : kernels_(row_kernels()), grad_(grad), tokens_(tokens), block_(block) {
    if (!is_wanted()) return;
    if (tokens == 0) {
      for (int64_t row = 0; row < grad.rows; ++row) clear_row(grad, row);
      return;
    }
    if (is_tiled) {
      const bool are_all_kept = columns_of(tokens) <= 2 * grad.columns;
      run_ = are_all_kept ? tokens : block * std::max<int64_t>(1, grad.columns / columns_of(block));
      kept_stride_ = columns_of(std::min(run_, tokens)) + TILE_DEPTH;  // not a power of two
      const int64_t rows = round_up(grad.rows, TILE_DEPTH);
      kept_ = reinterpret_cast<uint16_t*>(kept_room_.reserve(rows * kept_stride_ / 2));
      if (are_all_kept) return;
    }
    const int64_t size = grad.rows * grad.columns;
    sums_ = grad.dtype == Dtype::float32 ? static_cast<float*>(grad.data) : own_sums_.reserve(size);
    advise_huge_pages(sums_, size * sizeof(float));
  }

  bool is_wanted() const { return grad_.data != nullptr; }

  // Hidden states of the block that comes next, at this token.
  void take(const Matrix& hidden, int64_t begin) {
    begin_ = begin, end_ = begin + hidden.rows;
    hidden_ = hidden;
    if (kept_ != nullptr) {
      const int64_t first = begin % run_;
      if (first == 0) {
        const int64_t columns = columns_of(std::min(run_, tokens_ - begin));
        pairs_ = reserve_pairs(columns, hidden.columns, hidden_room_);
      }
      column_ = columns_of(first);
      pack_pairs(round_rows(hidden, split_), column_, pairs_);
    } else if (are_products_packed()) {
      packed_ = pack_sum(kernels_, hidden, hidden_room_);
    }
  }

  // dS of a slice whose first row is `first`.
  void add(const LogitGradient& gradient, int64_t first, HeadScratch& scratch) {
    if (kept_ != nullptr) return keep(gradient, first, scratch.head_rows);
    const Matrix out = row_major<float>(
        sums_ + first * grad_.columns, gradient.wide.columns, grad_.columns);
    const Matrix columns = gradient.wide.transposed();
    if (packed_ != nullptr) {
      multiply_sum(kernels_, out, columns, packed_, begin_ > 0, scratch.sums);
    } else {
      multiply_sum(kernels_, out, columns, hidden_, begin_ > 0, scratch.sums);
    }
  }

  // Once all is added.
  void finish() {
    if (sums_ == nullptr || sums_ == grad_.data) return;
    torch::stable::parallel_for(0, grad_.rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        write_row(kernels_, sums_ + row * grad_.columns, grad_, row);
      }
    });
  }

 private:
  // Rows that are multiplied at a time: with them 32 rows of kept dS are used by all columns.
  static constexpr int64_t ROWS = 64;

  // Of so many tokens from the first of a block on: every block begins with a whole depth.
  int64_t columns_of(int64_t tokens) const {
    return tokens / block_ * round_up(block_, TILE_DEPTH) + round_up(tokens % block_, TILE_DEPTH);
  }

  // Slices begin at multiples of SLICE: the rows of zeros that end one are behind the last.
  void keep(const LogitGradient& gradient, int64_t first, Scratch& room) {
    static_assert(SLICE % TILE_DEPTH == 0);
    uint16_t* kept = kept_ + first * kept_stride_;
    // Rounded once: a relative error of dW of 2.4e-3 instead of 1.7e-3, where eager has 1.3e-2.
    transpose_rows(gradient.split.high, kept + column_, kept_stride_);
    if (end_ % run_ != 0 && end_ < tokens_) return;
    const bool is_added = begin_ >= run_;
    const int64_t width = grad_.columns, count = gradient.wide.columns;
    for (int64_t row = 0; row < count; row += ROWS) {
      const int64_t rows = std::min(ROWS, count - row);
      float* out = sums_ == nullptr ? room.reserve(ROWS * width) : sums_ + (first + row) * width;
      const auto columns = row_major<uint16_t>(
          kept + row * kept_stride_, rows, pairs_.rows, kept_stride_);
      multiply_split(row_major<float>(out, rows, width), {columns, 0}, pairs_, is_added);
      for (int64_t i = 0; i < rows && sums_ == nullptr; ++i) {
        write_row(kernels_, out + i * width, grad_, first + row + i);
      }
    }
  }

  const RowKernels& kernels_;
  const Rows& grad_;
  const int64_t tokens_, block_;
  float* sums_ = nullptr;
  Scratch own_sums_, hidden_room_;
  // The block that is added.
  int64_t begin_ = 0, end_ = 0;
  Matrix hidden_ = {};
  const float* packed_ = nullptr;  // hidden_ as multiply_sum takes it
  // dS [V, columns of a run of tokens] and the hidden states of these tokens.
  uint16_t* kept_ = nullptr;
  int64_t run_ = 0, kept_stride_ = 0, column_ = 0;
  Pairs pairs_ = {};
  Scratch kept_room_, split_;
};

}  // namespace fakd
