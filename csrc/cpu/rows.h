// Rows in the caller's memory: views of any supported dtype, and those of them that count.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "memory.h"
#include "row_kernels.h"

namespace fakd {

// A row-major matrix of any dtype; stride in elements.
struct Rows {
  void* data = nullptr;  // nullptr: absent
  Dtype dtype = Dtype::float32;
  int64_t rows = 0, columns = 0, stride = 0;
};

inline size_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline char* row_address(const Rows& rows, int64_t row) {
  return static_cast<char*>(rows.data) + row * rows.stride * int64_t(element_bytes(rows.dtype));
}

inline void write_row(const RowKernels& kernels, const float* from, const Rows& to, int64_t row) {
  char* address = row_address(to, row);
  if (to.dtype == Dtype::bfloat16) {
    kernels.narrow_bfloat16(from, to.columns, reinterpret_cast<uint16_t*>(address));
  } else {
    std::memcpy(address, from, to.columns * sizeof(float));
  }
}

// Rows that count: all of them, or those of nonzero weight.
class CountedRows {
 public:
  explicit CountedRows(int64_t rows, const float* weights = nullptr) : count_(rows) {
    if (weights == nullptr) return;
    is_listed_ = true;
    for (int64_t row = 0; row < rows; ++row) {
      if (weights[row] != 0) rows_.push_back(row);
    }
    count_ = int64_t(rows_.size());
  }
  int64_t count() const { return count_; }
  int64_t operator[](int64_t index) const { return is_listed_ ? rows_[index] : index; }
  bool is_run(int64_t begin, int64_t end) const {
    return !is_listed_ || rows_[end - 1] - rows_[begin] == end - 1 - begin;
  }
  // Of every counted row: behind the last one that follows it without a gap.
  std::vector<int64_t> run_ends() const {
    std::vector<int64_t> ends(count_);
    for (int64_t row = count_ - 1; row >= 0; --row) {
      const bool is_last = row + 1 == count_ || (*this)[row + 1] != (*this)[row] + 1;
      ends[row] = is_last ? row + 1 : ends[row + 1];
    }
    return ends;
  }

 private:
  std::vector<int64_t> rows_;
  int64_t count_;
  bool is_listed_ = false;
};

// A block of counted rows in float32: the caller's own memory where it is that already.
inline Matrix fetch(
    const RowKernels& kernels, const Rows& from, const CountedRows& counted, int64_t begin,
    int64_t end, Scratch& scratch) {
  const int64_t rows = end - begin, columns = from.columns;
  if (from.dtype == Dtype::float32 && counted.is_run(begin, end)) {
    const float* data = reinterpret_cast<const float*>(row_address(from, counted[begin]));
    return row_major(data, rows, columns, from.stride);
  }
  float* to = scratch.reserve(rows * columns);
  torch::stable::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernels.widen(row_address(from, counted[begin + row]), from.dtype, columns, to + row * columns);
    }
  });
  return row_major(to, rows, columns);
}

inline void clear_row(const Rows& rows, int64_t row) {
  std::memset(row_address(rows, row), 0, rows.columns * element_bytes(rows.dtype));
}

// Zeros where nothing counts: the rows of weight 0.
inline void zero_uncounted(const Rows& rows, const float* weights) {
  if (rows.data == nullptr || weights == nullptr) return;
  for (int64_t row = 0; row < rows.rows; ++row) {
    if (weights[row] == 0) clear_row(rows, row);
  }
}

}  // namespace fakd
