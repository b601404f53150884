// Pairs without a projection: one pass over student and teacher, the gradient written on the way.
#pragma once

#include "feature_alignment.h"

namespace fakd {

// Gradients beyond this, a private cache, go past the caches, which saves reading the lines first:
// 12 pairs of 4096 x 768 took 15.7 ms so and 20.5 ms otherwise (as above).
constexpr int64_t STREAM_BYTES = 2 << 20;

// Rows go in groups: the square roots and divisions of one row hide behind the sums of the next.
class RowComparison {
 public:
  RowComparison(
      const FeatureProblem& problem, const FeaturePair& pair, Scratch& scratch, Totals& totals)
      : kernels_(row_kernels()), problem_(problem), pair_(pair), totals_(totals),
        width_(pair.teacher.columns), padded_((width_ + 15) / 16 * 16),
        memory_(scratch.reserve((2 * GROUP + 1) * padded_)) {
    const Rows& grad = pair.grad_student;
    is_streamed_ = grad.data != nullptr && grad.dtype == Dtype::float32 &&
                   grad.rows * width_ * 4 >= STREAM_BYTES && width_ % 16 == 0 &&
                   reinterpret_cast<uintptr_t>(grad.data) % 64 == 0;
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double weight = pair_.row_weights == nullptr ? 1.0 : double(pair_.row_weights[row]);
      if (weight == 0) continue;
      Member& member = group_[count_];
      member.row = row;
      member.weight = weight;
      member.student = read(pair_.student, row, memory_ + 2 * count_ * padded_);
      member.teacher = read(pair_.teacher, row, memory_ + (2 * count_ + 1) * padded_);
      kernels_.sums(member.student, member.teacher, width_, &member.sums);
      if (++count_ == GROUP) finish_group();
    }
    finish_group();
  }

 private:
  static constexpr int64_t GROUP = 4;
  struct Member {
    int64_t row;
    double weight;
    const float *student, *teacher;
    RowSums sums;
    RowTerms terms;
  };

  // The row in float32: in place, or widened into `to`.
  const float* read(const Rows& rows, int64_t row, float* to) const {
    const char* address = row_address(rows, row);
    if (rows.dtype == Dtype::float32) return reinterpret_cast<const float*>(address);
    kernels_.widen(address, rows.dtype, width_, to);
    return to;
  }

  void finish_group() {
    for (int64_t index = 0; index < count_; ++index) {
      Member& member = group_[index];
      member.terms = row_terms(
          member.sums.r1, member.sums.r2, member.sums.r3, member.sums.distance,
          member.weight * pair_.cosine_gain, member.weight * pair_.euclidean_gain,
          problem_.is_squared, width_, problem_.eps);
      totals_.cosine += member.weight * member.terms.cosine;
      totals_.euclidean += member.weight * member.terms.euclidean;
    }
    if (pair_.grad_student.data != nullptr) {
      for (int64_t index = 0; index < count_; ++index) write_grad(group_[index]);
    }
    count_ = 0;
  }

  void write_grad(const Member& member) {
    const Rows& grad = pair_.grad_student;
    const bool is_direct = grad.dtype == Dtype::float32;
    float* out = is_direct ? reinterpret_cast<float*>(row_address(grad, member.row))
                           : memory_ + 2 * GROUP * padded_;
    (is_streamed_ ? kernels_.combine_stream : kernels_.combine)(
        member.student, member.teacher, weights_of(member.terms), width_, out);
    if (!is_direct) write_row(kernels_, out, grad, member.row);
  }

  const RowKernels& kernels_;
  const FeatureProblem& problem_;
  const FeaturePair& pair_;
  Totals& totals_;
  const int64_t width_, padded_;
  float* memory_;
  bool is_streamed_;
  Member group_[GROUP];
  int64_t count_ = 0;
};

}  // namespace fakd
