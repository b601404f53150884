// Some heads of one side of an attention: their score rows, block by block of query rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "attention_kl.h"
#include "attention_rows.h"
#include "attention_tiles.h"
#include "gemm.h"
#include "memory.h"
#include "product_sums.h"

namespace fakd {

// A key head and the query heads that use it.
struct KeyUnit {
  int64_t key_head;
  std::vector<int64_t> query_heads;
};

constexpr int64_t PANELS_STAGED = 4;
constexpr int64_t KEYS_STAGED = 4 * TILE_DEPTH;
// Keys of a head, in floats, that are read where they lie rather than copied.
constexpr int64_t LARGE_KEYS = 1 << 16;

struct HeadsScratch {
  Scratch keys, panels, queries, scores, grad;
  KeyTilesScratch tiles;
};

// Every unit has equally many query heads. Operands are copied side by side: products of rows that lie
// far apart take up to 1.3 times as long. They are float32, with room for a vector behind the last, since
// products read whole vectors; or bfloat16 where tiles multiply that.
class AttentionHeads {
 public:
  AttentionHeads(
      const RowKernels& kernels, const Heads& q, const Heads& k, int64_t batch,
      const Attended& attended, KeyRange keys, std::vector<KeyUnit> key_units, int64_t block_rows,
      int64_t stride, bool wants_query_grad, HeadsScratch& scratch)
      : kernels_(kernels), q_(q), batch_(batch), attended_(attended), keys_(keys),
        units_(std::move(key_units)),
        group_(int64_t(units_[0].query_heads.size())), padded_stride_(stride), scratch_(scratch) {
    for (const KeyUnit& unit : units_) {
      key_rows_.push_back(k.at(batch, unit.key_head));
      for (int64_t head : unit.query_heads) query_rows_.push_back(q.at(batch, head));
    }
    if (are_tiled(q.dtype, k.dtype)) {
      tiles_.emplace(units(), keys.count(), width(), wants_query_grad, scratch.tiles);
      pack_key_tiles();
      // Tiles of the last rows are read whole.
      scratch.queries.reserve((heads() * block_rows + 2 * TILE) * bits_stride() / 2);
    } else {
      pack_keys(wants_query_grad);
      scratch.queries.reserve(heads() * block_rows * width() + WIDEST_VECTOR);
    }
    scratch.scores.reserve(heads() * block_rows * stride);
  }

  int64_t units() const { return int64_t(units_.size()); }
  int64_t heads() const { return units() * group_; }
  int64_t width() const { return q_.width; }

  // Keys of a block, and of all that the query rows meet, begin at a multiple of it.
  static int64_t key_step(const RowKernels& kernels, const Heads& q, const Heads& k) {
    return are_tiled(q.dtype, k.dtype) ? TILE_DEPTH : std::max<int64_t>(1, kernels.panel);
  }

  // Raw scores of the query rows [begin, end) of all heads, by the keys [first, last).
  void compute_scores(int64_t begin, int64_t end, int64_t first, int64_t last) {
    begin_ = begin, rows_ = end - begin, first_ = first - keys_.first, last_ = last - keys_.first;
    // torch multiplies a stack in one call only if the result has no gaps. Without a stack gaps are
    // better: rows a power of two apart meet in few sets of the cache.
    stride_ = units() > 1 && !tiles_.has_value() ? last - first : padded_stride_;
    if (tiles_.has_value()) return multiply_query_tiles(begin, end);
    copy_rows(
        kernels_, attended_, query_rows_, begin, end, rows_, width(), scratch_.queries.get());
    if (kernels_.panel == 0) {
      multiply(scores(), this->queries(), keys().transposed());
      return;
    }
    const int64_t rows = group_ * rows_;
    for (int64_t unit = 0; unit < units(); ++unit) {
      kernels_.multiply_panels(
          scratch_.panels.get() + unit * panel_floats() + first_ * width(), last - first, width(),
          scratch_.queries.get() + unit * rows * width(), width(), rows,
          scratch_.scores.get() + unit * rows * stride_, stride_);
    }
  }

  // The row of one head, counted from the first row of the block.
  float* score_row(int64_t head, int64_t row) {
    return scratch_.scores.get() + (head * rows_ + row) * stride_;
  }
  // From a row to the next, and from the row of one head to that of the next.
  int64_t score_stride() const { return stride_; }
  int64_t head_stride() const { return rows_ * stride_; }

  // With gradients in place of the scores: the queries' gradients of this block; and those of the keys of
  // the range, [units, count, K], or what this block adds to them. Each may be absent.
  void write_grads(const Heads& of_queries, float* of_keys, bool is_added) {
    float *product = nullptr, *place = nullptr;
    if (of_queries.data != nullptr) {
      place = dense_rows(of_queries, units_[0].query_heads[0], heads(), begin_, rows_);
      product = place != nullptr ? place : scratch_.grad.reserve(heads() * rows_ * width());
    }
    if (tiles_.has_value()) {
      multiply_gradient_tiles(product, of_keys, is_added);
    } else {
      if (product != nullptr) multiply_by_keys(product);
      if (of_keys != nullptr) add_key_grad(of_keys, is_added);
    }
    if (product == place) return;
    for (int64_t head = 0; head < heads(); ++head) {
      const Rows to = of_queries.at(batch_, units_[head / group_].query_heads[head % group_]);
      for (int64_t row = 0; row < rows_; ++row, product += width()) {
        write_row(kernels_, product, to, attended_.token(begin_ + row));
      }
    }
  }

  // Rows [begin, begin + rows) of some heads in a row, where a result has them as a product would
  // leave them; null where it does not.
  float* dense_rows(
      const Heads& result, int64_t head, int64_t heads, int64_t begin, int64_t rows) const {
    const Rows first = result.at(batch_, head);
    const bool is_dense =
        first.dtype == Dtype::float32 && first.stride == first.columns &&
        attended_.tokens().is_run(begin, begin + rows) &&
        (heads == 1 || (rows == first.rows && result.head_stride == rows * first.columns));
    if (!is_dense) return nullptr;
    return reinterpret_cast<float*>(row_address(first, attended_.token(begin)));
  }

 private:
  // Of rows in bfloat16: zeros stand behind each, to whole depths.
  int64_t bits_stride() const { return round_up(width(), TILE_DEPTH); }
  uint16_t* query_bits() const { return reinterpret_cast<uint16_t*>(scratch_.queries.get()); }
  BfloatMatrix query_bits(int64_t unit) const {
    const int64_t rows = group_ * rows_, stride = bits_stride();
    return row_major<uint16_t>(query_bits() + unit * rows * stride, rows, width(), stride);
  }

  void pack_key_tiles() {
    const int64_t staged = std::min(keys_.count(), KEYS_STAGED), stride = bits_stride();
    auto* rows = reinterpret_cast<uint16_t*>(scratch_.keys.reserve(units() * staged * stride / 2));
    for (int64_t begin = keys_.first; begin < keys_.last; begin += staged) {
      const int64_t end = std::min(begin + staged, keys_.last);
      copy_rows(kernels_, attended_, key_rows_, begin, end, staged, stride, rows);
      for (int64_t unit = 0; unit < units(); ++unit) {
        const uint16_t* first = rows + unit * staged * stride;
        tiles_->pack(unit, begin - keys_.first, row_major(first, end - begin, width(), stride));
      }
    }
  }

  void multiply_query_tiles(int64_t begin, int64_t end) {
    copy_rows(kernels_, attended_, query_rows_, begin, end, rows_, bits_stride(), query_bits());
    for (int64_t unit = 0; unit < units(); ++unit) {
      tiles_->multiply_queries(scores_of(unit), unit, query_bits(unit), first_);
    }
  }

  void multiply_gradient_tiles(float* of_queries, float* of_keys, bool is_added) {
    const int64_t rows = group_ * rows_, size = keys_.count() * width();
    for (int64_t unit = 0; unit < units(); ++unit) {
      Matrix queries = {}, keys = {};
      if (of_queries != nullptr) {
        queries = row_major<float>(of_queries + unit * rows * width(), rows, width());
      }
      if (of_keys != nullptr) {
        const float* place = of_keys + unit * size + first_ * width();
        keys = row_major(place, last_ - first_, width());
      }
      tiles_->multiply_gradients(
          scores_of(unit), unit, query_bits(unit), first_, queries, keys, is_added);
    }
  }

  void add_key_grad(float* grad, bool is_added) {
    const int64_t size = keys_.count() * width(), rows = group_ * rows_;
    if (!are_products_packed()) {
      multiply(
          stack_of(grad + first_ * width(), last_ - first_, width(), size), scores().transposed(),
          queries(), is_added);
      return;
    }
    for (int64_t unit = 0; unit < units(); ++unit) {
      multiply_by_panels(
          kernels_, row_major<float>(grad + unit * size + first_ * width(), last_ - first_, width()),
          scores_of(unit).transposed(),
          {scratch_.queries.get() + unit * rows * width(), kernels_.panel, width()}, is_added);
    }
  }

  // Of one unit's packed keys.
  int64_t panel_floats() const {
    return round_up(keys_.count(), kernels_.panel) * width();
  }
  Stack stack_of(const float* data, int64_t rows, int64_t columns, int64_t stride) const {
    return {row_major(data, rows, columns), units(), stride};
  }
  Stack keys() const {
    const int64_t size = keys_.count() * width();
    return stack_of(scratch_.keys.get() + first_ * width(), last_ - first_, width(), size);
  }
  Stack queries() const {
    return stack_of(scratch_.queries.get(), group_ * rows_, width(), group_ * rows_ * width());
  }
  Stack scores() const {
    const int64_t rows = group_ * rows_;
    return {row_major(scratch_.scores.get(), rows, last_ - first_, stride_), units(), rows * stride_};
  }

  Matrix scores_of(int64_t unit) const {
    const int64_t rows = group_ * rows_;
    return row_major<float>(
        scratch_.scores.get() + unit * rows * stride_, rows, last_ - first_, stride_);
  }

  // out = scores keys, [units, group * rows, K].
  void multiply_by_keys(float* out) {
    const int64_t size = group_ * rows_ * width();
    if (!are_products_packed()) {
      multiply(stack_of(out, group_ * rows_, width(), size), scores(), keys());
      return;
    }
    for (int64_t unit = 0; unit < units(); ++unit) {
      const Matrix keys = keys_of(unit);
      multiply_by_panels(
          kernels_, row_major<float>(out + unit * size, group_ * rows_, width()), scores_of(unit),
          {keys.data + first_ * keys.row_stride, kernels_.panel, keys.row_stride}, false);
    }
  }

  // Panels of the keys, once for all blocks, where a library would pack them again for each; and the
  // rows themselves, where products need them and cannot read them where they lie.
  void pack_keys(bool wants_rows) {
    const int64_t count = keys_.count();
    is_copied_ = kernels_.panel == 0 || (wants_rows && !are_keys_readable());
    const int64_t staged = is_copied_ ? count : std::min(count, PANELS_STAGED * kernels_.panel);
    float* rows = scratch_.keys.reserve(units() * staged * width() + WIDEST_VECTOR);
    float* panels = scratch_.panels.reserve(kernels_.panel > 0 ? units() * panel_floats() : 0);
    for (int64_t begin = keys_.first; begin < keys_.last; begin += staged) {
      const int64_t end = std::min(begin + staged, keys_.last);
      // Copied first, in order: cold rows are slow to turn.
      copy_rows(kernels_, attended_, key_rows_, begin, end, staged, width(), rows);
      if (kernels_.panel == 0) continue;
      for (int64_t unit = 0; unit < units(); ++unit) {
        kernels_.pack_rows(
            rows + unit * staged * width(), width(), end - begin, width(),
            panels + unit * panel_floats() + (begin - keys_.first) * width());
      }
    }
  }
  bool are_keys_readable() const {
    return keys_.count() * width() >= LARGE_KEYS && are_products_packed() &&
           key_rows_[0].dtype == Dtype::float32 && width() % WIDEST_VECTOR == 0 &&
           attended_.tokens().is_run(keys_.first, keys_.last);
  }
  // Of one unit, [count, K].
  Matrix keys_of(int64_t unit) const {
    const int64_t count = keys_.count();
    if (is_copied_) {
      return row_major<float>(scratch_.keys.get() + unit * count * width(), count, width());
    }
    const Rows& rows = key_rows_[unit];
    const char* address = row_address(rows, attended_.token(keys_.first));
    return row_major(reinterpret_cast<const float*>(address), count, width(), rows.stride);
  }

  const RowKernels& kernels_;
  const Heads& q_;
  const int64_t batch_;
  const Attended& attended_;
  const KeyRange keys_;  // that some query row may attend to
  const std::vector<KeyUnit> units_;
  const int64_t group_, padded_stride_;
  HeadsScratch& scratch_;
  std::optional<KeyTiles> tiles_;
  std::vector<Rows> key_rows_, query_rows_;  // of every unit, of every head
  bool is_copied_ = false;                   // the keys, as rows
  int64_t stride_ = 0;
  int64_t begin_ = 0, rows_ = 0;
  int64_t first_ = 0, last_ = 0;  // keys of the block, counted from the first of the range
};

}  // namespace fakd
