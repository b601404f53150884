// Schemas and launchers of the CUDA library: torch.ops.fakd_ext, raw and private. Nothing computes
// here. Only LibTorch's stable ABI, so that one binary serves every torch >= 2.10 with CUDA.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "check.h"
#include "feature_alignment.h"

namespace {

using fakd::cuda::check_device;
using fakd::cuda::check_shape;
using fakd::cuda::Dtype;
using fakd::cuda::dtype_of;
using fakd::cuda::FeatureLine;
using fakd::cuda::FeatureParams;
using fakd::cuda::floats_of;
using fakd::cuda::shape_of;
using fakd::cuda::Tensor;
using fakd::cuda::WIDEST;

FeatureLine line_of(const Tensor& student, const Tensor& teacher, const Tensor& first) {
  check_device("student", student, first);
  check_device("teacher", teacher, first);
  STD_TORCH_CHECK(
      student.dim() == 2 && student.size(1) <= WIDEST,
      "student must be a matrix of at most ", WIDEST, " columns: got ",
      shape_of(student), ".");
  check_shape("teacher", teacher, student.size(0), student.size(1));
  STD_TORCH_CHECK(
      student.size(1) <= 1 || (student.stride(1) == 1 && teacher.stride(1) == 1),
      "student and teacher must have a contiguous last axis: got strides ", student.stride(1),
      " and ", teacher.stride(1), ".");
  FeatureLine line{};
  line.student = student.const_data_ptr();
  line.teacher = teacher.const_data_ptr();
  line.student_stride = student.stride(0);
  line.teacher_stride = teacher.stride(0);
  line.rows = student.size(0);
  line.width = int32_t(student.size(1));
  line.student_dtype = dtype_of(student);
  line.teacher_dtype = dtype_of(teacher);
  STD_TORCH_CHECK(
      fakd::cuda::count_blocks(line) <= std::numeric_limits<int32_t>::max(),
      "student has more rows than a launch has blocks: got ", shape_of(student),
      "; pass it in parts.");
  return line;
}

void* grad_of(const Tensor& grad, const FeatureLine& line, const Tensor& first) {
  check_device("grad_student", grad, first);
  check_shape("grad_student", grad, line.rows, line.width);
  const bool is_bfloat16 = line.student_dtype == Dtype::bfloat16;
  STD_TORCH_CHECK(
      grad.is_contiguous() &&
          dtype_of(grad) == (is_bfloat16 ? Dtype::bfloat16 : Dtype::float32),
      "grad_student must be contiguous ", is_bfloat16 ? "bfloat16." : "float32.");
  return grad.mutable_data_ptr();
}

// `row_weights` and `grad_student` hold those of the pairs that have them, in order.
void align_features(
    std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<Tensor> row_weights,
    std::vector<bool> has_row_weights, Tensor coefficients, std::vector<Tensor> grad_student,
    std::vector<bool> wants_grad, Tensor sums, bool is_squared, double eps) {
  const size_t count = student.size();
  STD_TORCH_CHECK(
      count > 0 && teacher.size() == count && has_row_weights.size() == count &&
          wants_grad.size() == count,
      "fakd_ext::align_features was given lists of unequal length.");
  const Tensor& first = student[0];
  std::vector<FeatureLine> lines;
  size_t weights_place = 0, grad_place = 0;
  for (size_t pair = 0; pair < count; ++pair) {
    FeatureLine line = line_of(student[pair], teacher[pair], first);
    if (has_row_weights[pair]) {
      line.row_weights =
          floats_of("row_weights", row_weights.at(weights_place++), line.rows, first);
    }
    if (wants_grad[pair]) line.grad = grad_of(grad_student.at(grad_place++), line, first);
    lines.push_back(line);
  }
  FeatureParams all{};
  all.coefficients = floats_of("coefficients", coefficients, 2 * int64_t(count), first);
  all.sums = floats_of("sums", sums, 2 * int64_t(count), first);
  all.is_squared = is_squared;
  all.eps = float(eps);

  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  // On the current stream as the launches are, so that it may be freed before they have run.
  const Tensor slots = torch::stable::new_empty(sums, {2 * fakd::cuda::count_slots(lines)});
  all.slots = static_cast<float*>(slots.mutable_data_ptr());
  fakd::cuda::align_features(lines, all, fakd::cuda::current_stream(first));
}

bool has_device_code() { return fakd::cuda::has_device_code(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fakd_ext, m) {
  m.def("has_device_code() -> bool");
  m.def(
      "align_features(Tensor[] student, Tensor[] teacher, Tensor[] row_weights, "
      "bool[] has_row_weights, Tensor coefficients, Tensor(a!)[] grad_student, "
      "bool[] wants_grad, Tensor(b!) sums, bool is_squared, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fakd_ext, CompositeExplicitAutograd, m) {
  m.impl("has_device_code", TORCH_BOX(&has_device_code));
}

STABLE_TORCH_LIBRARY_IMPL(fakd_ext, CUDA, m) {
  m.impl("align_features", TORCH_BOX(&align_features));
}
