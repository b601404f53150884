// Schemas and registration of torch.ops.fakd_ext: raw, private operators that fill given buffers.
// Nothing computes here. Only LibTorch's stable ABI, so that one binary serves every torch >= 2.10.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "cpu/attention_kl.h"
#include "cpu/feature_alignment.h"
#include "cpu/feature_bfloat16.h"
#include "tensors.h"

namespace {

using fakd::Dtype;
using fakd::dtype_of;
using fakd::pick;
using fakd::Rows;
using fakd::rows_of;
using torch::stable::Tensor;

std::vector<Rows> all(const std::vector<Tensor>& tensors) {
  std::vector<Rows> rows;
  for (const Tensor& tensor : tensors) rows.push_back(rows_of(tensor));
  return rows;
}

// `places` is [L, 7] by rows: the pair's projection, bias, row weights, student gradient, projection
// gradient and bias gradient as places in the lists (-1: absent), and its route.
void feature_alignment(
    std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<Tensor> projections,
    std::vector<Tensor> biases, std::vector<Tensor> row_weights, Tensor coefficients,
    std::vector<int64_t> places, std::vector<Tensor> grad_student,
    std::vector<Tensor> grad_projections, std::vector<Tensor> grad_biases, Tensor sums,
    bool is_squared, bool is_route_forced, double eps) {
  constexpr size_t PLACES = 7;
  STD_TORCH_CHECK(
      teacher.size() == student.size() && places.size() == PLACES * student.size() &&
          coefficients.numel() == int64_t(2 * student.size()) && coefficients.is_contiguous() &&
          sums.numel() == coefficients.numel() && sums.is_contiguous() &&
          dtype_of(coefficients) == Dtype::float32 && dtype_of(sums) == Dtype::float32,
      "fakd_ext::feature_alignment was given lists of unequal length.");
  const float* gains = static_cast<const float*>(coefficients.const_data_ptr());
  fakd::FeatureProblem problem;
  for (size_t index = 0; index < student.size(); ++index) {
    const int64_t* place = places.data() + PLACES * index;
    fakd::FeaturePair pair;
    pair.student = rows_of(student[index]);
    pair.teacher = rows_of(teacher[index]);
    pair.projection = pick(projections, place[0]);
    pair.bias = pick(biases, place[1]);
    pair.row_weights = static_cast<const float*>(pick(row_weights, place[2]).data);
    pair.grad_student = pick(grad_student, place[3]);
    pair.grad_projection = place[4];
    pair.grad_bias = place[5];
    pair.route = static_cast<fakd::Route>(place[6]);
    pair.cosine_gain = gains[2 * index];
    pair.euclidean_gain = gains[2 * index + 1];
    problem.pairs.push_back(pair);
  }
  problem.grad_projections = all(grad_projections);
  problem.grad_biases = all(grad_biases);
  problem.sums = static_cast<float*>(sums.mutable_data_ptr());
  problem.is_squared = is_squared;
  problem.is_route_forced = is_route_forced;
  problem.eps = eps;
  fakd::feature_alignment(problem);
}

fakd::Heads heads_of(const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.dim() == 4 && (tensor.size(3) <= 1 || tensor.stride(3) == 1),
      "fakd_ext takes CPU tensors [B, H, T, K] with a contiguous last axis only.");
  fakd::Heads heads;
  heads.data = const_cast<void*>(tensor.const_data_ptr());
  heads.dtype = dtype_of(tensor);
  heads.batch = tensor.size(0);
  heads.heads = tensor.size(1);
  heads.tokens = tensor.size(2);
  heads.width = tensor.size(3);
  heads.batch_stride = tensor.stride(0);
  heads.head_stride = tensor.stride(1);
  heads.token_stride = tensor.stride(2);
  return heads;
}

fakd::Heads pick_heads(const std::vector<Tensor>& tensors, int64_t index) {
  return index < 0 ? fakd::Heads{} : heads_of(tensors.at(size_t(index)));
}

const float* weights_at(const std::vector<Tensor>& row_weights, int64_t index) {
  if (index < 0) return nullptr;
  const Tensor& weights = row_weights.at(size_t(index));
  STD_TORCH_CHECK(
      weights.is_contiguous() && dtype_of(weights) == Dtype::float32,
      "fakd_ext takes contiguous float32 row weights.");
  return static_cast<const float*>(weights.const_data_ptr());
}

// The teacher heads of the next pair; nullptr where heads are averaged.
const int64_t* heads_at(
    const std::vector<int64_t>& teacher_heads, int64_t& begin, int64_t heads, const Tensor& sums) {
  const bool is_mean = teacher_heads.empty();
  const int64_t first = begin;
  if (!is_mean) begin += heads;
  STD_TORCH_CHECK(
      begin <= int64_t(teacher_heads.size()) && sums.numel() == (is_mean ? 1 : heads),
      "fakd_ext was given too few heads.");
  return is_mean ? nullptr : teacher_heads.data() + first;
}

// `places` is [L, 3] by rows: the pair's row weights, query gradient and key gradient as places in
// the lists (-1: absent); `teacher_heads` holds the teacher head of every student head, pair after
// pair; none where heads are averaged.
void attention_kl(
    std::vector<Tensor> student_q, std::vector<Tensor> student_k, std::vector<Tensor> teacher_q,
    std::vector<Tensor> teacher_k, std::vector<Tensor> row_weights, Tensor coefficients,
    std::vector<int64_t> places, std::vector<int64_t> teacher_heads, std::vector<Tensor> grads,
    std::vector<Tensor> sums, std::vector<double> student_scale, std::vector<double> teacher_scale,
    std::vector<double> student_softcap, std::vector<double> teacher_softcap,
    std::vector<bool> is_causal, std::vector<int64_t> window, double temperature,
    int64_t distance) {
  const size_t count = student_q.size();
  STD_TORCH_CHECK(
      student_k.size() == count && teacher_q.size() == count && teacher_k.size() == count &&
          places.size() == 3 * count && sums.size() == count && student_scale.size() == count &&
          teacher_scale.size() == count && student_softcap.size() == count &&
          teacher_softcap.size() == count && is_causal.size() == count && window.size() == count &&
          coefficients.numel() == int64_t(count) &&
          coefficients.is_contiguous() && dtype_of(coefficients) == Dtype::float32,
      "fakd_ext::attention_kl was given lists of unequal length.");
  const float* gains = static_cast<const float*>(coefficients.const_data_ptr());
  fakd::AttentionProblem problem;
  int64_t begin = 0;
  for (size_t index = 0; index < count; ++index) {
    fakd::AttentionPair pair;
    pair.student_q = heads_of(student_q[index]);
    pair.student_k = heads_of(student_k[index]);
    pair.teacher_q = heads_of(teacher_q[index]);
    pair.teacher_k = heads_of(teacher_k[index]);
    pair.row_weights = weights_at(row_weights, places[3 * index]);
    pair.grad_q = pick_heads(grads, places[3 * index + 1]);
    pair.grad_k = pick_heads(grads, places[3 * index + 2]);
    pair.teacher_heads = heads_at(teacher_heads, begin, pair.student_q.heads, sums[index]);
    const float inverse_temperature = float(1.0 / temperature);
    pair.student = {
        float(student_scale[index]), float(student_softcap[index]), inverse_temperature};
    pair.teacher = {
        float(teacher_scale[index]), float(teacher_softcap[index]), inverse_temperature};
    pair.is_causal = is_causal[index];
    pair.window = window[index];
    pair.coefficient = gains[index];
    pair.sums = static_cast<float*>(sums[index].mutable_data_ptr());
    problem.pairs.push_back(pair);
  }
  problem.distance = static_cast<fakd::ScoreDistance>(distance);
  fakd::attention_kl(problem);
}

// `places` is [L, 2] by rows: the pair's row weights and gradient; the rest as in attention_kl.
void attention_map_kl(
    std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<Tensor> row_weights,
    Tensor coefficients, std::vector<int64_t> places, std::vector<int64_t> teacher_heads,
    std::vector<Tensor> grads, std::vector<Tensor> sums, std::vector<bool> is_causal,
    std::vector<int64_t> window, bool are_scores, double temperature, int64_t distance) {
  const size_t count = student.size();
  STD_TORCH_CHECK(
      teacher.size() == count && places.size() == 2 * count && sums.size() == count &&
          is_causal.size() == count && window.size() == count &&
          coefficients.numel() == int64_t(count) && coefficients.is_contiguous() &&
          dtype_of(coefficients) == Dtype::float32,
      "fakd_ext::attention_map_kl was given lists of unequal length.");
  const float* gains = static_cast<const float*>(coefficients.const_data_ptr());
  fakd::AttentionMapProblem problem;
  int64_t begin = 0;
  for (size_t index = 0; index < count; ++index) {
    fakd::AttentionMapPair pair;
    pair.student = heads_of(student[index]);
    pair.teacher = heads_of(teacher[index]);
    pair.row_weights = weights_at(row_weights, places[2 * index]);
    pair.grad = pick_heads(grads, places[2 * index + 1]);
    pair.teacher_heads = heads_at(teacher_heads, begin, pair.student.heads, sums[index]);
    pair.is_causal = is_causal[index];
    pair.window = window[index];
    pair.coefficient = gains[index];
    pair.sums = static_cast<float*>(sums[index].mutable_data_ptr());
    problem.pairs.push_back(pair);
  }
  problem.are_scores = are_scores;
  problem.inverse_temperature = float(1.0 / temperature);
  problem.distance = static_cast<fakd::ScoreDistance>(distance);
  fakd::attention_map_kl(problem);
}

std::string isa() { return fakd::instruction_set(); }

bool has_bfloat16_products() { return fakd::has_bfloat16_products(); }

}  // namespace

STABLE_TORCH_LIBRARY(fakd_ext, m) {
  m.def("isa() -> str");
  m.def("has_bfloat16_products() -> bool");
  m.def(
      "feature_alignment(Tensor[] student, Tensor[] teacher, Tensor[] projections, "
      "Tensor[] biases, Tensor[] row_weights, Tensor coefficients, int[] places, "
      "Tensor(a!)[] grad_student, Tensor(b!)[] grad_projections, Tensor(c!)[] grad_biases, "
      "Tensor(d!) sums, bool is_squared, bool is_route_forced, float eps) -> ()");
  m.def(
      "attention_kl(Tensor[] student_q, Tensor[] student_k, Tensor[] teacher_q, "
      "Tensor[] teacher_k, Tensor[] row_weights, Tensor coefficients, int[] places, "
      "int[] teacher_heads, Tensor(a!)[] grads, Tensor(b!)[] sums, float[] student_scale, "
      "float[] teacher_scale, float[] student_softcap, float[] teacher_softcap, bool[] is_causal, "
      "int[] window, float temperature, int distance) -> ()");
  m.def(
      "attention_map_kl(Tensor[] student, Tensor[] teacher, Tensor[] row_weights, "
      "Tensor coefficients, int[] places, int[] teacher_heads, Tensor(a!)[] grads, "
      "Tensor(b!)[] sums, bool[] is_causal, int[] window, bool are_scores, float temperature, "
      "int distance) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fakd_ext, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("has_bfloat16_products", TORCH_BOX(&has_bfloat16_products));
}

STABLE_TORCH_LIBRARY_IMPL(fakd_ext, CPU, m) {
  m.impl("feature_alignment", TORCH_BOX(&feature_alignment));
  m.impl("attention_kl", TORCH_BOX(&attention_kl));
  m.impl("attention_map_kl", TORCH_BOX(&attention_map_kl));
}
