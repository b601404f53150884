// Operands of matrix tiles: pairs of rows, sums of two bfloat16, transposes.

#include <algorithm>

#include "tile_words.h"

namespace fakd {
namespace {

uint16_t* reserve(Scratch& room, int64_t count) {
  return reinterpret_cast<uint16_t*>(room.reserve((count + 1) / 2));
}

}  // namespace

Pairs reserve_pairs(int64_t rows, int64_t columns, Scratch& room) {
  Pairs out = {nullptr, rows, columns};
  out.data = reserve(room, out.depths() * TILE_DEPTH * round_up(columns, TILE));
  return out;
}

Pairs pack_pairs(const BfloatMatrix& rows, Scratch& room) {
  const Pairs out = reserve_pairs(rows.rows, rows.columns, room);
  pack_pairs(rows, 0, out);
  return out;
}

Pairs pack_transposed_pairs(const BfloatMatrix& columns, Scratch& room) {
  const Pairs out = reserve_pairs(columns.columns, columns.rows, room);
  const int64_t depth = out.depths() * TILE_DEPTH;
  uint16_t* data = const_cast<uint16_t*>(out.data);
  for (int64_t first = 0; first < out.columns; first += TILE, data += depth * TILE) {
    for (int64_t k = 0; k < depth; ++k) {
      uint16_t* to = data + k / 2 * 2 * TILE + k % 2;
      for (int64_t lane = 0; lane < TILE; ++lane, to += 2) {
        const bool is_inside = k < out.rows && first + lane < out.columns;
        *to = is_inside ? columns.data[(first + lane) * columns.row_stride + k] : 0;
      }
    }
  }
  return out;
}

#ifdef FAKD_HAS_TILES

namespace {

// The bits of bfloat16, to nearest, ties to even; NaN stays NaN.
FAKD_WIDE inline __attribute__((always_inline)) __m512i rounded(const __m512& x) {
  const __m512i bits = _mm512_castps_si512(x), top = _mm512_srli_epi32(bits, 16);
  const __m512i half = _mm512_add_epi32(
      _mm512_and_si512(top, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7FFF));
  const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __m512i quiet = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
  return _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
}

// Pairs of two rows, 16 columns from a place on.
FAKD_WIDE inline __attribute__((always_inline)) __m512i pair(
    const uint16_t* even, const uint16_t* odd) {
  const __m512i low = _mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const __m512i high = _mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

}  // namespace

FAKD_WIDE void pack_pairs(const BfloatMatrix& rows, int64_t first, const Pairs& out) {
  const int64_t depth = round_up(rows.rows, TILE_DEPTH), whole = rows.columns / TILE * TILE;
  const int64_t stride = out.depths() * TILE_ELEMENTS;  // from 16 columns to the next
  uint16_t* data = const_cast<uint16_t*>(out.data) + first * TILE;
  alignas(64) const uint16_t zeros[TILE] = {};
  for (int64_t k = 0; k < depth; k += 2) {
    const uint16_t* even = k < rows.rows ? rows.data + k * rows.row_stride : nullptr;
    const uint16_t* odd = k + 1 < rows.rows ? even + rows.row_stride : nullptr;
    uint16_t* to = data + k * TILE;
    for (int64_t j = 0; j < whole; j += TILE, to += stride) {
      const __m512i words = pair(even == nullptr ? zeros : even + j, odd == nullptr ? zeros : odd + j);
      _mm512_storeu_si512(to, words);
    }
    if (whole == rows.columns) continue;
    for (int64_t lane = 0; lane < TILE; ++lane) {
      const bool is_inside = whole + lane < rows.columns;
      to[2 * lane] = is_inside && even != nullptr ? even[whole + lane] : 0;
      to[2 * lane + 1] = is_inside && odd != nullptr ? odd[whole + lane] : 0;
    }
  }
}

FAKD_WIDE SplitRows split_rows(const Matrix& from, Scratch& room) {
  const int64_t depth = round_up(from.columns, TILE_DEPTH), rows = round_up(from.rows, TILE_DEPTH);
  const int64_t stride = 2 * depth + TILE_DEPTH;  // not a power of two: rows would share a cache's sets
  uint16_t* out = reserve(room, rows * stride);
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = from.data + row * from.row_stride;
    uint16_t* to = out + row * stride;
    for (int64_t j = 0; j < depth; j += TILE) {
      const int64_t count = row < from.rows ? std::clamp<int64_t>(from.columns - j, 0, TILE) : 0;
      const __m512 value = _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), x + j);
      const __m512i high = rounded(value);
      const __m512 rest = _mm512_sub_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)));
      // What is not finite has no rest.
      const __mmask16 is_finite = _mm512_cmplt_epi32_mask(
          _mm512_and_si512(high, _mm512_set1_epi32(0x7FFF)), _mm512_set1_epi32(0x7F80));
      const __m512i low = rounded(_mm512_maskz_mov_ps(is_finite, rest));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), _mm512_cvtepi32_epi16(high));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + depth + j), _mm512_cvtepi32_epi16(low));
    }
  }
  return {row_major<uint16_t>(out, from.rows, from.columns, stride), depth};
}

FAKD_WIDE void transpose_rows(const BfloatMatrix& from, uint16_t* to, int64_t stride) {
  for (int64_t column = 0; column < round_up(from.columns, TILE_DEPTH); column += TILE) {
    for (int64_t row = 0; row < from.rows; row += TILE_DEPTH) {
      __m512i words[16];
      for (int i = 0; i < 16; ++i) {
        const uint16_t* even = from.data + (row + 2 * i) * from.row_stride + column;
        words[i] = pair(even, even + from.row_stride);
      }
      transpose(words);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (column + i) * stride + row, words[i]);
    }
  }
}

#else

void pack_pairs(const BfloatMatrix&, int64_t, const Pairs&) {}
SplitRows split_rows(const Matrix&, Scratch&) { return {}; }
void transpose_rows(const BfloatMatrix&, uint16_t*, int64_t) {}

#endif

}  // namespace fakd
