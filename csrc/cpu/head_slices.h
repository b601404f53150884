// The rows of a head in slices that stay in a cache, shared among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "gemm.h"
#include "memory.h"
#include "row_kernels.h"
#include "rows.h"

namespace fakd {

// Rows of a head that are multiplied at a time.
constexpr int64_t SLICE = 512;

// What one thread has of the vocabulary.
struct Part {
  int64_t index, begin, end;
};

// Some rows of a head, widened to float32 where somebody asks for that.
class HeadSlice {
 public:
  HeadSlice(
      const RowKernels& kernels, const Rows& head, const CountedRows& rows, int64_t first, int64_t end,
      Scratch& room)
      : kernels_(kernels), head_(head), rows_(rows), first_(first), end_(end), room_(room) {}

  int64_t rows() const { return end_ - first_; }
  const Matrix& wide() const {
    if (wide_.data == nullptr) wide_ = fetch(kernels_, head_, rows_, first_, end_, room_);
    return wide_;
  }
  // Of a head in bfloat16.
  BfloatMatrix bits() const {
    const auto* data = reinterpret_cast<const uint16_t*>(row_address(head_, first_));
    return row_major(data, rows(), head_.columns, head_.stride);
  }

 private:
  const RowKernels& kernels_;
  const Rows& head_;
  const CountedRows& rows_;
  const int64_t first_, end_;
  Scratch& room_;
  mutable Matrix wide_ = {};
};

class HeadSlices {
 public:
  explicit HeadSlices(int64_t vocabulary)
      : kernels_(row_kernels()), rows_(vocabulary), parts_(std::min<int64_t>(
            torch::stable::get_num_threads(), (vocabulary + SLICE - 1) / SLICE)) {}

  int64_t parts() const { return parts_; }

  // work(slice, first row, part), the parts side by side: sums in them have an order.
  template <class Work>
  void run(const Rows& head, const Work& work) const {
    torch::stable::parallel_for(0, parts_, 1, [&](int64_t index, int64_t last) {
      Scratch room;
      for (; index < last; ++index) {
        const Part part = {index, head.rows * index / parts_, head.rows * (index + 1) / parts_};
        for (int64_t first = part.begin; first < part.end; first += SLICE) {
          work(slice(head, first, std::min(part.end, first + SLICE), room), first, part);
        }
      }
    });
  }

  // work(slice, first row), where no sum depends on who takes a slice: whoever is ready takes the next.
  template <class Work>
  void run_in_turn(const Rows& head, const Work& work) const {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, parts_, 1, [&](int64_t, int64_t) {
      Scratch room;
      for (int64_t first; (first = SLICE * next++) < head.rows;) {
        work(slice(head, first, std::min(head.rows, first + SLICE), room), first);
      }
    });
  }

 private:
  HeadSlice slice(const Rows& head, int64_t first, int64_t end, Scratch& room) const {
    return {kernels_, head, rows_, first, end, room};
  }

  const RowKernels& kernels_;
  const CountedRows rows_;
  const int64_t parts_;
};

}  // namespace fakd
