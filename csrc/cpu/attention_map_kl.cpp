// Alignment of attention maps that exist: one pass over the rows of both sides.
//
// A task is a query row of one batch entry, with all heads. Keys that count are gathered side by side
// in float32, compared by the row kernels of attention_kl, and the gradient is put back. Per entry
// that counts 2 reads and 1 write of memory.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention_heads.h"
#include "attention_kl.h"

namespace fakd {
namespace {

constexpr float LEAST_SCORE = -1e30f;  // what -inf and its like count as: a difference must exist
constexpr float LEAST = 0x1p-126f;     // smaller probabilities count as this one

struct MapScratch {
  Scratch student, teacher, student_map, teacher_map, student_log, teacher_log, line;
};

class MapRows {
 public:
  MapRows(const AttentionMapProblem& problem, const AttentionMapPair& pair, int64_t batch)
      : kernels_(row_kernels()), problem_(problem), pair_(pair), batch_(batch),
        attended_(pair.student.tokens, pair.row_weights, pair.is_causal, pair.window, batch),
        side_{1.0f, 0.0f, problem.inverse_temperature} {}

  int64_t count() const { return attended_.count(); }

  void clear_uncounted() const {
    for (int64_t head = 0; head < pair_.student.heads && pair_.grad.data != nullptr; ++head) {
      zero_uncounted(pair_.grad.at(batch_, head), attended_.weights());
    }
  }

  // Adds to sums, [H] or [1].
  void run(int64_t row, MapScratch& scratch, double* sums) const {
    const double weight = attended_.weight(row);
    if (pair_.teacher_heads == nullptr) {
      sums[0] += weight * run_mean(row, weight, scratch);
      return;
    }
    for (int64_t head = 0; head < pair_.student.heads; ++head) {
      float* s = scratch.student.reserve(pair_.student.tokens);
      float* t = scratch.teacher.reserve(pair_.student.tokens);
      const int64_t n = gather(pair_.student, head, row, s);
      gather(pair_.teacher, pair_.teacher_heads[head], row, t);
      const float gain = float(weight * pair_.coefficient);
      sums[head] += weight * (problem_.are_scores ? score(s, t, n, gain)
                                                     : compare(s, t, n, gain, scratch));
      if (wants_grad()) scatter(head, row, s, scratch.line);
    }
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

  // Probabilities of both sides; the gradient by the student's in their place.
  double compare(float* s, const float* t, int64_t n, float gain, MapScratch& scratch) const {
    float* log_s = scratch.student_log.reserve(pair_.student.tokens);
    float* log_t = scratch.teacher_log.reserve(pair_.student.tokens);
    kernels_.scale(s, 1.0f, n, log_s);
    kernels_.scale(t, 1.0f, n, log_t);
    kernels_.floor_log2_row(log_s, n);
    kernels_.floor_log2_row(log_t, n);
    const double value =
        kernels_.log_map_row(log_s, log_t, n, problem_.distance, 0.5f, wants_grad());
    if (!wants_grad()) return value;
    const ScoreDistance distance = problem_.distance;
    for (int64_t j = 0; j < n; ++j) {
      // From the probabilities where they serve: their logarithms have lost bits.
      const float by_map = distance == ScoreDistance::kl    ? -std::max(t[j], LEAST) / s[j]
                           : distance == ScoreDistance::mse ? 2.0f * (s[j] - std::max(t[j], LEAST))
                           : distance == ScoreDistance::reverse_kl ? log_t[j] + 1.0f
                                                                   : log_t[j];
      s[j] = s[j] < LEAST ? 0.0f : gain * by_map;
    }
    return value;
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
      const double value = compare(map, teacher_map, n, gain, scratch);
      for (int64_t head = 0; head < heads && wants_grad(); ++head) {
        scatter(head, row, map, scratch.line);
      }
      return value;
    }
    const double value =
        kernels_.log_map_row(map, teacher_map, n, problem_.distance, 0.5f, wants_grad());
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
    if (n > 0 && attended_.tokens().is_run(first, last)) {
      kernels_.widen(line + attended_.token(first) * bytes, rows.dtype, n, out);
    } else {
      for (int64_t j = 0; j < n; ++j) {
        kernels_.widen(line + attended_.token(first + j) * bytes, rows.dtype, 1, out + j);
      }
    }
    if (problem_.are_scores) {
      for (int64_t j = 0; j < n; ++j) out[j] = out[j] < LEAST_SCORE ? LEAST_SCORE : out[j];
    }
    return n;
  }

  // The gradient of one query row: zero at keys that do not count.
  void scatter(int64_t head, int64_t row, const float* values, Scratch& line) const {
    const Rows grad = pair_.grad.at(batch_, head);
    const int64_t first = attended_.first_key(row), last = attended_.last_key(row);
    float* out = line.reserve(grad.columns);
    std::memset(out, 0, grad.columns * sizeof(float));
    for (int64_t key = first; key < last; ++key) out[attended_.token(key)] = values[key - first];
    write_row(kernels_, out, grad, attended_.token(row));
  }

  const RowKernels& kernels_;
  const AttentionMapProblem& problem_;
  const AttentionMapPair& pair_;
  const int64_t batch_;
  const Attended attended_;
  const ScoreSide side_;
};

}  // namespace

void attention_map_kl(const AttentionMapProblem& problem) {
  row_kernels();  // a wrong FAKD_ISA is refused here, not on some thread
  for (const AttentionMapPair& pair : problem.pairs) {
    const int64_t maps = pair.teacher_heads == nullptr ? 1 : pair.student.heads;
    std::vector<double> totals(maps, 0.0);
    if (pair.grad.data != nullptr) {
      advise_huge_pages(
          pair.grad.data, pair.grad.batch * pair.grad.heads * pair.grad.tokens * pair.grad.width *
                              element_bytes(pair.grad.dtype));
    }
    for (int64_t batch = 0; batch < pair.student.batch; ++batch) {
      const MapRows rows(problem, pair, batch);
      rows.clear_uncounted();
      // Sums of every row apart, added in their order: results do not depend on threads.
      std::vector<double> sums(rows.count() * maps, 0.0);
      torch::stable::parallel_for(0, rows.count(), 1, [&](int64_t begin, int64_t end) {
        MapScratch scratch;
        for (int64_t row = begin; row < end; ++row) {
          rows.run(row, scratch, sums.data() + row * maps);
        }
      });
      for (int64_t row = 0; row < rows.count(); ++row) {
        for (int64_t head = 0; head < maps; ++head) totals[head] += sums[row * maps + head];
      }
    }
    for (int64_t head = 0; head < maps; ++head) pair.sums[head] = float(totals[head]);
  }
}

}  // namespace fakd
