// Attention alignment on the CPU: what the launcher resolved, and the call that fills its results.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace fakd {

// [B, H, T, K] of any strides with a contiguous last axis; strides in elements.
struct Heads {
  void* data = nullptr;  // nullptr: absent
  Dtype dtype = Dtype::float32;
  int64_t batch = 0, heads = 0, tokens = 0, width = 0;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;

  Rows at(int64_t b, int64_t h) const {
    const int64_t bytes = int64_t(element_bytes(dtype));
    char* address = static_cast<char*>(data) + (b * batch_stride + h * head_stride) * bytes;
    return {address, dtype, tokens, width, token_stride};
  }
};

struct AttentionPair {
  Heads student_q, student_k, teacher_q, teacher_k;
  Heads grad_q, grad_k;                // float32 or bfloat16, or absent
  const float* row_weights = nullptr;  // [B, T], or absent
  const int64_t* teacher_heads = nullptr;  // of every student head; absent: heads averaged
  ScoreSide student, teacher;
  bool is_causal = false;
  int64_t window = -1;  // -1: none
  double coefficient = 0;
  float* sums = nullptr;  // [H], or [1] where heads are averaged

  int64_t group() const { return student_q.heads / student_k.heads; }  // query heads of a key head
};

struct AttentionProblem {
  std::vector<AttentionPair> pairs;
  ScoreDistance distance = ScoreDistance::kl;
};

// Maps that exist: [B, H, T, T].
struct AttentionMapPair {
  Heads student, teacher;
  Heads grad;                          // float32 or bfloat16, or absent
  const float* row_weights = nullptr;  // [B, T], or absent
  const int64_t* teacher_heads = nullptr;  // of every student head; absent: heads averaged
  bool is_causal = false;
  int64_t window = -1;  // -1: none
  double coefficient = 0;
  float* sums = nullptr;  // [H], or [1] where heads are averaged
};

struct AttentionMapProblem {
  std::vector<AttentionMapPair> pairs;
  bool are_scores = false;
  float inverse_temperature = 1;  // of scores
  ScoreDistance distance = ScoreDistance::kl;
};

void attention_kl(const AttentionProblem& problem);
void attention_map_kl(const AttentionMapProblem& problem);

}  // namespace fakd
