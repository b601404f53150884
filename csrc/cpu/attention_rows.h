// Which tokens of a batch entry count, and their rows of heads, copied side by side.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "row_kernels.h"
#include "rows.h"

namespace fakd {

// Which keys the counted tokens of one batch entry may attend to. Tokens of weight 0 are left out
// from the start, so padding costs nothing and is never read.
class Attended {
 public:
  Attended(int64_t tokens, const float* row_weights, bool is_causal, int64_t window, int64_t batch)
      : weights_(row_weights == nullptr ? nullptr : row_weights + batch * tokens),
        tokens_(tokens, weights_), is_causal_(is_causal), window_(window) {}

  int64_t count() const { return tokens_.count(); }
  int64_t token(int64_t row) const { return tokens_[row]; }
  const CountedRows& tokens() const { return tokens_; }
  const float* weights() const { return weights_; }
  double weight(int64_t row) const { return weights_ == nullptr ? 1.0 : weights_[tokens_[row]]; }

  // Counted keys [first_key(row), last_key(row)) are those of a counted row; neither ever falls.
  int64_t first_key(int64_t row) const {
    return window_ < 0 ? 0 : lower_bound(tokens_[row] - window_ + 1);
  }
  int64_t last_key(int64_t row) const {
    if (is_causal_) return row + 1;
    return window_ < 0 ? count() : lower_bound(tokens_[row] + window_);
  }

 private:
  // The first counted row that is not before a position.
  int64_t lower_bound(int64_t position) const {
    int64_t low = 0, high = count();
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (tokens_[middle] < position) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  const float* weights_;
  const CountedRows tokens_;
  const bool is_causal_;
  const int64_t window_;
};

// Counted keys [first, last).
struct KeyRange {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

constexpr int64_t ROWS_AHEAD = 12;

inline void copy_row(const RowKernels&, const Rows&, const char* from, int64_t n, uint16_t* to) {
  std::memcpy(to, from, n * sizeof(uint16_t));
}
inline void copy_row(const RowKernels& kernels, const Rows& rows, const char* from, int64_t n, float* to) {
  if (rows.dtype == Dtype::float32) std::memcpy(to, from, n * sizeof(float));
  else kernels.widen(from, rows.dtype, n, to);
}

// Counted rows [begin, end) of some heads, widened to float32 or the bits of bfloat16: `stride` from row
// to row, zeros behind each, and so many rows from head to head. Read in the order they have in memory,
// and asked for ahead of time.
template <class Element>
void copy_rows(
    const RowKernels& kernels, const Attended& attended, const std::vector<Rows>& from, int64_t begin,
    int64_t end, int64_t head_rows, int64_t stride, Element* to) {
  const int64_t heads = int64_t(from.size()), rows = end - begin;
  const int64_t bytes = int64_t(element_bytes(from[0].dtype));
  const bool is_interleaved =
      heads > 1 && static_cast<char*>(from[1].data) - static_cast<char*>(from[0].data) <
                       from[0].stride * bytes;
  const int64_t outer = is_interleaved ? rows : heads, inner = is_interleaved ? heads : rows;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t head = is_interleaved ? j : i, row = is_interleaved ? i : j;
      const Rows& source = from[head];
      const char* address = row_address(source, attended.token(begin + row));
      for (int64_t byte = 0; byte < source.columns * bytes; byte += 64) {
        __builtin_prefetch(address + ROWS_AHEAD * source.stride * bytes + byte, 0, 2);
      }
      Element* place = to + (head * head_rows + row) * stride;
      copy_row(kernels, source, address, source.columns, place);
      std::fill(place + source.columns, place + stride, Element(0));
    }
  }
}

}  // namespace fakd
