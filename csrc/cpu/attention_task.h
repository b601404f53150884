// One task of attention alignment: blocks of query rows of some heads, from scores to gradients.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "attention_blocks.h"
#include "attention_heads.h"
#include "attention_kl.h"
#include "row_kernels.h"

namespace fakd {

struct TaskScratch {
  HeadsScratch student, teacher;
  Scratch slope, student_map, teacher_map, grad_k;
};

class TaskRun {
 public:
  TaskRun(const AttentionProblem& problem, const HeadsTask& task, TaskScratch& scratch)
      : kernels_(row_kernels()), problem_(problem), pair_(problem.pairs[task.pair]), task_(task),
        is_mean_(pair_.teacher_heads == nullptr), scratch_(scratch), attended_(
            pair_.student_q.tokens, pair_.row_weights, pair_.is_causal, pair_.window, task.batch),
        blocks_(pair_, is_mean_, attended_.count()) {}

  void run() {
    const std::vector<KeyUnit> units = student_units(pair_, task_);
    if (task_.split == 0) clear_uncounted(units);
    const int64_t block_count = (attended_.count() + blocks_.rows - 1) / blocks_.rows;
    const int64_t first_block = block_count * task_.split / task_.splits;
    const int64_t last_block = block_count * (task_.split + 1) / task_.splits;
    if (first_block == last_block) return;
    const bool wants_key = pair_.grad_k.data != nullptr, wants_query = pair_.grad_q.data != nullptr;
    const int64_t key_step = std::lcm(
        AttentionHeads::key_step(kernels_, pair_.student_q, pair_.student_k),
        AttentionHeads::key_step(kernels_, pair_.teacher_q, pair_.teacher_k));
    const int64_t last_row = std::min(attended_.count(), last_block * blocks_.rows) - 1;
    const KeyRange keys = {
        attended_.first_key(first_block * blocks_.rows) / key_step * key_step,
        attended_.last_key(last_row)};
    AttentionHeads student(
        kernels_, pair_.student_q, pair_.student_k, task_.batch, attended_, keys, units,
        blocks_.rows, blocks_.stride, wants_query, scratch_.student);
    AttentionHeads teacher(
        kernels_, pair_.teacher_q, pair_.teacher_k, task_.batch, attended_, keys,
        teacher_units(pair_, units), blocks_.rows, blocks_.stride, false, scratch_.teacher);
    const int64_t size = keys.count() * student.width();
    float* grad_k = nullptr;
    bool is_in_place = false;  // the gradient of the keys is added up where it belongs
    if (task_.partial != nullptr) {
      task_.partial->keys = keys;
      grad_k = task_.partial->grad.reserve(student.units() * size);
    } else if (wants_key) {
      grad_k = student.dense_rows(
          pair_.grad_k, task_.first_unit, student.units(), 0, attended_.count());
      is_in_place = grad_k != nullptr;
      if (!is_in_place) grad_k = scratch_.grad_k.reserve(student.units() * size);
    }
    // The first block writes all of the keys' gradient if it meets all keys; else it adds to zeros.
    bool is_begun = pair_.is_causal || pair_.window >= 0;
    if (wants_key && is_begun) std::memset(grad_k, 0, student.units() * size * sizeof(float));
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t begin = block * blocks_.rows;
      const int64_t end = std::min(attended_.count(), begin + blocks_.rows);
      // From where packed keys begin; what lies before a row's own keys is cleared like the rest.
      const int64_t first = attended_.first_key(begin) / key_step * key_step;
      const int64_t last = attended_.last_key(end - 1);
      student.compute_scores(begin, end, first, last);
      teacher.compute_scores(begin, end, first, last);
      const Block rows = {begin, end, first, last};
      if (!is_mean_) {
        match_block(student, teacher, rows);
      } else if (!mean_block(student, teacher, rows)) {
        student.compute_scores(begin, end, first, last);
        teacher.compute_scores(begin, end, first, last);
        log_mean_block(student, teacher, rows);
      }
      if (wants_grad()) {
        clear_masked(student, rows);
        student.write_grads(pair_.grad_q, grad_k, is_begun);
      }
      is_begun = true;
    }
    if (wants_key && task_.partial == nullptr && !is_in_place) {
      for (const KeyUnit& unit : units) write_key_grad(unit, keys, grad_k), grad_k += size;
    }
  }

  // Where query rows are split: what all tasks of the same heads found, in the order of their rows, of
  // one of so many parts of the keys.
  void add_splits(const HeadsTask* splits, int64_t part, int64_t parts) {
    const int64_t count = attended_.count(), width = pair_.student_k.width;
    const KeyRange keys = {count * part / parts, count * (part + 1) / parts};
    float* total = scratch_.grad_k.reserve(keys.count() * width);
    const std::vector<KeyUnit> units = student_units(pair_, task_);
    for (int64_t unit = 0; unit < task_.units; ++unit) {
      std::fill(total, total + keys.count() * width, 0.0f);
      for (int64_t split = 0; split < task_.splits; ++split) {
        const KeyPartial& partial = *splits[split].partial;
        const KeyRange met = {
            std::max(keys.first, partial.keys.first), std::min(keys.last, partial.keys.last)};
        if (met.count() <= 0) continue;
        const int64_t row = unit * partial.keys.count() + met.first - partial.keys.first;
        kernels_.add_scaled(
            partial.grad.get() + row * width, 1.0f, met.count() * width,
            total + (met.first - keys.first) * width);
      }
      write_key_grad(units[unit], keys, total);
    }
  }

 private:
  // Query rows [begin, end) and the keys [first, last) that some of them may attend to.
  struct Block {
    int64_t begin, end, first, last;
  };
  // Keys of one row, counted from the first key of its block.
  struct Range {
    int64_t first, last;
  };
  Range keys_of(int64_t row, const Block& block) const {
    return {attended_.first_key(row) - block.first, attended_.last_key(row) - block.first};
  }
  bool wants_grad() const {
    return pair_.grad_q.data != nullptr || pair_.grad_k.data != nullptr;
  }

  void match_block(AttentionHeads& student, AttentionHeads& teacher, const Block& block) {
    float* slope = pair_.student.softcap > 0 ? scratch_.slope.reserve(blocks_.stride) : nullptr;
    const int64_t count = block.end - block.begin;
    rows_.resize(count), gains_.resize(count), distances_.resize(count);
    for (int64_t place = 0; place < count; ++place) {
      gains_[place] = float(attended_.weight(block.begin + place) * pair_.coefficient);
      ScoreRow& row = rows_[place];
      row.slope = slope;
      row.student_side = pair_.student, row.teacher_side = pair_.teacher;
      row.distance = problem_.distance;
      const Range keys = keys_of(block.begin + place, block);
      row.n = keys.last - keys.first;
      row.grad = student.score_row(0, place) + keys.first;
      row.spare = teacher.score_row(0, place) + keys.first;
      row.student_ahead = rows_at_once(row.n) * student.score_stride();
      row.teacher_ahead = rows_at_once(row.n) * teacher.score_stride();
    }
    for (int64_t head = 0; head < student.heads(); ++head) {
      for (ScoreRow& row : rows_) row.student = row.grad, row.teacher = row.spare;
      kernels_.score_rows(rows_.data(), gains_.data(), count, wants_grad(), distances_.data());
      double& sum = task_.sums[task_.first_unit * pair_.group() + head];
      for (int64_t place = 0; place < count; ++place) {
        sum += attended_.weight(block.begin + place) * distances_[place];
        rows_[place].grad += student.head_stride();
        rows_[place].spare += teacher.head_stride();
      }
    }
  }

  // False, and nothing counted, if some average is too small for its bits.
  bool mean_block(AttentionHeads& student, AttentionHeads& teacher, const Block& block) {
    const int64_t stride = blocks_.stride;
    float* slopes = slopes_of(student.heads());
    float* map = scratch_.student_map.reserve(stride);
    float* teacher_map = scratch_.teacher_map.reserve(stride);
    inverse_sums_.resize(std::max(student.heads(), teacher.heads()));
    double sum = 0;
    for (int64_t row = block.begin; row < block.end; ++row) {
      const int64_t place = row - block.begin;
      const Range keys = keys_of(row, block);
      const int64_t n = keys.last - keys.first;
      average(teacher, pair_.teacher, place, keys, nullptr, teacher_map);
      average(student, pair_.student, place, keys, slopes, map);
      if (!kernels_.log2_row(map, n) || !kernels_.log2_row(teacher_map, n)) return false;
      const double weight = attended_.weight(row);
      const double value =
          kernels_.log_map_row(map, teacher_map, n, problem_.distance, Mixture{}, wants_grad());
      sum += weight * value;
      if (!wants_grad()) continue;
      if (problem_.distance == ScoreDistance::kl) kernels_.ratio_row(map, teacher_map, n);
      for (int64_t head = 0; head < student.heads(); ++head) {
        kernels_.powers_gradient_row(
            student.score_row(head, place) + keys.first, teacher_map,
            slopes == nullptr ? nullptr : slopes + head * stride, n, inverse_sums_[head],
            gain_of_mean(weight, student.heads()));
      }
    }
    task_.sums[0] += sum;
    return true;
  }

  // Powers in place of the scores of all heads, and the mean of their probabilities.
  void average(
      AttentionHeads& heads, const ScoreSide& side, int64_t place, Range keys, float* slopes,
      float* map) {
    const int64_t n = keys.last - keys.first;
    for (int64_t head = 0; head < heads.heads(); ++head) {
      float* scores = heads.score_row(head, place) + keys.first;
      float* slope = slopes == nullptr ? nullptr : slopes + head * blocks_.stride;
      const double inverse = 1.0 / kernels_.powers_row(scores, n, side, slope).sum;
      inverse_sums_[head] = float(inverse);
      const float share = float(inverse / double(heads.heads()));
      if (head == 0) kernels_.scale(scores, share, n, map);
      else kernels_.add_scaled(scores, share, n, map);
    }
  }

  // The same in logarithms, which never underflow: three powers for one.
  void log_mean_block(AttentionHeads& student, AttentionHeads& teacher, const Block& block) {
    const int64_t stride = blocks_.stride;
    float* slopes = slopes_of(student.heads());
    float* map = scratch_.student_map.reserve(stride);
    float* teacher_map = scratch_.teacher_map.reserve(stride);
    for (int64_t row = block.begin; row < block.end; ++row) {
      const int64_t place = row - block.begin;
      const Range keys = keys_of(row, block);
      const int64_t n = keys.last - keys.first;
      log_average(student, pair_.student, place, keys, slopes, map);
      log_average(teacher, pair_.teacher, place, keys, nullptr, teacher_map);
      const double weight = attended_.weight(row);
      const double value =
          kernels_.log_map_row(map, teacher_map, n, problem_.distance, Mixture{}, wants_grad());
      task_.sums[0] += weight * value;
      if (!wants_grad()) continue;
      float* spare = teacher.score_row(0, place);  // already averaged
      for (int64_t head = 0; head < student.heads(); ++head) {
        kernels_.softmax_gradient_row(
            student.score_row(head, place) + keys.first, map, teacher_map, spare,
            slopes == nullptr ? nullptr : slopes + head * stride, n, problem_.distance,
            gain_of_mean(weight, student.heads()));
      }
    }
  }

  void log_average(
      AttentionHeads& heads, const ScoreSide& side, int64_t place, Range keys, float* slopes,
      float* map) {
    const int64_t n = keys.last - keys.first;
    for (int64_t head = 0; head < heads.heads(); ++head) {
      float* slope = slopes == nullptr ? nullptr : slopes + head * blocks_.stride;
      float* scores = heads.score_row(head, place) + keys.first;
      kernels_.log_softmax_row(scores, n, side, slope, scores);
    }
    kernels_.log_mean_rows(
        heads.score_row(0, place) + keys.first, heads.heads(), heads.head_stride(), n, map);
  }

  float* slopes_of(int64_t heads) {
    return pair_.student.softcap > 0 ? scratch_.slope.reserve(heads * blocks_.stride) : nullptr;
  }

  float gain_of_mean(double weight, int64_t heads) const {
    const ScoreSide& side = pair_.student;
    return float(
        weight * pair_.coefficient * side.scale * side.inverse_temperature / double(heads));
  }

  // Gradients by scores of keys that a row may not attend to.
  void clear_masked(AttentionHeads& student, const Block& block) const {
    for (int64_t row = block.begin; row < block.end; ++row) {
      const Range keys = keys_of(row, block);
      if (keys.first == 0 && keys.last == block.last - block.first) continue;
      for (int64_t head = 0; head < student.heads(); ++head) {
        float* scores = student.score_row(head, row - block.begin);
        std::fill(scores, scores + keys.first, 0.0f);
        std::fill(scores + keys.last, scores + (block.last - block.first), 0.0f);
      }
    }
  }

  void clear_uncounted(const std::vector<KeyUnit>& units) const {
    for (const KeyUnit& unit : units) {
      if (pair_.grad_k.data != nullptr) {
        zero_uncounted(pair_.grad_k.at(task_.batch, unit.key_head), attended_.weights());
      }
      for (int64_t head : unit.query_heads) {
        if (pair_.grad_q.data == nullptr) break;
        zero_uncounted(pair_.grad_q.at(task_.batch, head), attended_.weights());
      }
    }
  }

  void write_key_grad(const KeyUnit& unit, KeyRange keys, const float* from) const {
    const Rows to = pair_.grad_k.at(task_.batch, unit.key_head);
    for (int64_t key = keys.first; key < keys.last; ++key, from += to.columns) {
      write_row(kernels_, from, to, attended_.token(key));
    }
  }

  const RowKernels& kernels_;
  const AttentionProblem& problem_;
  const AttentionPair& pair_;
  const HeadsTask& task_;
  const bool is_mean_;
  TaskScratch& scratch_;
  const Attended attended_;
  const Blocks blocks_;
  std::vector<float> inverse_sums_;
  // Of the rows of a block.
  std::vector<ScoreRow> rows_;
  std::vector<float> gains_;
  std::vector<double> distances_;
};

}  // namespace fakd
