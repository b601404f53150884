// The kernels of dual_softmax.h. Compiled by nvcc, and by the tests for a CPU.
#pragma once

#include "score_terms.h"

namespace fakd::cuda {

constexpr float LEAST_PROBABILITY = 1.17549435e-38f;  // 2^-126: smaller ones count as this one
constexpr int ROOM = WARPS * (3 + 5 + 2);             // for the reductions of a row

struct RowValues {
  float distance = 0, cross_entropy = 0;
};

// Of logits: the label, -1 outside the vocabulary, since nothing can be raised here.
__device__ __forceinline__ int label_of(const ScoreParams& params, int width, int64_t row) {
  if (params.labels == nullptr) return -1;
  const int64_t label = params.labels[row];
  return label >= 0 && label < width ? int(label) : -1;
}

// One row of scores or of logits. Gains are those of its distance and of its cross-entropy.
template <Distance DISTANCE, class Row, class Team>
__device__ __forceinline__ RowValues compare_scores(
    Row& scores, Team& team, const ScoreParams& params, int label, float gain, float label_gain) {
  const Settings by(params);
  RowStats<DISTANCE> stats;
  scores.sweep([&](int column, const float (&s)[OCTET], const float (&t)[OCTET]) {
    stats.add(column, s, t, label, by);
  });
  stats.meet(team, by);
  RowDistance<DISTANCE> distance(stats, by);
  if constexpr (RowDistance<DISTANCE>::NEEDS_SWEEP) {
    float sums[2] = {};
    scores.sweep([&](int, const float (&s)[OCTET], const float (&t)[OCTET]) {
#pragma unroll
      for (int j = 0; j < OCTET; ++j) distance.add(s[j], t[j], sums);
    });
    team.add_up(sums);
    distance.finish(sums);
  }
  RowValues values;
  values.distance = distance.value;
  if (by.has_labels) {
    const float below = stats.label_score - stats.top_s;
    values.cross_entropy = label < 0 ? NAN : log2f(stats.sum_ce) * LN_2 - below;
  }
  if (!scores.wants_grad()) return values;
  gain *= distance.factor();
  const float cap = params.student.softcap, by_share = label_gain / stats.sum_ce;
  scores.write([&](int column, float (&s)[OCTET], const float (&t)[OCTET]) {
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
      float grad = distance.gradient(s[j], t[j]) * gain;
      if (by.has_labels) {
        grad += exp2f((s[j] - stats.top_s) * LOG2_E) * by_share;
        if (column + j == label) grad -= label_gain;
      }
      if (cap > 0) grad *= (1 - s[j] / cap) * (1 + s[j] / cap);
      s[j] = grad;
    }
  });
  return values;
}

// An element of two maps of probabilities: its part of the distance, and the gradient in place of
// the student's.
template <Distance DISTANCE>
__device__ __forceinline__ float compare_element(float& student, float teacher) {
  const bool is_moved = !(student < LEAST_PROBABILITY);
  const float s = is_moved ? student : LEAST_PROBABILITY;
  const float t = teacher < LEAST_PROBABILITY ? LEAST_PROBABILITY : teacher;
  float value, grad;
  if constexpr (DISTANCE == Distance::kl) {
    value = t * (logf(t) - logf(s));
    grad = -t / s;
  } else if constexpr (DISTANCE == Distance::reverse_kl) {
    const float above = logf(s) - logf(t);
    value = s * above;
    grad = above + 1;
  } else if constexpr (DISTANCE == Distance::mse) {
    value = (s - t) * (s - t);
    grad = 2 * (s - t);
  } else {
    const float middle = logf(0.5f * s + 0.5f * t), above = logf(s) - middle;
    value = 0.5f * (s * above + t * (logf(t) - middle));
    grad = 0.5f * above;
  }
  student = is_moved ? grad : 0.0f;
  return value;
}

// Masked elements are -inf here, and others are not.
template <Distance DISTANCE, class Row, class Team>
__device__ __forceinline__ RowValues compare_probabilities(Row& maps, Team& team, float gain) {
  float sums[1] = {};
  const auto step = [&](int, float (&s)[OCTET], const float (&t)[OCTET]) {
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
      const bool is_away = s[j] == -INFINITY;
      const float value = compare_element<DISTANCE>(s[j], t[j]);
      sums[0] += is_away ? 0.0f : value;
      s[j] = is_away ? 0.0f : gain * s[j];
    }
  };
  if (maps.wants_grad()) maps.write(step);
  else maps.sweep(step);
  team.add_up(sums);
  RowValues values;
  values.distance = sums[0];
  return values;
}

enum class Kind { logits, scores, probabilities };

// A block takes one wide row, or as many rows as it has warps.
template <Distance DISTANCE, Kind KIND>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
    score_rows(const __grid_constant__ ScoreParams params) {
  __shared__ SharedArray<float, ROOM> shared;
  using Team = RowTeam<ROOM>;
  const int thread = int(threadIdx.x);
  const ScoreLine& line = params.lines[find_line(params, int(blockIdx.x))];
  const int64_t block = int(blockIdx.x) - line.first_block;
  const bool is_wide = line.width > WIDEST_OF_WARP;
  Team team{is_wide ? THREADS : WARP_SIZE, is_wide ? thread : thread % WARP_SIZE, shared};
  const int64_t row = is_wide ? block : block * WARPS + thread / WARP_SIZE;
  if (row >= line.rows) return;

  ScoreRow<KIND != Kind::logits, Team> scores(params, line, row, team);
  const float weight = line.row_weights == nullptr ? 1.0f : line.row_weights[row];
  const float gain = weight * line.coefficients[0];
  RowValues values;
  if (weight == 0) {
    if (scores.wants_grad()) scores.clear();
  } else if constexpr (KIND == Kind::probabilities) {
    values = compare_probabilities<DISTANCE>(scores, team, gain);
  } else if constexpr (KIND == Kind::scores) {
    values = compare_scores<DISTANCE>(scores, team, params, -1, gain, 0.0f);
  } else {
    const int label = label_of(params, line.width, row);
    const float label_gain = weight * line.coefficients[1];
    values = compare_scores<DISTANCE>(scores, team, params, label, gain, label_gain);
  }
  if (team.member != 0) return;
  if constexpr (KIND == Kind::logits) {
    line.values[2 * row] = values.distance;
    line.values[2 * row + 1] = values.cross_entropy;
  } else {
    line.values[row] = values.distance;
  }
}

// A block adds up one line, in an order that depends on its number of rows alone. Values are 0
// where weights are.
template <int TERMS>
__global__ void __launch_bounds__(THREADS) sum_rows(const __grid_constant__ ScoreParams params) {
  __shared__ SharedArray<double, WARPS * TERMS> shared;
  const ScoreLine& line = params.lines[blockIdx.x];
  const int thread = int(threadIdx.x);
  double sums[TERMS] = {};
#pragma unroll 4
  for (int64_t row = thread; row < line.rows; row += THREADS) {
    const double weight = line.row_weights == nullptr ? 1.0 : double(line.row_weights[row]);
    for (int k = 0; k < TERMS; ++k) sums[k] += weight * double(line.values[TERMS * row + k]);
  }
  for (int k = 0; k < TERMS; ++k) {
    sums[k] = sum_of_warp(sums[k]);
    if (thread % WARP_SIZE == 0) shared[thread / WARP_SIZE * TERMS + k] = sums[k];
  }
  __syncthreads();
  if (thread < TERMS) {
    double total = 0;
    for (int warp = 0; warp < WARPS; ++warp) total += shared[warp * TERMS + thread];
    line.sums[thread] = float(total);
  }
}

}  // namespace fakd::cuda
