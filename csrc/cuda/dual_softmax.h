// Rows of scores or logits of both sides on CUDA: what a launch is given, and how lines are laid
// out over its blocks. Plain C++: no framework, no CUDA header.
//
// A row is a warp's up to 1024 elements, a block's beyond. One sweep finds maxima and sums, another
// writes the gradient, which may replace the student's scores; exponentials are computed again. A
// tile of 16 elements of each side in a thread, 512 of a warp and 4096 of a block, stays in its
// registers: a row of one tile is read once. Others are read once more for every further sweep, all
// but the tile that the sweep before ended with: a warp's from L1, a block's from L2, as far as that
// holds all rows in flight. Bytes per element, at least: both sides read once, the gradient written
// once.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "../common/mixture.h"
#include "launch_shape.h"

namespace fakd::cuda {

constexpr int LINES_PER_LAUNCH = 29;  // as many as the 4 KiB of kernel parameters hold

enum class Distance : uint8_t { kl, reverse_kl, jsd, mse };

// One side's rows; strides are in elements, of the batch entry and of the row within it.
struct ScoreRows {
  void* data;  // or nullptr: a gradient that nobody wants
  int64_t batch_stride, row_stride;
};

// All logits of a call, or the maps of one head of a layer pair.
struct ScoreLine {
  ScoreRows student, teacher;
  ScoreRows grad;             // float32 or bfloat16; may be the student itself
  const float* row_weights;   // [rows], or nullptr: 1 each. Rows of weight 0 are never read
  const float* coefficients;  // what the gradient is scaled by: logits [2], maps [1]
  float* values;              // of every row, 0 where its weight is: logits [rows, 2], maps [rows]
  float* sums;                // of weighted values: logits [2], maps [1]
  int64_t rows;               // of all batch entries
  int32_t rows_of_batch;
  int32_t width;
  int32_t keys_behind, keys_ahead;  // of maps: how far from its query a key may be
  int32_t first_block;              // of this line in its launch
  Dtype student_dtype, teacher_dtype, grad_dtype;
};

// Of logits: what is still to be added, and the bend softcap * tanh(logit / softcap) after it.
struct LogitSide {
  const float* bias;  // [width], or nullptr
  float softcap;      // 0: none
};

struct ScoreParams {
  ScoreLine lines[LINES_PER_LAUNCH];
  const int64_t* labels;  // of logits: [rows], or nullptr: no cross-entropy
  LogitSide student, teacher;
  float inverse_temperature;
  Mixture mixture;  // of jsd
  int32_t count;  // of lines
  int32_t blocks;
};
static_assert(sizeof(ScoreParams) <= 4096, "kernel parameters are limited to 4 KiB");

// All on the current device, in the order of the stream, a cudaStream_t. `all` holds what concerns
// the whole call: everything but lines, count and blocks.

// Values of every row of one line, and its gradient. Not mse.
void score_logits(
    const ScoreLine& line, const ScoreParams& all, Distance distance, void* stream);

// Weighted sums of values that are there already: of line.values, with line.row_weights.
void sum_logits(const ScoreLine& line, void* stream);

// Values, their sums and the gradients of all lines, of probabilities or of scores.
void score_maps(
    const std::vector<ScoreLine>& lines, const ScoreParams& all, Distance distance,
    bool are_scores, void* stream);

// One side's maps of a layer pair; strides are in elements.
struct MapRows {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
  Dtype dtype;

  ScoreRows of_head(int64_t head) const {
    const int64_t bytes = head * head_stride * (dtype == Dtype::float32 ? 4 : 2);
    return {data == nullptr ? nullptr : static_cast<char*>(data) + bytes, batch_stride, row_stride};
  }
};

struct MapPair {
  int64_t batch, heads;
  int32_t tokens;
  MapRows student, teacher, grad;  // [batch, heads, tokens, tokens]
  const int64_t* teacher_heads;    // [heads], of the host
  const float* row_weights;        // [batch, tokens]: of queries, and 0 of keys that do not count
  const float* coefficient;        // [1]
  float* values;                   // [heads, batch, tokens]
  float* sums;                     // [heads]
  bool is_causal;
  int64_t window;  // keys nearer to their query than this; -1: all
};

// A line for every head of the student.
inline void append_lines(const MapPair& pair, std::vector<ScoreLine>& lines) {
  ScoreLine line{};
  line.row_weights = pair.row_weights;
  line.coefficients = pair.coefficient;
  line.rows = pair.batch * pair.tokens;
  line.rows_of_batch = line.width = pair.tokens;
  const bool is_near = pair.window >= 0 && pair.window < pair.tokens;
  line.keys_behind = is_near ? int32_t(pair.window - 1) : pair.tokens;
  line.keys_ahead = pair.is_causal ? 0 : line.keys_behind;
  line.student_dtype = pair.student.dtype;
  line.teacher_dtype = pair.teacher.dtype;
  line.grad_dtype = pair.grad.dtype;
  for (int64_t head = 0; head < pair.heads; ++head) {
    line.student = pair.student.of_head(head);
    line.teacher = pair.teacher.of_head(pair.teacher_heads[head]);
    line.grad = pair.grad.of_head(head);
    line.values = pair.values + head * line.rows;
    line.sums = pair.sums + head;
    lines.push_back(line);
  }
}

// One entry per launch.
inline std::vector<ScoreParams> plan(
    const std::vector<ScoreLine>& lines, const ScoreParams& all) {
  std::vector<ScoreParams> launches;
  for (ScoreLine line : lines) {
    const int64_t more = count_blocks(line);
    const bool is_full = launches.empty() || launches.back().count == LINES_PER_LAUNCH ||
                         launches.back().blocks + more > std::numeric_limits<int32_t>::max();
    if (is_full) {
      launches.push_back(all);
      launches.back().count = launches.back().blocks = 0;
    }
    ScoreParams& launch = launches.back();
    line.first_block = launch.blocks;
    launch.lines[launch.count++] = line;
    launch.blocks += int32_t(more);
  }
  return launches;
}

}  // namespace fakd::cuda
