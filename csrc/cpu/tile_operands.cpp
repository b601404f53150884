// Operands of matrix tiles: float32 rounded or split into bfloat16, pairs of rows, transposes.

#include <algorithm>

#include "tile_words.h"

namespace fakd {
namespace {

uint16_t* reserve(Scratch& room, int64_t count) {
  return reinterpret_cast<uint16_t*>(room.reserve((count + 1) / 2));
}

// Rows of so many elements, and zeros. Not a power of two, or rows would share a cache's sets.
struct Padded {
  int64_t rows, stride;
  uint16_t* data;

  Padded(int64_t rows, int64_t elements, Scratch& room)
      : rows(round_up(rows, TILE_DEPTH)), stride(elements + TILE_DEPTH),
        data(reserve(room, this->rows * stride)) {}
};

}  // namespace

Pairs reserve_pairs(int64_t rows, int64_t columns, Scratch& room) {
  const int64_t size = pairs_at(nullptr, rows, columns).size();
  return pairs_at(reserve(room, size), rows, columns);
}

Pairs pack_pairs(const BfloatMatrix& rows, Scratch& room) {
  const Pairs out = reserve_pairs(rows.rows, rows.columns, room);
  pack_pairs(rows, 0, out);
  return out;
}

BfloatMatrix transpose_rows(const BfloatMatrix& from, Scratch& room) {
  const Padded out(from.columns, round_up(from.rows, TILE_DEPTH), room);
  transpose_rows(from, out.data, out.stride);
  return row_major<uint16_t>(out.data, from.columns, from.rows, out.stride);
}

#ifdef FAKD_HAS_TILES

namespace {

FAKD_INLINE __mmask32 mask_of(int64_t count) {
  return count >= TILE_DEPTH ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
}

FAKD_INLINE __m512i bits_of(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

// What bfloat16 leaves of 16 numbers; nothing of those that are not finite.
FAKD_INLINE __m512 rest_of(__m512 x, __m256i bits) {
  const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  const __m512i infinite = _mm512_set1_epi32(0x7F800000);
  const __mmask16 is_finite =
      _mm512_cmpneq_epi32_mask(_mm512_and_si512(wide, infinite), infinite);
  return _mm512_maskz_sub_ps(is_finite, x, _mm512_castsi512_ps(wide));
}

// Two rows of 16 columns side by side; `count` columns of `rows` rows are there.
FAKD_INLINE __m512i pair(const uint16_t* even, int64_t stride, int64_t rows, int64_t count) {
  const __mmask32 mask = mask_of(std::min(count, TILE));
  const __m512i low = _mm512_maskz_loadu_epi16(rows > 0 ? mask : 0, even);
  const __m512i high = _mm512_maskz_loadu_epi16(rows > 1 ? mask : 0, even + stride);
  return _mm512_or_si512(
      _mm512_cvtepu16_epi32(_mm512_castsi512_si256(low)),
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16));
}

// The transpose of sixteen vectors of words, `stride` from row to row.
template <class Words>
FAKD_INLINE void write_transposed(const Words& words_of, uint16_t* to, int64_t stride) {
  __m512i words[TILE];
#pragma GCC unroll 16
  for (int i = 0; i < TILE; ++i) words[i] = words_of(i);
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < TILE; ++i) _mm512_storeu_si512(to + i * stride, words[i]);
}

FAKD_WIDE void pack_rows(const BfloatMatrix& rows, uint16_t* out, int64_t stride) {
  for (int64_t k = 0; k < round_up(rows.rows, TILE_DEPTH); k += 2) {
    const uint16_t* even = rows.data + k * rows.row_stride;
    uint16_t* to = out + k * TILE;
    for (int64_t column = 0; column < rows.columns; column += TILE, to += stride) {
      _mm512_storeu_si512(
          to, pair(even + column, rows.row_stride, rows.rows - k, rows.columns - column));
    }
  }
}

// Of a transpose.
FAKD_WIDE void pack_columns(const BfloatMatrix& rows, uint16_t* out, int64_t stride) {
  for (int64_t column = 0; column < rows.columns; column += TILE, out += stride) {
    const uint16_t* from = rows.data + column * rows.column_stride;
    uint16_t* to = out;
    for (int64_t k = 0; k < rows.rows; k += TILE_DEPTH, to += TILE_ELEMENTS) {
      const auto words = [&](int i) FAKD_WIDE __attribute__((always_inline)) {
        const bool is_there = column + i < rows.columns;
        const __mmask32 mask = is_there ? mask_of(rows.rows - k) : 0;
        return _mm512_maskz_loadu_epi16(mask, from + i * rows.column_stride + k);
      };
      write_transposed(words, to, 2 * TILE);
    }
  }
}

// Rows rounded, and what is left of them, too, `low` elements further on if that is not 0.
FAKD_WIDE void write_parts(const Matrix& from, const Padded& out, int64_t low) {
  const int64_t depth = round_up(from.columns, TILE_DEPTH);
  for (int64_t row = 0; row < out.rows; ++row) {
    const float* x = from.data + row * from.row_stride;
    uint16_t* to = out.data + row * out.stride;
    for (int64_t j = 0; j < depth; j += TILE_DEPTH) {
      const __mmask32 mask = row < from.rows ? mask_of(from.columns - j) : 0;
      const __m512 first = _mm512_maskz_loadu_ps(__mmask16(mask), x + j);
      const __m512 second = _mm512_maskz_loadu_ps(__mmask16(mask >> TILE), x + j + TILE);
      const __m512i bits = bits_of(first, second);
      _mm512_storeu_si512(to + j, bits);
      if (low == 0) continue;
      _mm512_storeu_si512(
          to + low + j, bits_of(
              rest_of(first, _mm512_castsi512_si256(bits)),
              rest_of(second, _mm512_extracti64x4_epi64(bits, 1))));
    }
  }
}

}  // namespace

void pack_pairs(const BfloatMatrix& rows, int64_t first, const Pairs& out) {
  const auto pack = rows.column_stride == 1 ? pack_rows : pack_columns;
  pack(rows, const_cast<uint16_t*>(out.data) + first * TILE, out.stride);
}

SplitRows split_rows(const Matrix& from, Scratch& room) {
  const int64_t depth = round_up(from.columns, TILE_DEPTH);
  const Padded out(from.rows, 2 * depth, room);
  write_parts(from, out, depth);
  return {row_major<uint16_t>(out.data, from.rows, from.columns, out.stride), depth};
}

BfloatMatrix round_rows(const Matrix& from, Scratch& room) {
  const Padded out(from.rows, round_up(from.columns, TILE_DEPTH), room);
  write_parts(from, out, 0);
  return row_major<uint16_t>(out.data, from.rows, from.columns, out.stride);
}

FAKD_WIDE void transpose_rows(const BfloatMatrix& from, uint16_t* to, int64_t stride) {
  for (int64_t column = 0; column < round_up(from.columns, TILE_DEPTH); column += TILE) {
    for (int64_t row = 0; row < from.rows; row += TILE_DEPTH) {
      const uint16_t* first = from.data + row * from.row_stride + column;
      const auto words = [&](int i) FAKD_WIDE __attribute__((always_inline)) {
        return pair(first + 2 * i * from.row_stride, from.row_stride, 2, TILE);
      };
      write_transposed(words, to + column * stride + row, stride);
    }
  }
}

#else

void pack_pairs(const BfloatMatrix&, int64_t, const Pairs&) {}
SplitRows split_rows(const Matrix&, Scratch&) { return {}; }
BfloatMatrix round_rows(const Matrix&, Scratch&) { return {}; }
void transpose_rows(const BfloatMatrix&, uint16_t*, int64_t) {}

#endif

}  // namespace fakd
