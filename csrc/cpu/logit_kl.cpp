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

bool is_narrow(const LogitProblem& problem) {
  const OutputTerms& terms = problem.terms;
  return terms.vocabulary <= NARROW && terms.distance == ScoreDistance::kl &&
         !(terms.student.softcap > 0) && !(terms.teacher.softcap > 0);
}

// A few counted rows as narrow_kl_rows takes them: the caller's memory where they lie in a run.
struct NarrowSide {
  float room[WIDEST_VECTOR * NARROW];
  const float* data;
  int64_t stride;

  void fetch(
      const RowKernels& kernels, const Rows& rows, const CountedRows& counted, int64_t first,
      int64_t count) {
    if (rows.dtype == Dtype::float32 && counted.is_run(first, first + count)) {
      data = reinterpret_cast<const float*>(row_address(rows, counted[first]));
      stride = rows.stride;
      return;
    }
    for (int64_t row = 0; row < count; ++row) {
      kernels.widen(
          row_address(rows, counted[first + row]), rows.dtype, rows.columns,
          room + row * rows.columns);
    }
    data = room;
    stride = rows.columns;
  }
};

// Rows [begin, end) of those that count, a few at a time.
void score_narrow(
    const LogitProblem& problem, const OutputRows& rows, int64_t begin, int64_t end) {
  const RowKernels& kernels = row_kernels();
  const CountedRows& counted = rows.counted();
  const OutputTerms& terms = problem.terms;
  NarrowSide student, teacher;
  float gains[WIDEST_VECTOR], label_gains[WIDEST_VECTOR];
  int64_t labels[WIDEST_VECTOR];
  ScoreValues values[WIDEST_VECTOR];
  NarrowRows call{};
  call.n = terms.vocabulary;
  call.inverse_temperature = terms.student.inverse_temperature;
  call.gains = gains;
  call.labels = terms.labels == nullptr ? nullptr : labels;
  call.label_gains = label_gains;
  call.values = values;
  for (int64_t first = begin; first < end; first += kernels.lanes) {
    call.count = std::min(kernels.lanes, end - first);
    student.fetch(kernels, problem.student, counted, first, call.count);
    teacher.fetch(kernels, problem.teacher, counted, first, call.count);
    call.student = student.data;
    call.teacher = teacher.data;
    call.student_stride = student.stride;
    call.teacher_stride = teacher.stride;
    for (int64_t row = 0; row < call.count; ++row) {
      const int64_t token = counted[first + row];
      gains[row] = float(rows.weight(token)) * terms.kl_coefficient;
      label_gains[row] = float(rows.weight(token)) * terms.label_coefficient;
      if (call.labels != nullptr) labels[row] = terms.labels[token];
    }
    const bool is_in_place = problem.grad.data != nullptr &&
                             problem.grad.dtype == Dtype::float32 &&
                             counted.is_run(first, first + call.count);
    if (problem.grad.data != nullptr) {
      call.grad = is_in_place ? reinterpret_cast<float*>(row_address(problem.grad, counted[first]))
                              : student.room;
      call.grad_stride = is_in_place ? problem.grad.stride : call.n;
    }
    kernels.narrow_kl_rows(call);
    for (int64_t row = 0; row < call.count; ++row) {
      const int64_t token = counted[first + row];
      rows.record(token, values[row]);
      if (call.grad != nullptr && !is_in_place) {
        write_row(kernels, student.room + row * call.n, problem.grad, token);
      }
    }
  }
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
  if (is_narrow(problem)) {
    torch::stable::parallel_for(0, count, 1024, [&](int64_t begin, int64_t end) {
      score_narrow(problem, rows, begin, end);
    });
    rows.finish();
    return;
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
