// KL of given logits: one sweep for the maxima, one for the powers, one for the gradient, which is
// written where it belongs. Per entry of float32 logits 2 reads and 1 write of memory: while a row is
// computed the next one is asked for.

#include <torch/csrc/stable/ops.h>

#include "memory.h"
#include "output_rows.h"
#include "schedule.h"

namespace fakd {
namespace {

// A row in float32: the caller's memory where it is that already.
const float* widened(const RowKernels& kernels, const Rows& rows, int64_t row, float* room) {
  if (rows.dtype == Dtype::float32) return reinterpret_cast<const float*>(row_address(rows, row));
  kernels.widen(row_address(rows, row), rows.dtype, rows.columns, room);
  return room;
}

}  // namespace

void logit_kl(const LogitProblem& problem) {
  const RowKernels& kernels = row_kernels();
  const OutputRows rows(problem.terms);
  const int64_t count = rows.counted().count(), width = problem.terms.vocabulary;
  const bool wants_grad = problem.grad.data != nullptr;
  if (wants_grad) {
    advise_huge_pages(
        problem.grad.data, problem.grad.rows * width * element_bytes(problem.grad.dtype));
    zero_uncounted(problem.grad, problem.terms.row_weights);
  }
  const bool is_in_place = wants_grad && problem.grad.dtype == Dtype::float32;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    OutputScratch scratch;
    float* student = scratch.student.reserve(width);
    float* teacher = scratch.teacher.reserve(width);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t token = rows.counted()[index];
      ScoreRow row = rows.row(token, scratch);
      row.grad =
          is_in_place ? reinterpret_cast<float*>(row_address(problem.grad, token)) : student;
      row.spare = teacher;
      row.student = widened(kernels, problem.student, token, row.grad);
      row.teacher = widened(kernels, problem.teacher, token, teacher);
      const bool is_float =
          problem.student.dtype == Dtype::float32 && problem.teacher.dtype == Dtype::float32;
      if (index + 1 < end && is_float) {
        const int64_t step = rows.counted()[index + 1] - token;
        row.student_ahead = step * problem.student.stride;
        row.teacher_ahead = step * problem.teacher.stride;
      }
      rows.score(token, row, wants_grad);
      if (wants_grad && !is_in_place) write_row(kernels, row.grad, problem.grad, token);
    }
  });
  rows.finish();
}

}  // namespace fakd
