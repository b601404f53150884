// Blocks of 2 x 2 tiles of results: four tiles are loaded for four instructions, six for eight.

#include <algorithm>
#include <cstring>

#include "row_kernels.h"
#include "tile_words.h"

#ifdef FAKD_HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fakd {

#ifdef FAKD_HAS_TILES

namespace {

bool find_tiles() {
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & AMX_BF16) == 0 || (edx & AMX_TILE) == 0) return false;
  if (!__builtin_cpu_supports("avx512bw")) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Tiles of 16 rows of 64 bytes, on this thread.
class FullTiles {
 public:
  FAKD_TILED FullTiles() {
    Configuration configuration;
    for (int tile = 0; tile < 8; ++tile) {
      configuration.row_bytes[tile] = 64;
      configuration.rows[tile] = TILE;
    }
    _tile_loadconfig(&configuration);
  }
  FAKD_TILED ~FullTiles() { _tile_release(); }

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

// Two tiles of rows of the left operand, `bytes` from row to row; where it is a sum, the other part lies
// `low` elements further on. And memory that is needed next, asked for meanwhile: so many lines of 64
// bytes with each depth.
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

template <bool TWO_COLUMNS>
FAKD_TILED inline __attribute__((always_inline)) void load_right(
    const uint16_t* b0, const uint16_t* b1) {
  _tile_loadd(6, b0, 64);
  if (TWO_COLUMNS) _tile_loadd(7, b1, 64);
}

template <bool TWO_ROWS, bool TWO_COLUMNS>
FAKD_TILED inline __attribute__((always_inline)) void add_products(
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

// So many depths of `a`, then one of `last` if there is one: what is left of rows that end early.
template <bool TWO_ROWS, bool TWO_COLUMNS>
FAKD_TILED void multiply_block(
    const Left& a, int64_t depths, const uint16_t* last, const uint16_t* b0, const uint16_t* b1,
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
  for (int64_t depth = 0; depth < depths; ++depth) {
    for (int64_t line = 0; line < a.next_lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    const int64_t place = depth * TILE_DEPTH;
    load_right<TWO_COLUMNS>(b0 + depth * TILE_ELEMENTS, b1 + depth * TILE_ELEMENTS);
    add_products<TWO_ROWS, TWO_COLUMNS>(a.rows[0] + place, a.rows[1] + place, a.bytes);
    if (a.low == 0) continue;
    add_products<TWO_ROWS, TWO_COLUMNS>(
        a.rows[0] + a.low + place, a.rows[1] + a.low + place, a.bytes);
  }
  if (last != nullptr) {
    load_right<TWO_COLUMNS>(b0 + depths * TILE_ELEMENTS, b1 + depths * TILE_ELEMENTS);
    add_products<TWO_ROWS, TWO_COLUMNS>(last, last + TILE_ELEMENTS, 64);
  }
  _tile_stored(0, out.tiles[0], out.bytes);
  if (TWO_COLUMNS) _tile_stored(1, out.tiles[1], out.bytes);
  if (TWO_ROWS) _tile_stored(2, out.tiles[2], out.bytes);
  if (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, out.tiles[3], out.bytes);
}

void multiply_block(
    const Left& a, int64_t depths, const uint16_t* last, const Pairs& b, int64_t column,
    bool has_two_rows, const Results& out, bool is_added) {
  const bool has_two_columns = column + TILE < b.columns;
  const uint16_t* b0 = b.tile(column);
  const uint16_t* b1 = has_two_columns ? b.tile(column + TILE) : b0;
  if (has_two_rows && has_two_columns) {
    multiply_block<true, true>(a, depths, last, b0, b1, out, is_added);
  } else if (has_two_rows) {
    multiply_block<true, false>(a, depths, last, b0, b1, out, is_added);
  } else if (has_two_columns) {
    multiply_block<false, true>(a, depths, last, b0, b1, out, is_added);
  } else {
    multiply_block<false, false>(a, depths, last, b0, b1, out, is_added);
  }
}

// A tile of results, `count` words of each of its `rows` columns, to rows of out.
FAKD_TILED void store_transposed(
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

}  // namespace

bool are_products_tiled() {
  static const bool are = are_products_packed() &&
                          std::strcmp(row_kernels().name, "avx512") == 0 && find_tiles();
  return are;
}

FAKD_TILED void multiply_split(
    const Matrix& out, const SplitRows& a, const Pairs& b, bool is_added) {
  alignas(64) float edge[2 * TILE * 2 * TILE];
  const FullTiles tiles;
  const BfloatMatrix& high = a.high;
  const int64_t bytes = high.row_stride * int64_t(sizeof(uint16_t));
  for (int64_t row = 0; row < out.rows; row += 2 * TILE) {
    const uint16_t* rows = high.data + row * high.row_stride;
    const Left left = {{rows, rows + TILE * high.row_stride}, bytes, a.low};
    const bool has_two_rows = row + TILE < out.rows;
    const int64_t height = std::min(2 * TILE, out.rows - row);
    for (int64_t column = 0; column < out.columns; column += 2 * TILE) {
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
          {to, to + TILE, to + TILE * stride, to + TILE * stride + TILE},
          stride * int64_t(sizeof(float))};
      multiply_block(left, b.depths(), nullptr, b, column, has_two_rows, results, is_added);
      for (int64_t i = 0; i < height && !is_whole; ++i) {
        std::memcpy(place + i * out.row_stride, edge + i * stride, width * sizeof(float));
      }
    }
  }
}

FAKD_TILED void multiply_head_rows(const Matrix& out, const BfloatMatrix& a, const Pairs& b) {
  alignas(64) float results[4 * TILE * TILE];
  alignas(64) uint16_t last[2 * TILE_ELEMENTS];
  Scratch room;
  const FullTiles tiles;
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
      multiply_block(
          left, depths, depths < b.depths() ? last : nullptr, b, column, row + TILE < a.rows, to,
          false);
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

#else

bool are_products_tiled() { return false; }
void multiply_split(const Matrix&, const SplitRows&, const Pairs&, bool) {}
void multiply_head_rows(const Matrix&, const BfloatMatrix&, const Pairs&) {}

#endif

}  // namespace fakd
