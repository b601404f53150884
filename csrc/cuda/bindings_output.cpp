// torch.ops.fakd_ext, continued: rows of logits, and attention maps. Nothing computes here.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "check.h"
#include "dual_softmax.h"

namespace {

using fakd::cuda::check_device;
using fakd::cuda::check_shape;
using fakd::cuda::current_stream;
using fakd::cuda::Distance;
using fakd::cuda::dtype_of;
using fakd::cuda::Dtype;
using fakd::cuda::floats_of;
using fakd::cuda::MapPair;
using fakd::cuda::MapRows;
using fakd::cuda::ScoreLine;
using fakd::cuda::ScoreParams;
using fakd::cuda::ScoreRows;
using fakd::cuda::shape_of;
using fakd::cuda::Tensor;
using fakd::cuda::WIDEST;

Distance distance_of(int64_t distance) {
  STD_TORCH_CHECK(
      distance >= 0 && distance < 4, "distance must be from 0 to 3, see enum class Distance: got ",
      distance, ".");
  return Distance(distance);
}

float* optional_floats(
    const char* name, const std::optional<Tensor>& tensor, int64_t count, const Tensor& first) {
  return tensor.has_value() ? floats_of(name, *tensor, count, first) : nullptr;
}

// A matrix with a contiguous last axis.
ScoreRows rows_of(const char* name, const Tensor& tensor, const Tensor& first) {
  check_device(name, tensor, first);
  check_shape(name, tensor, first.size(0), first.size(1));
  STD_TORCH_CHECK(
      tensor.size(1) <= 1 || tensor.stride(1) == 1, name,
      " must have a contiguous last axis: got a stride of ", tensor.stride(1), ".");
  return {const_cast<void*>(tensor.const_data_ptr()), 0, tensor.stride(0)};
}

void check_grad(const char* name, const Tensor& grad) {
  STD_TORCH_CHECK(
      dtype_of(grad) != Dtype::float16, name, " must be float32 or bfloat16: float16 underflows.");
}

void score_logits(
    Tensor student, Tensor teacher, std::optional<Tensor> student_bias,
    std::optional<Tensor> teacher_bias, std::optional<Tensor> labels,
    std::optional<Tensor> row_weights, Tensor coefficients, std::optional<Tensor> grad,
    Tensor per_token, double student_softcap, double teacher_softcap, double temperature,
    double jsd_beta, int64_t distance) {
  STD_TORCH_CHECK(
      student.dim() == 2 && student.size(0) <= std::numeric_limits<int32_t>::max() &&
          student.size(1) <= WIDEST,
      "student must be a matrix of less than 2^31 rows and at most ", WIDEST, " columns: got ",
      shape_of(student), "; pass it in parts.");
  const int64_t tokens = student.size(0), vocab = student.size(1);
  ScoreLine line{};
  line.student = rows_of("student", student, student);
  line.teacher = rows_of("teacher", teacher, student);
  line.student_dtype = dtype_of(student);
  line.teacher_dtype = dtype_of(teacher);
  if (grad.has_value()) {
    check_grad("grad", *grad);
    line.grad = rows_of("grad", *grad, student);
    line.grad_dtype = dtype_of(*grad);
  }
  line.rows = tokens;
  line.rows_of_batch = int32_t(tokens);
  line.width = int32_t(vocab);
  line.row_weights = optional_floats("row_weights", row_weights, tokens, student);
  line.coefficients = floats_of("coefficients", coefficients, 2, student);
  line.values = floats_of("per_token", per_token, 2 * tokens, student);
  ScoreParams all{};
  if (labels.has_value()) {
    check_device("labels", *labels, student);
    STD_TORCH_CHECK(
        labels->numel() == tokens && labels->is_contiguous() &&
            labels->scalar_type() == torch::headeronly::ScalarType::Long,
        "labels must be contiguous int64 with ", tokens, " elements: got ", shape_of(*labels), ".");
    all.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  }
  all.student.bias = optional_floats("student_bias", student_bias, vocab, student);
  all.teacher.bias = optional_floats("teacher_bias", teacher_bias, vocab, student);
  all.student.softcap = float(student_softcap);
  all.teacher.softcap = float(teacher_softcap);
  all.inverse_temperature = float(1.0 / temperature);
  all.mixture = fakd::mixture_of(jsd_beta);
  STD_TORCH_CHECK(distance_of(distance) != Distance::mse, "mse is a distance of maps only.");

  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  fakd::cuda::score_logits(line, all, distance_of(distance), current_stream(student));
}

void sum_logits(Tensor per_token, std::optional<Tensor> row_weights, Tensor sums) {
  check_device("per_token", per_token, per_token);
  ScoreLine line{};
  line.rows = per_token.size(0);
  line.width = 1;
  line.values = floats_of("per_token", per_token, 2 * line.rows, per_token);
  line.row_weights = optional_floats("row_weights", row_weights, line.rows, per_token);
  line.sums = floats_of("sums", sums, 2, per_token);
  const torch::stable::accelerator::DeviceGuard guard(per_token.get_device_index());
  fakd::cuda::sum_logits(line, current_stream(per_token));
}

MapRows maps_of(
    const char* name, const Tensor& maps, int64_t batch, int64_t tokens, const Tensor& first) {
  check_device(name, maps, first);
  STD_TORCH_CHECK(
      maps.dim() == 4 && maps.size(0) == batch && maps.size(2) == tokens &&
          maps.size(3) == tokens && (tokens <= 1 || maps.stride(3) == 1),
      name, " must have the shape [", batch, ", H, ", tokens, ", ", tokens,
      "] and a contiguous last axis: got ", shape_of(maps), ".");
  return {const_cast<void*>(maps.const_data_ptr()), maps.stride(0), maps.stride(1), maps.stride(2),
          dtype_of(maps)};
}

// `row_weights` and `grads` hold those of the pairs that have them, in order; `teacher_heads` the
// teacher's head of every head of the student, pair after pair.
void score_maps(
    std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<Tensor> row_weights,
    std::vector<bool> has_row_weights, Tensor coefficients, std::vector<Tensor> grads,
    std::vector<bool> wants_grad, std::vector<Tensor> sums, std::vector<int64_t> teacher_heads,
    std::vector<bool> is_causal, std::vector<int64_t> window, bool are_scores, double temperature,
    int64_t distance) {
  const size_t count = student.size();
  STD_TORCH_CHECK(
      count > 0 && teacher.size() == count && has_row_weights.size() == count &&
          wants_grad.size() == count && sums.size() == count && is_causal.size() == count &&
          window.size() == count,
      "fakd_ext::score_maps was given lists of unequal length.");
  const Tensor& first = student[0];
  const float* coefficient = floats_of("coefficients", coefficients, int64_t(count), first);
  std::vector<MapPair> pairs;
  size_t weights_place = 0, grad_place = 0, heads_place = 0;
  int64_t rows = 0;
  for (size_t index = 0; index < count; ++index) {
    const Tensor& maps = student[index];
    STD_TORCH_CHECK(
        maps.dim() == 4 && maps.size(2) <= WIDEST,
        "student must have the shape [B, H, T, T]: got ", shape_of(maps), ".");
    MapPair pair{};
    pair.batch = maps.size(0);
    pair.heads = maps.size(1);
    pair.tokens = int32_t(maps.size(2));
    pair.student = maps_of("student", maps, pair.batch, pair.tokens, first);
    pair.teacher = maps_of("teacher", teacher[index], pair.batch, pair.tokens, first);
    if (wants_grad[index]) {
      const Tensor& grad = grads.at(grad_place++);
      check_grad("grad", grad);
      STD_TORCH_CHECK(grad.dim() == 4 && grad.size(1) == pair.heads, "grad must have all heads.");
      pair.grad = maps_of("grad", grad, pair.batch, pair.tokens, first);
    }
    if (has_row_weights[index]) {
      pair.row_weights = floats_of(
          "row_weights", row_weights.at(weights_place++), pair.batch * pair.tokens, first);
    }
    STD_TORCH_CHECK(
        heads_place + size_t(pair.heads) <= teacher_heads.size(),
        "teacher_heads must name a head for each of the student's.");
    pair.teacher_heads = teacher_heads.data() + heads_place;
    for (int64_t head = 0; head < pair.heads; ++head) {
      const int64_t chosen = teacher_heads[heads_place++];
      STD_TORCH_CHECK(
          chosen >= 0 && chosen < teacher[index].size(1),
          "teacher_heads must be from 0 to ", teacher[index].size(1) - 1, ": got ", chosen, ".");
    }
    pair.coefficient = coefficient + index;
    STD_TORCH_CHECK(
        pair.batch * pair.tokens <= std::numeric_limits<int32_t>::max(),
        "a head must have less than 2^31 rows: got ", shape_of(maps), "; pass it in parts.");
    pair.sums = floats_of("sums", sums[index], pair.heads, first);
    pair.is_causal = is_causal[index];
    pair.window = window[index];
    rows += pair.heads * pair.batch * pair.tokens;
    pairs.push_back(pair);
  }
  ScoreParams all{};
  all.inverse_temperature = float(1.0 / temperature);

  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  // On the current stream as the launches are, so that they may be freed before they have run.
  const Tensor values = torch::stable::new_empty(coefficients, {rows});
  float* free = static_cast<float*>(values.mutable_data_ptr());
  std::vector<ScoreLine> lines;
  for (MapPair& pair : pairs) {
    pair.values = free;
    free += pair.heads * pair.batch * pair.tokens;
    fakd::cuda::append_lines(pair, lines);
  }
  fakd::cuda::score_maps(lines, all, distance_of(distance), are_scores, current_stream(first));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fakd_ext, m) {
  m.def(
      "score_logits(Tensor student, Tensor teacher, Tensor? student_bias, Tensor? teacher_bias, "
      "Tensor? labels, Tensor? row_weights, Tensor coefficients, Tensor(a!)? grad, "
      "Tensor(b!) per_token, float student_softcap, float teacher_softcap, float temperature, "
      "float jsd_beta, int distance) -> ()");
  m.def("sum_logits(Tensor per_token, Tensor? row_weights, Tensor(a!) sums) -> ()");
  m.def(
      "score_maps(Tensor[] student, Tensor[] teacher, Tensor[] row_weights, "
      "bool[] has_row_weights, Tensor coefficients, Tensor(a!)[] grads, bool[] wants_grad, "
      "Tensor(b!)[] sums, int[] teacher_heads, bool[] is_causal, int[] window, bool are_scores, "
      "float temperature, int distance) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fakd_ext, CUDA, m) {
  m.impl("score_logits", TORCH_BOX(&score_logits));
  m.impl("sum_logits", TORCH_BOX(&sum_logits));
  m.impl("score_maps", TORCH_BOX(&score_maps));
}
