// torch.ops.fakd_ext, continued: ops on outputs. Nothing computes here.

#include <torch/csrc/stable/library.h>

#include "cpu/output_kl.h"
#include "tensors.h"

namespace {

using fakd::Dtype;
using fakd::dtype_of;
using fakd::pick;
using fakd::rows_of;
using torch::stable::Tensor;

fakd::OutputTerms terms_of(
    int64_t tokens, int64_t vocabulary, const std::vector<Tensor>& labels,
    const std::vector<Tensor>& row_weights, const Tensor& coefficients, Tensor& sums,
    Tensor& per_token, bool wants_ce) {
  STD_TORCH_CHECK(
      coefficients.numel() == 2 && coefficients.is_contiguous() && sums.numel() == 2 &&
          per_token.numel() == 2 * tokens && per_token.is_contiguous() &&
          dtype_of(coefficients) == Dtype::float32 && dtype_of(sums) == Dtype::float32 &&
          dtype_of(per_token) == Dtype::float32,
      "fakd_ext takes contiguous float32 coefficients [2], sums [2] and per-token values [N, 2].");
  fakd::OutputTerms terms;
  terms.tokens = tokens;
  terms.vocabulary = vocabulary;
  if (wants_ce) {
    STD_TORCH_CHECK(
        labels.size() == 1 && labels[0].numel() == tokens && labels[0].is_contiguous(),
        "fakd_ext takes contiguous int64 labels [N] for cross-entropy.");
    terms.labels = static_cast<const int64_t*>(labels[0].const_data_ptr());
  }
  if (!row_weights.empty()) {
    STD_TORCH_CHECK(
        row_weights[0].numel() == tokens && row_weights[0].is_contiguous() &&
            dtype_of(row_weights[0]) == Dtype::float32,
        "fakd_ext takes contiguous float32 row weights [N].");
    terms.row_weights = static_cast<const float*>(row_weights[0].const_data_ptr());
  }
  const float* gains = static_cast<const float*>(coefficients.const_data_ptr());
  terms.kl_coefficient = gains[0];
  terms.label_coefficient = gains[1];
  terms.sums = static_cast<float*>(sums.mutable_data_ptr());
  terms.per_token = static_cast<float*>(per_token.mutable_data_ptr());
  return terms;
}

fakd::ScoreDistance output_distance(int64_t distance) {
  STD_TORCH_CHECK(distance >= 0 && distance < 3, "fakd_ext takes kl, reverse_kl or jsd of outputs.");
  constexpr fakd::ScoreDistance known[] = {
      fakd::ScoreDistance::kl, fakd::ScoreDistance::reverse_kl, fakd::ScoreDistance::jsd};
  return known[distance];
}

// `places`: student bias and teacher bias in `biases`, gradients of hidden states, head and bias in
// `grads`; -1 for absent ones. Rows of weight 0 need no label.
void linear_kl(
    Tensor student_hidden, Tensor student_head, Tensor teacher_hidden, Tensor teacher_head,
    std::vector<Tensor> biases, std::vector<Tensor> labels, std::vector<Tensor> row_weights,
    Tensor coefficients, std::vector<int64_t> places, std::vector<Tensor> grads, Tensor sums,
    Tensor per_token, double student_softcap, double teacher_softcap, double temperature,
    double jsd_beta, int64_t distance, bool wants_ce, int64_t block_bytes) {
  STD_TORCH_CHECK(places.size() == 5, "fakd_ext::linear_kl takes five places.");
  fakd::LinearProblem problem;
  problem.terms = terms_of(
      student_hidden.size(0), student_head.size(0), labels, row_weights, coefficients, sums,
      per_token, wants_ce);
  const float inverse_temperature = float(1.0 / temperature);
  problem.terms.student = {1.0f, float(student_softcap), inverse_temperature};
  problem.terms.teacher = {1.0f, float(teacher_softcap), inverse_temperature};
  problem.terms.distance = output_distance(distance);
  problem.terms.mixture = fakd::mixture_of(jsd_beta);
  problem.student = {rows_of(student_hidden), rows_of(student_head), pick(biases, places[0])};
  problem.teacher = {rows_of(teacher_hidden), rows_of(teacher_head), pick(biases, places[1])};
  problem.grad_hidden = pick(grads, places[2]);
  problem.grad_head = pick(grads, places[3]);
  problem.grad_bias = pick(grads, places[4]);
  problem.block_bytes = block_bytes;
  fakd::linear_kl(problem);
}

void logit_kl(
    Tensor student_logits, Tensor teacher_logits, std::vector<Tensor> labels,
    std::vector<Tensor> row_weights, Tensor coefficients, std::vector<Tensor> grads, Tensor sums,
    Tensor per_token, double student_softcap, double teacher_softcap, double temperature,
    double jsd_beta, int64_t distance, bool wants_ce) {
  fakd::LogitProblem problem;
  problem.terms = terms_of(
      student_logits.size(0), student_logits.size(1), labels, row_weights, coefficients, sums,
      per_token, wants_ce);
  const float inverse_temperature = float(1.0 / temperature);
  problem.terms.student = {1.0f, float(student_softcap), inverse_temperature};
  problem.terms.teacher = {1.0f, float(teacher_softcap), inverse_temperature};
  problem.terms.distance = output_distance(distance);
  problem.terms.mixture = fakd::mixture_of(jsd_beta);
  problem.student = rows_of(student_logits);
  problem.teacher = rows_of(teacher_logits);
  problem.grad = pick(grads, grads.empty() ? -1 : 0);
  fakd::logit_kl(problem);
}

// `places`: student bias in `biases`, gradients of hidden states, head and bias in `grads`.
void topk_kl(
    Tensor student_hidden, Tensor student_head, std::vector<Tensor> biases, Tensor teacher_indices,
    Tensor teacher_logprobs, std::vector<Tensor> labels, std::vector<Tensor> row_weights,
    Tensor coefficients, std::vector<int64_t> places, std::vector<Tensor> grads, Tensor sums,
    Tensor per_token, double student_softcap, double temperature, bool wants_ce, bool ghost,
    int64_t block_bytes) {
  STD_TORCH_CHECK(
      places.size() == 4 && teacher_indices.is_contiguous() && teacher_logprobs.is_contiguous() &&
          teacher_indices.numel() == teacher_logprobs.numel() &&
          dtype_of(teacher_logprobs) == Dtype::float32,
      "fakd_ext::topk_kl takes four places, and contiguous int64 indices and float32 "
      "log-probabilities of one shape.");
  fakd::LinearProblem problem;
  problem.terms = terms_of(
      student_hidden.size(0), student_head.size(0), labels, row_weights, coefficients, sums,
      per_token, wants_ce);
  problem.terms.student = {1.0f, float(student_softcap), float(1.0 / temperature)};
  problem.student = {rows_of(student_hidden), rows_of(student_head), pick(biases, places[0])};
  problem.top.indices = static_cast<const int64_t*>(teacher_indices.const_data_ptr());
  problem.top.log_probabilities = static_cast<const float*>(teacher_logprobs.const_data_ptr());
  problem.top.count = teacher_indices.size(1);
  problem.top.has_ghost = ghost;
  problem.grad_hidden = pick(grads, places[1]);
  problem.grad_head = pick(grads, places[2]);
  problem.grad_bias = pick(grads, places[3]);
  problem.block_bytes = block_bytes;
  fakd::linear_kl(problem);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fakd_ext, m) {
  m.def(
      "linear_kl(Tensor student_hidden, Tensor student_head, Tensor teacher_hidden, "
      "Tensor teacher_head, Tensor[] biases, Tensor[] labels, Tensor[] row_weights, "
      "Tensor coefficients, int[] places, Tensor(a!)[] grads, Tensor(b!) sums, "
      "Tensor(c!) per_token, float student_softcap, float teacher_softcap, float temperature, "
      "float jsd_beta, int distance, bool wants_ce, int block_bytes) -> ()");
  m.def(
      "logit_kl(Tensor student_logits, Tensor teacher_logits, Tensor[] labels, "
      "Tensor[] row_weights, Tensor coefficients, Tensor(a!)[] grads, Tensor(b!) sums, "
      "Tensor(c!) per_token, float student_softcap, float teacher_softcap, float temperature, "
      "float jsd_beta, int distance, bool wants_ce) -> ()");
  m.def(
      "topk_kl(Tensor student_hidden, Tensor student_head, Tensor[] biases, "
      "Tensor teacher_indices, Tensor teacher_logprobs, Tensor[] labels, Tensor[] row_weights, "
      "Tensor coefficients, int[] places, Tensor(a!)[] grads, Tensor(b!) sums, "
      "Tensor(c!) per_token, float student_softcap, float temperature, bool wants_ce, bool ghost, "
      "int block_bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fakd_ext, CPU, m) {
  m.impl("linear_kl", TORCH_BOX(&linear_kl));
  m.impl("logit_kl", TORCH_BOX(&logit_kl));
  m.impl("topk_kl", TORCH_BOX(&topk_kl));
}
