// Attention alignment on the CPU.
//
// A task is one student key head of one batch entry, with all query heads that share it: nobody else
// adds to its key gradient. Per query head, blocks of query rows meet all keys they may attend to:
// two products give both score blocks, which stay in the cache; a row kernel turns them into the
// distance and its gradient in place; two products give dQ and add to dK.
//
// Per pair of row and allowed key: 2 (2 Ks + Kt + Ks) FLOPs and two exponentials. Rows and keys of
// weight 0 are left out from the start, so padding costs nothing, and causal blocks cost half.

#include "attention_kl.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "gemm.h"
#include "memory.h"
#include "schedule.h"

namespace fakd {
namespace {

// Both score blocks within a private cache of 2 MiB; fewer rows than 32 make slow products.
constexpr int64_t SCORE_BYTES = 1 << 20, LEAST_ROWS = 32, MOST_ROWS = 256;
constexpr int64_t BEHIND_ROW = 16;  // elements that a row kernel may overwrite behind a row

struct TaskScratch {
  Scratch student_q, student_k, teacher_q, teacher_k, student_scores, teacher_scores, slope;
  Scratch grad_q, grad_k;
};

class HeadTask {
 public:
  HeadTask(
      const AttentionProblem& problem, const AttentionPair& pair, int64_t batch,
      TaskScratch& scratch, double* sums)
      : kernels_(row_kernels()), problem_(problem), pair_(pair), batch_(batch), scratch_(scratch),
        sums_(sums),
        weights_(pair.row_weights == nullptr ? nullptr
                                             : pair.row_weights + batch * pair.student_q.tokens),
        counted_(pair.student_q.tokens, weights_), count_(counted_.count()),
        stride_((count_ + BEHIND_ROW + 15) / 16 * 16) {
    const int64_t affordable = SCORE_BYTES / 8 / std::max<int64_t>(1, stride_);
    block_rows_ = std::clamp(affordable / 16 * 16, LEAST_ROWS, MOST_ROWS);
  }

  void run(int64_t key_head) {
    const Heads& q = pair_.student_q;
    const int64_t group = q.heads / pair_.student_k.heads;
    const int64_t width = q.width;
    zero_head(pair_.grad_k, key_head);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      zero_head(pair_.grad_q, head);
    }
    if (count_ == 0) return;
    student_k_ = read(pair_.student_k, key_head, scratch_.student_k);
    if (pair_.grad_k.data != nullptr) {
      std::memset(scratch_.grad_k.reserve(count_ * width), 0, count_ * width * sizeof(float));
    }
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) run_head(head);
    if (pair_.grad_k.data != nullptr) {
      const Rows grad = pair_.grad_k.at(batch_, key_head);
      for (int64_t row = 0; row < count_; ++row) {
        write_row(kernels_, scratch_.grad_k.get() + row * width, grad, counted_[row]);
      }
    }
  }

 private:
  Matrix read(const Heads& heads, int64_t head, Scratch& scratch) const {
    return fetch(kernels_, heads.at(batch_, head), counted_, 0, count_, scratch);
  }

  void zero_head(const Heads& grad, int64_t head) const {
    if (grad.data != nullptr) zero_uncounted(grad.at(batch_, head), weights_);
  }

  void run_head(int64_t head) {
    const int64_t teacher_head = pair_.teacher_heads[head];
    const int64_t teacher_group = pair_.teacher_q.heads / pair_.teacher_k.heads;
    const Matrix student_q = read(pair_.student_q, head, scratch_.student_q);
    const Matrix teacher_q = read(pair_.teacher_q, teacher_head, scratch_.teacher_q);
    const Matrix teacher_k =
        read(pair_.teacher_k, teacher_head / teacher_group, scratch_.teacher_k);
    const int64_t score_count = block_rows_ * stride_;
    float* student_scores = scratch_.student_scores.reserve(score_count);
    float* teacher_scores = scratch_.teacher_scores.reserve(score_count);
    float* slope = pair_.student.softcap > 0 ? scratch_.slope.reserve(stride_) : nullptr;
    const bool wants_grad = pair_.grad_q.data != nullptr || pair_.grad_k.data != nullptr;
    for (int64_t begin = 0; begin < count_; begin += block_rows_) {
      const int64_t end = std::min(count_, begin + block_rows_);
      const int64_t first = first_key(begin), last = last_key(end - 1);
      const Matrix student = row_major<float>(student_scores, end - begin, last - first, stride_);
      const Matrix teacher = row_major<float>(teacher_scores, end - begin, last - first, stride_);
      const Matrix keys = rows_of(student_k_, first, last);
      multiply(student, rows_of(student_q, begin, end), keys.transposed());
      multiply(
          teacher, rows_of(teacher_q, begin, end), rows_of(teacher_k, first, last).transposed());
      for (int64_t row = begin; row < end; ++row) {
        float* scores = student_scores + (row - begin) * stride_;
        const int64_t low = first_key(row) - first, high = last_key(row) - first;
        const double weight = weights_ == nullptr ? 1.0 : double(weights_[counted_[row]]);
        const ScoreRow call = {
            scores + low,  teacher_scores + (row - begin) * stride_ + low, slope, high - low,
            pair_.student, pair_.teacher, problem_.distance};
        const float gain = float(weight * pair_.coefficient);
        sums_[head] += weight * kernels_.score_row(call, gain, wants_grad);
        std::fill(scores, scores + low, 0.0f);
        std::fill(scores + high, scores + (last - first), 0.0f);
      }
      if (pair_.grad_q.data != nullptr) write_query_grad(head, begin, end, student, keys);
      if (pair_.grad_k.data != nullptr) {
        const int64_t width = student_k_.columns;
        multiply(
            row_major<float>(scratch_.grad_k.get() + first * width, last - first, width),
            student.transposed(), rows_of(student_q, begin, end), true);
      }
    }
  }

  void write_query_grad(
      int64_t head, int64_t begin, int64_t end, const Matrix& scores, const Matrix& keys) {
    const Rows grad = pair_.grad_q.at(batch_, head);
    if (grad.dtype == Dtype::float32 && counted_.is_run(begin, end)) {
      const float* address = reinterpret_cast<float*>(row_address(grad, counted_[begin]));
      multiply(row_major(address, end - begin, grad.columns, grad.stride), scores, keys);
      return;
    }
    float* memory = scratch_.grad_q.reserve((end - begin) * grad.columns);
    multiply(row_major<float>(memory, end - begin, grad.columns), scores, keys);
    for (int64_t row = begin; row < end; ++row) {
      write_row(kernels_, memory + (row - begin) * grad.columns, grad, counted_[row]);
    }
  }

  static Matrix rows_of(const Matrix& matrix, int64_t begin, int64_t end) {
    return row_major(
        matrix.data + begin * matrix.row_stride, end - begin, matrix.columns, matrix.row_stride);
  }

  // Counted keys [first_key(row), last_key(row)) are those that a counted row may attend to.
  int64_t first_key(int64_t row) const {
    if (pair_.window < 0) return 0;
    return lower_bound(counted_[row] - pair_.window + 1);
  }
  int64_t last_key(int64_t row) const {
    if (pair_.is_causal) return row + 1;
    if (pair_.window < 0) return count_;
    return lower_bound(counted_[row] + pair_.window);
  }
  // The first counted row that is not before a position.
  int64_t lower_bound(int64_t position) const {
    int64_t low = 0, high = count_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (counted_[middle] < position) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  const RowKernels& kernels_;
  const AttentionProblem& problem_;
  const AttentionPair& pair_;
  const int64_t batch_;
  TaskScratch& scratch_;
  double* sums_;  // [H]
  const float* weights_;
  const CountedRows counted_;
  const int64_t count_, stride_;
  int64_t block_rows_;
  Matrix student_k_{};
};

}  // namespace

void attention_kl(const AttentionProblem& problem) {
  row_kernels();  // a wrong FAKD_ISA is refused here, not on some thread
  struct Head {
    int64_t pair, batch, key_head;
    double cost;
  };
  std::vector<Head> tasks;
  std::vector<std::vector<double>> sums;  // per pair [B, H]
  for (size_t index = 0; index < problem.pairs.size(); ++index) {
    const AttentionPair& pair = problem.pairs[index];
    const Heads& q = pair.student_q;
    sums.emplace_back(q.batch * q.heads, 0.0);
    const double cost = double(q.tokens) * q.tokens * (3 * q.width + pair.teacher_q.width) *
                        (q.heads / std::max<int64_t>(1, pair.student_k.heads));
    for (const Heads* grad : {&pair.grad_q, &pair.grad_k}) {
      advise_huge_pages(
          grad->data,
          grad->batch * grad->heads * grad->tokens * grad->width * element_bytes(grad->dtype));
    }
    for (int64_t batch = 0; batch < q.batch; ++batch) {
      for (int64_t head = 0; head < pair.student_k.heads; ++head) {
        tasks.push_back({int64_t(index), batch, head, cost});
      }
    }
  }
  std::stable_sort(
      tasks.begin(), tasks.end(), [](const Head& a, const Head& b) { return a.cost > b.cost; });
  const int64_t count = int64_t(tasks.size());
  const int64_t workers =
      std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), count));
  std::vector<TaskScratch> scratch(workers);
  run_tasks(count, workers, [&](int64_t index, int64_t worker) {
    const Head& task = tasks[index];
    const AttentionPair& pair = problem.pairs[task.pair];
    double* task_sums = sums[task.pair].data() + task.batch * pair.student_q.heads;
    HeadTask(problem, pair, task.batch, scratch[worker], task_sums).run(task.key_head);
  });
  for (size_t index = 0; index < problem.pairs.size(); ++index) {
    const AttentionPair& pair = problem.pairs[index];
    for (int64_t head = 0; head < pair.student_q.heads; ++head) {
      double total = 0;
      for (int64_t batch = 0; batch < pair.student_q.batch; ++batch) {
        total += sums[index][batch * pair.student_q.heads + head];
      }
      pair.sums[head] = float(total);
    }
  }
}

}  // namespace fakd
