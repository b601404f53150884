// Products in blocks of 2 x 2 tiles of results, by whichever unit this processor has.

#include <algorithm>
#include <cstring>

#include "row_kernels.h"
#include "tile_units.h"

namespace fakd {

#ifdef FAKD_HAS_TILES

namespace {

template <class Unit>
FAKD_WIDE void multiply_block(
    const Left& a, const Depths& depths, const Pairs& b, int64_t column, bool has_two_rows,
    const Results& out, bool is_added) {
  const bool has_two_columns = column + TILE < b.columns;
  const uint16_t* b0 = b.tile(column);
  const uint16_t* b1 = has_two_columns ? b.tile(column + TILE) : b0;
  if (has_two_rows && has_two_columns) {
    Unit::template multiply_block<true, true>(a, depths, b0, b1, out, is_added);
  } else if (has_two_rows) {
    Unit::template multiply_block<true, false>(a, depths, b0, b1, out, is_added);
  } else if (has_two_columns) {
    Unit::template multiply_block<false, true>(a, depths, b0, b1, out, is_added);
  } else {
    Unit::template multiply_block<false, false>(a, depths, b0, b1, out, is_added);
  }
}

// A tile of results, `count` words of each of its `rows` columns, to rows of out.
FAKD_WIDE inline void store_transposed(
    const float* tile, float* out, int64_t stride, int64_t rows, int64_t count) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(tile + i * TILE);
  transpose(r);
  const __mmask16 mask = __mmask16((1u << count) - 1);
  for (int64_t row = 0; row < rows; ++row) _mm512_mask_storeu_epi32(out + row * stride, mask, r[row]);
}

// Columns from `begin` on of the rows of two tiles, zeros behind them.
void fetch_tiles(const BfloatMatrix& a, int64_t row, int64_t begin, int64_t stride, uint16_t* to) {
  std::memset(to, 0, 2 * TILE * stride * sizeof(uint16_t));
  const int64_t rows = std::min(2 * TILE, a.rows - row);
  for (int64_t i = 0; i < rows; ++i) {
    const uint16_t* from = a.data + (row + i) * a.row_stride + begin;
    std::memcpy(to + i * stride, from, (a.columns - begin) * sizeof(uint16_t));
  }
}

template <class Unit>
FAKD_WIDE void multiply_split_by(
    const Matrix& out, const SplitRows& a, const Pairs& b, bool is_added) {
  alignas(64) float edge[2 * TILE * 2 * TILE];
  [[maybe_unused]] const typename Unit::Session session;
  const BfloatMatrix& high = a.high;
  const int64_t bytes = high.row_stride * int64_t(sizeof(uint16_t));
  const auto multiply = [&](int64_t row, int64_t column) FAKD_WIDE {
    const uint16_t* rows = high.data + row * high.row_stride;
    const Left left = {{rows, rows + TILE * high.row_stride}, bytes, a.low};
    const int64_t height = std::min(2 * TILE, out.rows - row);
    const int64_t width = std::min(2 * TILE, out.columns - column);
    float* place = const_cast<float*>(out.data) + row * out.row_stride + column;
    const bool is_whole = height % TILE == 0 && width % TILE == 0;
    float* to = is_whole ? place : edge;
    const int64_t stride = is_whole ? out.row_stride : 2 * TILE;
    if (is_whole) {
      for (int64_t i = 0; i < height; ++i) {  // what comes next
        __builtin_prefetch(place + i * stride + 2 * TILE, 1, 2);
        __builtin_prefetch(place + i * stride + 3 * TILE, 1, 2);
      }
    } else if (is_added) {
      std::memset(edge, 0, sizeof edge);
      for (int64_t i = 0; i < height; ++i) {
        std::memcpy(edge + i * stride, place + i * out.row_stride, width * sizeof(float));
      }
    }
    const Results results = {
        {to, to + TILE, to + TILE * stride, to + TILE * stride + TILE}, stride * int64_t(sizeof(float))};
    multiply_block<Unit>(
        left, {b.depths(), nullptr}, b, column, row + TILE < out.rows, results, is_added);
    for (int64_t i = 0; i < height && !is_whole; ++i) {
      std::memcpy(place + i * out.row_stride, edge + i * stride, width * sizeof(float));
    }
  };
  // The longer side passes once, the operand of the other stays in a cache.
  if (out.rows >= out.columns) {
    for (int64_t row = 0; row < out.rows; row += 2 * TILE) {
      for (int64_t column = 0; column < out.columns; column += 2 * TILE) multiply(row, column);
    }
  } else {
    for (int64_t column = 0; column < out.columns; column += 2 * TILE) {
      for (int64_t row = 0; row < out.rows; row += 2 * TILE) multiply(row, column);
    }
  }
}

template <class Unit>
FAKD_WIDE void multiply_head_rows_by(const Matrix& out, const BfloatMatrix& a, const Pairs& b) {
  alignas(64) float results[4 * TILE * TILE];
  alignas(64) uint16_t last[2 * TILE_ELEMENTS];
  Scratch room;
  [[maybe_unused]] const typename Unit::Session session;
  const Results to = {
      {results, results + TILE * TILE, results + 2 * TILE * TILE, results + 3 * TILE * TILE}, 64};
  for (int64_t row = 0; row < a.rows; row += 2 * TILE) {
    const uint16_t* rows = a.data + row * a.row_stride;
    int64_t stride = a.row_stride, depths = a.columns / TILE_DEPTH;
    if (row + 2 * TILE > a.rows) {  // tiles would reach behind the last row
      depths = b.depths(), stride = depths * TILE_DEPTH;
      auto* copy = reinterpret_cast<uint16_t*>(room.reserve(TILE * stride));
      fetch_tiles(a, row, 0, stride, copy);
      rows = copy;
    } else if (depths < b.depths()) {
      fetch_tiles(a, row, depths * TILE_DEPTH, TILE_DEPTH, last);
    }
    Left left = {{rows, rows + TILE * stride}, stride * int64_t(sizeof(uint16_t))};
    const bool goes_on = a.row_stride == a.columns && row + 2 * TILE < a.rows;
    const int64_t blocks = (b.columns + 2 * TILE - 1) / (2 * TILE);
    if (goes_on) {
      left.next = reinterpret_cast<const char*>(rows + 2 * TILE * stride);
      left.next_lines = TILE_DEPTH / blocks + 1;
    }
    for (int64_t column = 0; column < b.columns; column += 2 * TILE) {
      const Depths all = {depths, depths < b.depths() ? last : nullptr};
      multiply_block<Unit>(left, all, b, column, row + TILE < a.rows, to, false);
      left.next += left.next_lines * depths * 64;
      for (int64_t tile = 0; tile < 4; ++tile) {
        const int64_t word = row + tile / 2 * TILE, token = column + tile % 2 * TILE;
        const int64_t words = std::min(TILE, a.rows - word), tokens = std::min(TILE, b.columns - token);
        if (words <= 0 || tokens <= 0) continue;
        float* place = const_cast<float*>(out.data) + token * out.row_stride + word;
        store_transposed(to.tiles[tile], place, out.row_stride, tokens, words);
      }
    }
  }
}

}  // namespace

void multiply_split(const Matrix& out, const SplitRows& a, const Pairs& b, bool is_added) {
  const auto multiply =
      bfloat_unit() == BfloatUnit::tiles ? multiply_split_by<Tiles> : multiply_split_by<Dots>;
  multiply(out, a, b, is_added);
}

void multiply_head_rows(const Matrix& out, const BfloatMatrix& a, const Pairs& b) {
  const auto multiply = bfloat_unit() == BfloatUnit::tiles ? multiply_head_rows_by<Tiles>
                                                           : multiply_head_rows_by<Dots>;
  multiply(out, a, b);
}

#else

void multiply_split(const Matrix&, const SplitRows&, const Pairs&, bool) {}
void multiply_head_rows(const Matrix&, const BfloatMatrix&, const Pairs&) {}

#endif

}  // namespace fakd
