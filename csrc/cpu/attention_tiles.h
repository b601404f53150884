// The products of one side's heads in bfloat16 by tiles (tile_products.h): keys in pairs, once for all
// blocks of queries; scores, and what their gradients give. Scores are float32. A row of gradients by them
// sums to 0, so for dQ each is a sum of two bfloat16: rounded to one, dQ of a query with two keys would be
// half a per cent wrong. For dK they are rounded once: a relative error of 1.8e-3 to 2.1e-3, where the
// rounding of dK alone makes 1.7e-3 and eager has 8e-3 to 1e-2.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "memory.h"
#include "tile_products.h"

namespace fakd {

struct KeyTilesScratch {
  Scratch by_width, by_keys, gradients, turned, queries;
};

class KeyTiles {
 public:
  // Of `units` key heads, [count, width] each; with `wants_rows` for gradients of queries too.
  KeyTiles(
      int64_t units, int64_t count, int64_t width, bool wants_rows, KeyTilesScratch& scratch)
      : scratch_(scratch) {
    reserve(units, width, count, scratch.by_width, by_width_);
    if (wants_rows) reserve(units, count, width, scratch.by_keys, by_keys_);
  }

  // Keys from `begin` on, a multiple of TILE_DEPTH.
  void pack(int64_t unit, int64_t begin, const BfloatMatrix& keys) {
    pack_pairs(keys.transposed(), 0, by_width_[unit].some_columns(begin, keys.rows));
    if (!by_keys_.empty()) pack_pairs(keys, begin, by_keys_[unit]);
  }

  // out = queries keys^T, of the keys from `first` on, a multiple of TILE_DEPTH. Queries are read in whole
  // tiles, with zeros behind each.
  void multiply_queries(
      const Matrix& out, int64_t unit, const BfloatMatrix& queries, int64_t first) const {
    multiply_split(out, {queries}, by_width_[unit].some_columns(first, out.columns), false);
  }

  // Of gradients by scores of the same keys, and of their queries: of queries, gradient keys; of keys, or
  // added to these, gradient^T queries. Either may be absent.
  void multiply_gradients(
      const Matrix& gradient, int64_t unit, const BfloatMatrix& queries, int64_t first,
      const Matrix& grad_queries, const Matrix& grad_keys, bool is_added) const {
    Pairs pairs = {};
    if (grad_keys.data != nullptr) pairs = pack_pairs(queries, scratch_.queries);
    for (int64_t key = 0; key < gradient.columns; key += KEYS) {
      const int64_t keys = std::min(KEYS, gradient.columns - key);
      const SplitRows rows = split_rows(gradient.some_columns(key, keys), scratch_.gradients);
      if (grad_queries.data != nullptr) {
        multiply_split(grad_queries, rows, by_keys_[unit].some_rows(first + key, keys), key > 0);
      }
      if (grad_keys.data != nullptr) {
        multiply_split(
            grad_keys.some_rows(key, keys), {transpose_rows(rows.high, scratch_.turned)}, pairs,
            is_added);
      }
    }
  }

 private:
  // Keys whose gradients are split at a time, and turned: they stay in the first caches.
  static constexpr int64_t KEYS = 256;

  static void reserve(
      int64_t units, int64_t rows, int64_t columns, Scratch& room, std::vector<Pairs>& all) {
    const int64_t size = pairs_at(nullptr, rows, columns).size();
    const auto* data = reinterpret_cast<const uint16_t*>(room.reserve(units * size / 2));
    for (int64_t unit = 0; unit < units; ++unit) {
      all.push_back(pairs_at(data + unit * size, rows, columns));
    }
  }

  KeyTilesScratch& scratch_;
  // Of every unit: keys^T for scores, keys for gradients of queries.
  std::vector<Pairs> by_width_, by_keys_;
};

}  // namespace fakd
