// Attention alignment on the CPU.
//
// A task is some student key heads of one batch entry, with all query heads that share them, or all
// heads where heads are averaged; and all query rows, or a range of them where there are few tasks.
// Blocks of query rows meet all keys they may attend to: one product per side gives the scores of
// all heads of the block, which stay in the cache; row kernels turn them into the distance and its
// gradient in place; two products give dQ and add to dK.
//
// Per head, query row and allowed key: 2 (3 Ks + Kt) FLOPs and two exponentials; averaged heads take
// three per student head and two per teacher head. Rows and keys of weight 0 are left out from the
// start, so padding costs nothing, and causal blocks cost half.

#include "attention_kl.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "attention_heads.h"
#include "schedule.h"

namespace fakd {
namespace {

// The score blocks of both sides: most of a private cache of 2 MiB.
constexpr int64_t SCORE_BYTES = (1 << 20) + (1 << 17);
constexpr int64_t LEAST_ROWS = 16, MOST_ROWS = 256;  // of a block; fewer make slow products

struct HeadsTask {
  int64_t pair, batch;
  int64_t first_unit, units;  // student key heads
  int64_t split, splits;      // of the query rows
  double* sums;               // [H] of the pair
  float* grad_k;              // [units, count, K], where query rows are split
};

struct TaskScratch {
  HeadsScratch student, teacher;
  Scratch slope, student_map, teacher_map, grad_k;
};

// How a pair is cut into blocks; depends on its sizes alone.
struct Blocks {
  int64_t units;  // student key heads of a task
  int64_t rows;   // query rows of a block
  int64_t stride;

  Blocks(const AttentionPair& pair, bool is_mean, int64_t tokens) {
    const int64_t key_heads = std::max<int64_t>(1, pair.student_k.heads);
    const int64_t group = pair.student_q.heads / key_heads;
    stride = (tokens + 31) / 16 * 16;
    const int64_t row_bytes = stride * int64_t(sizeof(float));
    const int64_t heads = is_mean ? pair.student_q.heads + pair.teacher_q.heads : 2 * group;
    const int64_t affordable = SCORE_BYTES / (row_bytes * std::max<int64_t>(1, heads));
    // Blocks of equal size: a short last one would waste its products.
    const int64_t most = std::clamp(affordable, LEAST_ROWS, MOST_ROWS);
    const int64_t count = std::max<int64_t>(1, (tokens + most - 1) / most);
    rows = std::max<int64_t>(1, (tokens + count - 1) / count);
    const int64_t most_units = std::clamp<int64_t>(affordable / rows, 1, key_heads);
    const int64_t tasks = (key_heads + most_units - 1) / most_units;
    units = is_mean ? key_heads : (key_heads + tasks - 1) / tasks;
  }
};

class TaskRun {
 public:
  TaskRun(const AttentionProblem& problem, const HeadsTask& task, TaskScratch& scratch)
      : kernels_(row_kernels()), problem_(problem), pair_(problem.pairs[task.pair]), task_(task),
        is_mean_(pair_.teacher_heads == nullptr), scratch_(scratch), attended_(pair_, task.batch),
        blocks_(pair_, is_mean_, attended_.count()) {}

  void run() {
    const std::vector<KeyUnit> student_units = units_of_student();
    if (task_.split == 0) clear_uncounted(student_units);
    if (attended_.count() == 0) return;
    AttentionHeads student(
        kernels_, pair_.student_q, pair_.student_k, task_.batch, attended_, student_units,
        blocks_.rows, blocks_.stride, scratch_.student);
    AttentionHeads teacher(
        kernels_, pair_.teacher_q, pair_.teacher_k, task_.batch, attended_,
        units_of_teacher(student_units), blocks_.rows, blocks_.stride, scratch_.teacher);
    const bool wants_key = pair_.grad_k.data != nullptr, wants_query = pair_.grad_q.data != nullptr;
    const int64_t size = attended_.count() * student.width();
    float* grad_k = task_.grad_k;
    if (wants_key && grad_k == nullptr) grad_k = scratch_.grad_k.reserve(student.units() * size);
    const int64_t block_count = (attended_.count() + blocks_.rows - 1) / blocks_.rows;
    const int64_t first_block = block_count * task_.split / task_.splits;
    const int64_t last_block = block_count * (task_.split + 1) / task_.splits;
    // The first block writes all of the keys' gradient if it meets all keys; else it adds to zeros.
    bool is_begun = first_block == last_block || pair_.is_causal || pair_.window >= 0;
    if (wants_key && is_begun) std::memset(grad_k, 0, student.units() * size * sizeof(float));
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t begin = block * blocks_.rows;
      const int64_t end = std::min(attended_.count(), begin + blocks_.rows);
      const int64_t first = attended_.first_key(begin), last = attended_.last_key(end - 1);
      student.compute_scores(begin, end, first, last);
      teacher.compute_scores(begin, end, first, last);
      for (int64_t row = begin; row < end; ++row) {
        const Range keys = {attended_.first_key(row) - first, attended_.last_key(row) - first};
        if (is_mean_) mean_row(student, teacher, row, row - begin, keys);
        else match_row(student, teacher, row, row - begin, keys);
        if (!wants_key && !wants_query) continue;
        for (int64_t head = 0; head < student.heads(); ++head) {
          float* scores = student.score_row(head, row - begin);
          std::fill(scores, scores + keys.first, 0.0f);
          std::fill(scores + keys.last, scores + (last - first), 0.0f);
        }
      }
      if (wants_query) student.write_query_grad(pair_.grad_q);
      if (wants_key) student.add_key_grad(grad_k, is_begun);
      is_begun = true;
    }
    if (wants_key && task_.grad_k == nullptr) write_key_grad(student_units, grad_k);
  }

  // Where query rows are split: what all tasks of the same heads found, in the order of their rows.
  void add_splits(const HeadsTask* others) {
    if (attended_.count() == 0) return;
    const int64_t size = task_.units * attended_.count() * pair_.student_k.width;
    for (int64_t split = 1; split < task_.splits; ++split) {
      kernels_.add_scaled(others[split].grad_k, 1.0f, size, task_.grad_k);
    }
    write_key_grad(units_of_student(), task_.grad_k);
  }

 private:
  struct Range {
    int64_t first, last;
  };

  std::vector<KeyUnit> units_of_student() const {
    const int64_t group = pair_.student_q.heads / pair_.student_k.heads;
    std::vector<KeyUnit> units(task_.units);
    for (int64_t unit = 0; unit < task_.units; ++unit) {
      units[unit].key_head = task_.first_unit + unit;
      units[unit].query_heads.resize(group);
      std::iota(
          units[unit].query_heads.begin(), units[unit].query_heads.end(),
          units[unit].key_head * group);
    }
    return units;
  }

  // All heads, or those that the student's are compared with, in the student's order: as many units
  // as the student's where the heads of each unit share a key head here too, else one for every head.
  std::vector<KeyUnit> units_of_teacher(const std::vector<KeyUnit>& student_units) const {
    const int64_t group = pair_.teacher_q.heads / pair_.teacher_k.heads;
    std::vector<KeyUnit> whole, single;
    if (is_mean_) {
      for (int64_t key_head = 0; key_head < pair_.teacher_k.heads; ++key_head) {
        whole.push_back({key_head, std::vector<int64_t>(group)});
        std::iota(
            whole.back().query_heads.begin(), whole.back().query_heads.end(), key_head * group);
      }
      return whole;
    }
    bool is_shared = true;
    for (const KeyUnit& unit : student_units) {
      whole.push_back({-1, {}});
      for (int64_t head : unit.query_heads) {
        const int64_t teacher_head = pair_.teacher_heads[head];
        single.push_back({teacher_head / group, {teacher_head}});
        KeyUnit& last = whole.back();
        is_shared = is_shared && (last.key_head < 0 || last.key_head == teacher_head / group);
        last.key_head = teacher_head / group;
        last.query_heads.push_back(teacher_head);
      }
    }
    return is_shared ? whole : single;
  }

  void match_row(
      AttentionHeads& student, AttentionHeads& teacher, int64_t row, int64_t place, Range keys) {
    const bool wants_grad = pair_.grad_q.data != nullptr || pair_.grad_k.data != nullptr;
    float* slope = pair_.student.softcap > 0 ? scratch_.slope.reserve(blocks_.stride) : nullptr;
    const double weight = attended_.weight(row);
    const int64_t first_head = task_.first_unit * (pair_.student_q.heads / pair_.student_k.heads);
    for (int64_t head = 0; head < student.heads(); ++head) {
      const ScoreRow call = {
          student.score_row(head, place) + keys.first, teacher.score_row(head, place) + keys.first,
          slope,         keys.last - keys.first,
          pair_.student, pair_.teacher,
          problem_.distance};
      const float gain = float(weight * pair_.coefficient);
      task_.sums[first_head + head] += weight * kernels_.score_row(call, gain, wants_grad);
    }
  }

  void mean_row(
      AttentionHeads& student, AttentionHeads& teacher, int64_t row, int64_t place, Range keys) {
    const bool wants_grad = pair_.grad_q.data != nullptr || pair_.grad_k.data != nullptr;
    const int64_t n = keys.last - keys.first, stride = blocks_.stride;
    float* slopes =
        pair_.student.softcap > 0 ? scratch_.slope.reserve(student.heads() * stride) : nullptr;
    float* map = average(student, pair_.student, place, keys, slopes, scratch_.student_map);
    float* teacher_map = average(teacher, pair_.teacher, place, keys, nullptr, scratch_.teacher_map);
    const double weight = attended_.weight(row);
    task_.sums[0] +=
        weight * kernels_.log_map_row(map, teacher_map, n, problem_.distance, wants_grad);
    if (!wants_grad) return;
    const double gain = weight * pair_.coefficient * pair_.student.scale *
                        pair_.student.inverse_temperature / double(student.heads());
    float* spare = teacher.score_row(0, place);  // already averaged
    for (int64_t head = 0; head < student.heads(); ++head) {
      kernels_.softmax_gradient_row(
          student.score_row(head, place) + keys.first, teacher_map, spare,
          slopes == nullptr ? nullptr : slopes + head * stride, n, problem_.distance, float(gain));
    }
  }

  // log2 of probabilities in place of the scores of all heads; returns log2 of their mean.
  float* average(
      AttentionHeads& heads, const ScoreSide& side, int64_t place, Range keys, float* slopes,
      Scratch& map) {
    const int64_t n = keys.last - keys.first;
    for (int64_t head = 0; head < heads.heads(); ++head) {
      float* slope = slopes == nullptr ? nullptr : slopes + head * blocks_.stride;
      kernels_.log_softmax_row(heads.score_row(head, place) + keys.first, n, side, slope);
    }
    float* out = map.reserve(blocks_.stride);
    kernels_.log_mean_rows(
        heads.score_row(0, place) + keys.first, heads.heads(), heads.head_stride(), n, out);
    return out;
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

  void write_key_grad(const std::vector<KeyUnit>& units, const float* from) const {
    for (const KeyUnit& unit : units) {
      const Rows to = pair_.grad_k.at(task_.batch, unit.key_head);
      for (int64_t row = 0; row < attended_.count(); ++row, from += to.columns) {
        write_row(kernels_, from, to, attended_.token(row));
      }
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
};

// Tasks of all pairs, those of one pair and batch entry in the order of their heads, splits last.
std::vector<HeadsTask> divide(const AttentionProblem& problem, int64_t threads) {
  std::vector<HeadsTask> tasks;
  for (size_t index = 0; index < problem.pairs.size(); ++index) {
    const AttentionPair& pair = problem.pairs[index];
    const int64_t key_heads = pair.student_k.heads;
    const int64_t units = Blocks(pair, pair.teacher_heads == nullptr, pair.student_q.tokens).units;
    for (int64_t batch = 0; batch < pair.student_q.batch; ++batch) {
      for (int64_t unit = 0; unit < key_heads; unit += units) {
        tasks.push_back({int64_t(index), batch, unit, std::min(units, key_heads - unit), 0, 1,
                         nullptr, nullptr});
      }
    }
  }
  // Too few to keep all threads busy to the end: query rows are split too.
  const int64_t count = int64_t(tasks.size()), wanted = 4 * threads;
  if (threads == 1 || count == 0 || count >= wanted) return tasks;
  const int64_t splits = (wanted + count - 1) / count;
  std::vector<HeadsTask> split_tasks;
  for (const HeadsTask& task : tasks) {
    for (int64_t split = 0; split < splits; ++split) {
      split_tasks.push_back(task);
      split_tasks.back().split = split;
      split_tasks.back().splits = splits;
    }
  }
  return split_tasks;
}

}  // namespace

void attention_kl(const AttentionProblem& problem) {
  row_kernels();  // a wrong FAKD_ISA is refused here, not on some thread
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<HeadsTask> tasks = divide(problem, threads);
  const int64_t count = int64_t(tasks.size());
  std::vector<std::vector<double>> sums(count);
  std::vector<Scratch> partial(count);
  std::vector<double> cost(count);
  std::vector<int64_t> order(count);
  for (int64_t index = 0; index < count; ++index) {
    HeadsTask& task = tasks[index];
    const AttentionPair& pair = problem.pairs[task.pair];
    const int64_t tokens = pair.student_q.tokens, width = pair.student_q.width;
    sums[index].resize(pair.teacher_heads == nullptr ? 1 : pair.student_q.heads);
    task.sums = sums[index].data();
    if (task.splits > 1 && pair.grad_k.data != nullptr) {
      task.grad_k = partial[index].reserve(task.units * tokens * width);
    }
    cost[index] = double(tokens) * tokens * (3 * width + pair.teacher_q.width) * task.units *
                  (pair.student_q.heads / pair.student_k.heads) / task.splits;
    order[index] = index;
  }
  for (const AttentionPair& pair : problem.pairs) {
    for (const Heads* grad : {&pair.grad_q, &pair.grad_k}) {
      advise_huge_pages(
          grad->data,
          grad->batch * grad->heads * grad->tokens * grad->width * element_bytes(grad->dtype));
    }
  }
  std::stable_sort(
      order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
  const int64_t workers = std::max<int64_t>(1, std::min(threads, count));
  std::vector<TaskScratch> scratch(workers);
  run_tasks(count, workers, [&](int64_t place, int64_t worker) {
    TaskRun(problem, tasks[order[place]], scratch[worker]).run();
  });
  run_tasks(count, workers, [&](int64_t index, int64_t worker) {
    const HeadsTask& task = tasks[index];
    if (task.split > 0 || task.grad_k == nullptr) return;
    TaskRun(problem, task, scratch[worker]).add_splits(&task);
  });
  for (size_t index = 0; index < problem.pairs.size(); ++index) {
    const AttentionPair& pair = problem.pairs[index];
    const int64_t maps = pair.teacher_heads == nullptr ? 1 : pair.student_q.heads;
    for (int64_t head = 0; head < maps; ++head) {
      double total = 0;
      for (int64_t task = 0; task < count; ++task) {
        if (tasks[task].pair == int64_t(index)) total += sums[task][head];
      }
      pair.sums[head] = float(total);
    }
  }
}

}  // namespace fakd
