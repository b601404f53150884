// What multiplies blocks of 2 x 2 tiles of results: matrix tiles (AMX-BF16), or dot products of pairs
// (AVX512-BF16) on the same operands. Both take numbers below the least normal one as 0.
#pragma once

#include <cstring>

#include "tile_words.h"

#ifdef FAKD_HAS_TILES

#define FAKD_TILED __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw")))
#define FAKD_PAIRED __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl")))

namespace fakd {

// Two tiles of rows of the left operand, `bytes` from row to row; where it is a sum, the other part
// lies `low` elements further on. And memory that is needed next, asked for meanwhile: so many lines of
// 64 bytes with each depth.
struct Left {
  const uint16_t* rows[2];
  int64_t bytes;
  int64_t low = 0;
  const char* next = nullptr;
  int64_t next_lines = 0;
};

// Four tiles of results, in two rows of two.
struct Results {
  float* tiles[4];
  int64_t bytes;
};

// So many depths of the left operand, then one of `last` if there is one: what is left of rows that end
// early.
struct Depths {
  int64_t whole;
  const uint16_t* last;
};

inline void ask_for(const char*& next, int64_t lines) {
  for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
}

// Four tiles are loaded for four instructions, six for eight.
class Tiles {
 public:
  // Tiles of 16 rows of 64 bytes, on this thread, as long as this lives.
  class Session {
   public:
    FAKD_TILED Session() {
      Configuration configuration;
      for (int tile = 0; tile < 8; ++tile) {
        configuration.row_bytes[tile] = 64;
        configuration.rows[tile] = TILE;
      }
      // GCC believes that eight bytes of it are read.
      asm volatile("" ::"r"(&configuration) : "memory");
      _tile_loadconfig(&configuration);
    }
    FAKD_TILED ~Session() { _tile_release(); }
  };

  template <bool TWO_ROWS, bool TWO_COLUMNS>
  FAKD_TILED static void multiply_block(
      const Left& a, const Depths& depths, const uint16_t* b0, const uint16_t* b1,
      const Results& out, bool is_added) {
    asm volatile("" ::: "memory");  // GCC does not know that tiles are loaded from memory
    if (is_added) {
      _tile_loadd(0, out.tiles[0], out.bytes);
      if (TWO_COLUMNS) _tile_loadd(1, out.tiles[1], out.bytes);
      if (TWO_ROWS) _tile_loadd(2, out.tiles[2], out.bytes);
      if (TWO_ROWS && TWO_COLUMNS) _tile_loadd(3, out.tiles[3], out.bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const char* next = a.next;
    for (int64_t depth = 0; depth < depths.whole; ++depth) {
      ask_for(next, a.next_lines);
      const int64_t place = depth * TILE_DEPTH;
      load_right<TWO_COLUMNS>(b0 + depth * TILE_ELEMENTS, b1 + depth * TILE_ELEMENTS);
      add_products<TWO_ROWS, TWO_COLUMNS>(a.rows[0] + place, a.rows[1] + place, a.bytes);
      if (a.low == 0) continue;
      add_products<TWO_ROWS, TWO_COLUMNS>(
          a.rows[0] + a.low + place, a.rows[1] + a.low + place, a.bytes);
    }
    if (depths.last != nullptr) {
      const int64_t place = depths.whole * TILE_ELEMENTS;
      load_right<TWO_COLUMNS>(b0 + place, b1 + place);
      add_products<TWO_ROWS, TWO_COLUMNS>(depths.last, depths.last + TILE_ELEMENTS, 64);
    }
    _tile_stored(0, out.tiles[0], out.bytes);
    if (TWO_COLUMNS) _tile_stored(1, out.tiles[1], out.bytes);
    if (TWO_ROWS) _tile_stored(2, out.tiles[2], out.bytes);
    if (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, out.tiles[3], out.bytes);
  }

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  template <bool TWO_COLUMNS>
  FAKD_TILED static inline __attribute__((always_inline)) void load_right(
      const uint16_t* b0, const uint16_t* b1) {
    _tile_loadd(6, b0, 64);
    if (TWO_COLUMNS) _tile_loadd(7, b1, 64);
  }

  template <bool TWO_ROWS, bool TWO_COLUMNS>
  FAKD_TILED static inline __attribute__((always_inline)) void add_products(
      const uint16_t* a0, const uint16_t* a1, int64_t bytes) {
    _tile_loadd(4, a0, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (TWO_COLUMNS) _tile_dpbf16ps(1, 4, 7);
    if (TWO_ROWS) {
      _tile_loadd(5, a1, bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
    }
  }
};

// Eight rows of both columns of tiles at a time, in 16 registers: ten are loaded for 16 instructions.
class Dots {
 public:
  struct Session {};

  template <bool TWO_ROWS, bool TWO_COLUMNS>
  FAKD_PAIRED static void multiply_block(
      const Left& a, const Depths& depths, const uint16_t* b0, const uint16_t* b1,
      const Results& out, bool is_added) {
    constexpr int COLUMNS = TWO_COLUMNS ? 2 : 1;
    const char* next = a.next;
    for (int64_t row = 0; row < (TWO_ROWS ? 2 : 1) * TILE; row += ROWS) {
      const int64_t tile = row / TILE, first = row % TILE;
      char* places[COLUMNS];
      for (int column = 0; column < COLUMNS; ++column) {
        places[column] =
            reinterpret_cast<char*>(out.tiles[2 * tile + column]) + first * out.bytes;
      }
      __m512 sums[ROWS][COLUMNS];
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        for (int column = 0; column < COLUMNS; ++column) {
          sums[i][column] =
              is_added ? _mm512_loadu_ps(places[column] + i * out.bytes) : _mm512_setzero_ps();
        }
      }
      const auto* rows = reinterpret_cast<const char*>(a.rows[tile]) + first * a.bytes;
      for (int64_t depth = 0; depth < depths.whole; ++depth) {
        if (row == 0) ask_for(next, a.next_lines);
        const char* from = rows + depth * DEPTH_BYTES;
        const int64_t place = depth * TILE_ELEMENTS;
        add_depth<COLUMNS>(from, a.bytes, b0 + place, b1 + place, sums);
        if (a.low == 0) continue;
        add_depth<COLUMNS>(from + a.low * sizeof(uint16_t), a.bytes, b0 + place, b1 + place, sums);
      }
      if (depths.last != nullptr) {
        const auto* from = reinterpret_cast<const char*>(depths.last) + row * DEPTH_BYTES;
        const int64_t place = depths.whole * TILE_ELEMENTS;
        add_depth<COLUMNS>(from, DEPTH_BYTES, b0 + place, b1 + place, sums);
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        for (int column = 0; column < COLUMNS; ++column) {
          _mm512_storeu_ps(places[column] + i * out.bytes, sums[i][column]);
        }
      }
    }
  }

 private:
  static constexpr int ROWS = 8;
  static constexpr int64_t DEPTH_BYTES = TILE_DEPTH * sizeof(uint16_t);

  template <int COLUMNS>
  FAKD_PAIRED static inline __attribute__((always_inline)) void add_depth(
      const char* a, int64_t bytes, const uint16_t* b0, const uint16_t* b1,
      __m512 (&sums)[ROWS][COLUMNS]) {
    for (int64_t pair = 0; pair < TILE_DEPTH / 2; ++pair) {
      const uint16_t* places[2] = {b0 + pair * 2 * TILE, b1 + pair * 2 * TILE};
      __m512bh right[COLUMNS];
      for (int column = 0; column < COLUMNS; ++column) {
        right[column] = (__m512bh)_mm512_loadu_si512(places[column]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        int32_t word;
        std::memcpy(&word, a + i * bytes + pair * sizeof word, sizeof word);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(word);
        for (int column = 0; column < COLUMNS; ++column) {
          sums[i][column] = _mm512_dpbf16_ps(sums[i][column], left, right[column]);
        }
      }
    }
  }
};

}  // namespace fakd

#endif
