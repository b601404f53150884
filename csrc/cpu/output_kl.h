// Output alignment on the CPU: what the launchers resolved, and the calls that fill their results.
#pragma once

#include <cstdint>

#include "rows.h"

namespace fakd {

// What one token's row of logits is compared by; N tokens, V entries of the vocabulary.
struct OutputTerms {
  int64_t tokens = 0, vocabulary = 0;
  const int64_t* labels = nullptr;     // [N], or absent: no cross-entropy
  const float* row_weights = nullptr;  // [N], or absent
  float kl_coefficient = 0, label_coefficient = 0;
  ScoreSide student, teacher;
  ScoreDistance distance = ScoreDistance::kl;
  Mixture mixture = {};
  float* sums = nullptr;       // [2]: of the distance and of the cross-entropy
  float* per_token = nullptr;  // [N, 2]
};

// logits = hidden head^T + bias
struct OutputHead {
  Rows hidden;  // [N, D]
  Rows head;    // [V, D]
  Rows bias;    // [V] as a single row, or absent
};

// Teacher of k stored entries per token instead of a whole row of logits.
struct TopEntries {
  const int64_t* indices = nullptr;    // [N, k], -1: none
  const float* log_probabilities = nullptr;
  int64_t count = 0;
  bool has_ghost = false;  // one more outcome for all other entries
};

struct LinearProblem {
  OutputTerms terms;
  OutputHead student, teacher;  // teacher.hidden absent: `top` holds it
  TopEntries top;
  Rows grad_hidden, grad_head, grad_bias;  // float32 or bfloat16, or absent
  int64_t block_bytes = 0;                 // of the logits of both sides; 0: a default
};

struct LogitProblem {
  OutputTerms terms;
  Rows student, teacher, grad;
};

void linear_kl(const LinearProblem& problem);
void logit_kl(const LogitProblem& problem);

}  // namespace fakd
