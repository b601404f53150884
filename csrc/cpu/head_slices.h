// The rows of a head in slices that stay in a cache, shared among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "memory.h"
#include "row_kernels.h"
#include "rows.h"
#include "schedule.h"

namespace fakd {

// Rows of a head that are multiplied at a time; every slice begins at a multiple.
constexpr int64_t SLICE = 512;

// What a thread takes of the vocabulary at a time.
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
      : kernels_(row_kernels()), rows_(vocabulary), workers_(std::min<int64_t>(
            torch::stable::get_num_threads(), slices_of(vocabulary))) {
    // Ever smaller: a thread whose core is slow, or shared, has taken less when all are done.
    for (int64_t first = 0; first < vocabulary;) {
      const int64_t left = slices_of(vocabulary - first);
      const int64_t slices = std::max<int64_t>(1, left / (2 * workers_));
      const int64_t end = std::min(vocabulary, first + slices * SLICE);
      parts_.push_back({int64_t(parts_.size()), first, end});
      first = end;
    }
  }

  int64_t parts() const { return int64_t(parts_.size()); }
  int64_t workers() const { return workers_; }

  // work(slice, first row, part, worker): slices of a part in turn, so that sums in it have an order.
  template <class Work>
  void run(const Rows& head, const Work& work) const {
    std::vector<Scratch> rooms(workers_);
    run_tasks(parts(), workers_, [&](int64_t index, int64_t worker) {
      const Part& part = parts_[index];
      for (int64_t first = part.begin; first < part.end; first += SLICE) {
        const int64_t end = std::min(part.end, first + SLICE);
        work(slice(head, first, end, rooms[worker]), first, part, worker);
      }
    });
  }

  // work(slice, first row), where no sum depends on who takes a slice.
  template <class Work>
  void run_alone(const Rows& head, const Work& work) const {
    std::vector<Scratch> rooms(workers_);
    run_tasks(slices_of(head.rows), workers_, [&](int64_t index, int64_t worker) {
      const int64_t first = index * SLICE;
      work(slice(head, first, std::min(head.rows, first + SLICE), rooms[worker]), first);
    });
  }

 private:
  static int64_t slices_of(int64_t rows) { return (rows + SLICE - 1) / SLICE; }

  HeadSlice slice(const Rows& head, int64_t first, int64_t end, Scratch& room) const {
    return {kernels_, head, rows_, first, end, room};
  }

  const RowKernels& kernels_;
  const CountedRows rows_;
  const int64_t workers_;
  std::vector<Part> parts_;
};

}  // namespace fakd
