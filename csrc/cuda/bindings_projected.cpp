// torch.ops.fakd_ext, continued: rows of pairs with a projection. Nothing computes here.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "check.h"
#include "projected_rows.h"

namespace {

using fakd::cuda::check_device;
using fakd::cuda::check_shape;
using fakd::cuda::current_stream;
using fakd::cuda::Dtype;
using fakd::cuda::dtype_of;
using fakd::cuda::floats_of;
using fakd::cuda::ProjectedLine;
using fakd::cuda::ProjectedParams;
using fakd::cuda::shape_of;
using fakd::cuda::Tensor;
using fakd::cuda::ValueLine;
using fakd::cuda::WIDEST;

ProjectedLine line_of(const Tensor& projected, const Tensor& teacher, const Tensor& first) {
  STD_TORCH_CHECK(
      projected.dim() == 2 && projected.size(0) <= std::numeric_limits<int32_t>::max() &&
          projected.size(1) <= WIDEST,
      "projected must be a matrix of less than 2^31 rows and at most ", WIDEST, " columns: got ",
      shape_of(projected), "; pass it in parts.");
  ProjectedLine line{};
  line.projected = floats_of("projected", projected, projected.numel(), first);
  line.rows = int32_t(projected.size(0));
  line.width = int32_t(projected.size(1));
  check_device("teacher", teacher, first);
  check_shape("teacher", teacher, line.rows, line.width);
  STD_TORCH_CHECK(
      line.width <= 1 || teacher.stride(1) == 1,
      "teacher must have a contiguous last axis: got a stride of ", teacher.stride(1), ".");
  line.teacher = teacher.const_data_ptr();
  line.teacher_stride = teacher.stride(0);
  line.teacher_dtype = dtype_of(teacher);
  return line;
}

void set_grad(const Tensor& grad, const Tensor& first, ProjectedLine& line) {
  check_device("grad", grad, first);
  check_shape("grad", grad, line.rows, line.width);
  line.grad = grad.mutable_data_ptr();
  line.grad_dtype = dtype_of(grad);
  const bool is_projected = line.grad == line.projected;
  STD_TORCH_CHECK(
      grad.is_contiguous() &&
          line.grad_dtype == (is_projected ? Dtype::float32 : Dtype::bfloat16),
      "grad must be projected itself, or contiguous bfloat16.");
}

// `row_weights` and `grad` hold those of the entries that have them, in order; `pair` the place of
// each entry's coefficients.
void align_projected(
    std::vector<Tensor> projected, std::vector<Tensor> teacher, std::vector<Tensor> row_weights,
    std::vector<bool> has_row_weights, Tensor coefficients, std::vector<int64_t> pair,
    std::vector<Tensor> grad, std::vector<bool> wants_grad, std::vector<Tensor> values,
    bool is_squared, double eps) {
  const size_t count = projected.size();
  STD_TORCH_CHECK(
      count > 0 && teacher.size() == count && has_row_weights.size() == count &&
          pair.size() == count && wants_grad.size() == count && values.size() == count,
      "fakd_ext::align_projected was given lists of unequal length.");
  const Tensor& first = projected[0];
  STD_TORCH_CHECK(coefficients.dim() == 2, "coefficients must have the shape [pairs, 2].");
  const int64_t pairs = coefficients.size(0);
  std::vector<ProjectedLine> lines;
  size_t weights_place = 0, grad_place = 0;
  for (size_t entry = 0; entry < count; ++entry) {
    ProjectedLine line = line_of(projected[entry], teacher[entry], first);
    if (has_row_weights[entry]) {
      line.row_weights =
          floats_of("row_weights", row_weights.at(weights_place++), line.rows, first);
    }
    if (wants_grad[entry]) set_grad(grad.at(grad_place++), first, line);
    line.values = floats_of("values", values[entry], 2 * int64_t(line.rows), first);
    STD_TORCH_CHECK(
        pair[entry] >= 0 && pair[entry] < pairs, "pair must be from 0 to ", pairs - 1, ": got ",
        pair[entry], ".");
    line.pair = int32_t(pair[entry]);
    lines.push_back(line);
  }
  ProjectedParams all{};
  all.coefficients = floats_of("coefficients", coefficients, 2 * pairs, first);
  all.is_squared = is_squared;
  all.eps = float(eps);
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  fakd::cuda::align_projected(lines, all, current_stream(first));
}

void sum_values(std::vector<Tensor> values, std::vector<Tensor> sums) {
  STD_TORCH_CHECK(
      !values.empty() && values.size() == sums.size(),
      "fakd_ext::sum_values was given lists of unequal length.");
  const Tensor& first = values[0];
  std::vector<ValueLine> lines;
  for (size_t entry = 0; entry < values.size(); ++entry) {
    const int64_t rows = values[entry].size(0);
    lines.push_back(
        {floats_of("values", values[entry], 2 * rows, first),
         floats_of("sums", sums[entry], 2, first), rows});
  }
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  fakd::cuda::sum_values(lines, current_stream(first));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fakd_ext, m) {
  m.def(
      "align_projected(Tensor(a!)[] projected, Tensor[] teacher, Tensor[] row_weights, "
      "bool[] has_row_weights, Tensor coefficients, int[] pair, Tensor(b!)[] grad, "
      "bool[] wants_grad, Tensor(c!)[] values, bool is_squared, float eps) -> ()");
  m.def("sum_values(Tensor[] values, Tensor(a!)[] sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fakd_ext, CUDA, m) {
  m.impl("align_projected", TORCH_BOX(&align_projected));
  m.impl("sum_values", TORCH_BOX(&sum_values));
}
