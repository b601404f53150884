// Alignment of attention maps that exist: one pass over the rows of both sides.
//
// A task is a query row of one batch entry, of one head, or of all where they are averaged. Keys that
// count are compared where they lie if they are float32 and side by side, else gathered in a row, from
// which the gradient is put back. Per entry that counts 2 reads and 1 write of memory.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "attention_heads.h"
#include "attention_kl.h"

namespace fakd {
namespace {

constexpr float LEAST_SCORE = -1e30f;  // what -inf and its like count as: a difference must exist
constexpr int64_t TASK_KEYS = 16384;   // of as many rows as a thread takes at a time

struct MapScratch {
  Scratch student, teacher, student_map, teacher_map, line;
};

class MapRows {
 public:
  MapRows(const AttentionMapProblem& problem, const AttentionMapPair& pair, int64_t batch)
      : kernels_(row_kernels()), problem_(problem), pair_(pair), batch_(batch),
        attended_(pair.student.tokens, pair.row_weights, pair.is_causal, pair.window, batch),
        run_ends_(attended_.tokens().run_ends()), side_{1.0f, 0.0f, problem.inverse_temperature} {}

  int64_t count() const { return attended_.count(); }

  void clear_uncounted() const {
    for (int64_t head = 0; head < pair_.student.heads && pair_.grad.data != nullptr; ++head) {
      zero_uncounted(pair_.grad.at(batch_, head), attended_.weights());
    }
  }

  // The weighted distance of a row.
  double run(int64_t head, int64_t row, MapScratch& scratch) const {
    const double weight = attended_.weight(row);
    if (pair_.teacher_heads == nullptr) return weight * run_mean(row, weight, scratch);
    const float gain = float(weight * pair_.coefficient);
    const int64_t teacher_head = pair_.teacher_heads[head];
    if (!problem_.are_scores) return weight * compare(head, teacher_head, row, gain, scratch);
    float* s = scratch.student.reserve(pair_.student.tokens);
    float* t = scratch.teacher.reserve(pair_.student.tokens);
    const int64_t n = gather(pair_.student, head, row, s);
    gather(pair_.teacher, teacher_head, row, t);
    const double value = score(s, t, n, gain);
    if (wants_grad()) scatter(head, row, s, scratch.line);
    return weight * value;
  }

 private:
  bool wants_grad() const { return pair_.grad.data != nullptr; }

  double score(float* s, float* t, int64_t n, float gain) const {
    ScoreRow call{};
    call.student = call.grad = s;
    call.teacher = call.spare = t;
    call.n = n;
    call.student_side = call.teacher_side = side_;
    call.distance = problem_.distance;
    return kernels_.score_row(call, gain, 0, wants_grad()).distance;
  }

  double compare(
      int64_t head, int64_t teacher_head, int64_t row, float gain, MapScratch& scratch) const {
    const int64_t first = attended_.first_key(row), last = attended_.last_key(row);
    const float* s = line_of(pair_.student, head, row, scratch.student);
    const float* t = line_of(pair_.teacher, teacher_head, row, scratch.teacher);
    if (!wants_grad()) {
      return kernels_.compare_row(s, t, last - first, problem_.distance, Mixture{}, 0, nullptr);
    }
    const Rows grad = pair_.grad.at(batch_, head);
    if (grad.dtype != Dtype::float32 || !is_run(first, last)) {
      float* out = scratch.student.reserve(pair_.student.tokens);
      const double value =
          kernels_.compare_row(s, t, last - first, problem_.distance, Mixture{}, gain, out);
      scatter(head, row, out, scratch.line);
      return value;
    }
    float* out = reinterpret_cast<float*>(row_address(grad, attended_.token(row)));
    const int64_t begin = attended_.token(first), end = attended_.token(last - 1) + 1;
    std::memset(out, 0, begin * sizeof(float));
    std::memset(out + end, 0, (grad.columns - end) * sizeof(float));
    return kernels_.compare_row(s, t, end - begin, problem_.distance, Mixture{}, gain, out + begin);
  }

  // Keys that count, of one query row: where they lie, or gathered.
  const float* line_of(const Heads& maps, int64_t head, int64_t row, Scratch& room) const {
    const int64_t first = attended_.first_key(row);
    const Rows rows = maps.at(batch_, head);
    if (rows.dtype == Dtype::float32 && is_run(first, attended_.last_key(row))) {
      return reinterpret_cast<const float*>(row_address(rows, attended_.token(row))) +
             attended_.token(first);
    }
    float* out = room.reserve(pair_.student.tokens);
    gather(maps, head, row, out);
    return out;
  }

  bool is_run(int64_t first, int64_t last) const {
    return last > first && attended_.tokens().is_run(first, last);
  }

  double run_mean(int64_t row, double weight, MapScratch& scratch) const {
    const int64_t tokens = pair_.student.tokens, heads = pair_.student.heads;
    float* map = scratch.student_map.reserve(tokens);
    float* teacher_map = scratch.teacher_map.reserve(tokens);
    float* scores = scratch.student.reserve(heads * tokens);
    const int64_t n = average(pair_.student, row, scores, map);
    average(
        pair_.teacher, row, scratch.teacher.reserve(pair_.teacher.heads * tokens), teacher_map);
    float gain = float(weight * pair_.coefficient / double(heads));
    if (!problem_.are_scores) {
      const double value = kernels_.compare_row(
          map, teacher_map, n, problem_.distance, Mixture{}, gain, wants_grad() ? map : nullptr);
      for (int64_t head = 0; head < heads && wants_grad(); ++head) {
        scatter(head, row, map, scratch.line);
      }
      return value;
    }
    const double value =
        kernels_.log_map_row(map, teacher_map, n, problem_.distance, Mixture{}, wants_grad());
    gain *= problem_.inverse_temperature;
    float* spare = scratch.teacher.get();  // already averaged
    for (int64_t head = 0; head < heads && wants_grad(); ++head) {
      float* logs = scores + head * tokens;
      kernels_.softmax_gradient_row(
          logs, map, teacher_map, spare, nullptr, n, problem_.distance, gain);
      scatter(head, row, logs, scratch.line);
    }
    return value;
  }

  // The mean of probabilities, or the logarithm of that of softmax; rows of heads stay in `all`.
  int64_t average(const Heads& maps, int64_t row, float* all, float* mean) const {
    const int64_t tokens = pair_.student.tokens;
    int64_t n = 0;
    for (int64_t head = 0; head < maps.heads; ++head) {
      float* line = all + head * tokens;
      n = gather(maps, head, row, line);
      if (problem_.are_scores) {
        kernels_.log_softmax_row(line, n, side_, nullptr, line);
      } else if (head == 0) {
        kernels_.scale(line, 1.0f / float(maps.heads), n, mean);
      } else {
        kernels_.add_scaled(line, 1.0f / float(maps.heads), n, mean);
      }
    }
    if (problem_.are_scores) kernels_.log_mean_rows(all, maps.heads, tokens, n, mean);
    return n;
  }

  // Keys that count, of one query row; returns how many.
  int64_t gather(const Heads& maps, int64_t head, int64_t row, float* out) const {
    const int64_t first = attended_.first_key(row), last = attended_.last_key(row), n = last - first;
    const Rows rows = maps.at(batch_, head);
    const char* line = row_address(rows, attended_.token(row));
    const int64_t bytes = int64_t(element_bytes(rows.dtype));
    for (int64_t key = first; key < last;) {
      const int64_t end = std::min(run_ends_[key], last);
      const char* from = line + attended_.token(key) * bytes;
      kernels_.widen(from, rows.dtype, end - key, out + key - first);
      key = end;
    }
    if (problem_.are_scores) {
      int32_t is_any = n == 0;  // whether a score is no -inf: without one there are no probabilities
      for (int64_t j = 0; j < n; ++j) {
        is_any |= int32_t(out[j] > -std::numeric_limits<float>::infinity());
        out[j] = out[j] < LEAST_SCORE ? LEAST_SCORE : out[j];
      }
      if (!is_any) out[0] = std::numeric_limits<float>::quiet_NaN();
    }
    return n;
  }

  // The gradient of one query row: zero at keys that do not count.
  void scatter(int64_t head, int64_t row, const float* values, Scratch& line) const {
    const Rows grad = pair_.grad.at(batch_, head);
    const int64_t first = attended_.first_key(row), last = attended_.last_key(row);
    float* out = line.reserve(grad.columns);
    std::memset(out, 0, grad.columns * sizeof(float));
    for (int64_t key = first; key < last;) {
      const int64_t end = std::min(run_ends_[key], last);
      std::copy(values + key - first, values + end - first, out + attended_.token(key));
      key = end;
    }
    write_row(kernels_, out, grad, attended_.token(row));
  }

  const RowKernels& kernels_;
  const AttentionMapProblem& problem_;
  const AttentionMapPair& pair_;
  const int64_t batch_;
  const Attended attended_;
  const std::vector<int64_t> run_ends_;
  const ScoreSide side_;
};

}  // namespace

void attention_map_kl(const AttentionMapProblem& problem) {
  row_kernels();  // a wrong FAKD_ISA is refused here, not on some thread
  for (const AttentionMapPair& pair : problem.pairs) {
    const int64_t heads = pair.teacher_heads == nullptr ? 1 : pair.student.heads;
    std::vector<double> totals(heads, 0.0);
    if (pair.grad.data != nullptr) {
      advise_huge_pages(
          pair.grad.data, pair.grad.batch * pair.grad.heads * pair.grad.tokens * pair.grad.width *
                              element_bytes(pair.grad.dtype));
    }
    const int64_t grain = std::max<int64_t>(1, TASK_KEYS / std::max<int64_t>(1, pair.student.tokens));
    for (int64_t batch = 0; batch < pair.student.batch; ++batch) {
      const MapRows rows(problem, pair, batch);
      rows.clear_uncounted();
      const int64_t count = rows.count();
      // Sums of every row apart, added in their order: results do not depend on threads.
      std::vector<double> sums(heads * count, 0.0);
      torch::stable::parallel_for(0, heads * count, grain, [&](int64_t begin, int64_t end) {
        MapScratch scratch;
        for (int64_t task = begin; task < end; ++task) {
          sums[task] = rows.run(task / count, task % count, scratch);
        }
      });
      for (int64_t task = 0; task < heads * count; ++task) totals[task / count] += sums[task];
    }
    for (int64_t head = 0; head < heads; ++head) pair.sums[head] = float(totals[head]);
  }
}

}  // namespace fakd
