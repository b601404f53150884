// Attention alignment on the CPU.
//
// A task is some student key heads of one batch entry, with all query heads that share them, or all
// heads where heads are averaged; and all query rows, or a range of them where there are few tasks.
// Blocks of query rows meet all keys they may attend to: one product per side gives the scores of
// all heads of the block, which stay in the cache; row kernels turn them into the distance and its
// gradient in place; two products give dQ and add to dK. Products are float32, or of bfloat16 queries
// and keys by tiles (attention_tiles.h).
//
// Per head, query row and allowed key: 2 (3 Ks + Kt) FLOPs and one power for each side. Averages of
// heads that would underflow are taken again from logarithms. Rows and keys of weight 0 are left out
// from the start, so padding costs nothing, and causal blocks cost half.

#include "attention_kl.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "attention_task.h"
#include "schedule.h"

namespace fakd {
namespace {

constexpr int64_t LEAST_SPLIT_ROWS = 64;      // of queries: each split packs the keys it meets anew
constexpr int64_t PARTIAL_BYTES = 256 << 20;  // of the keys' gradients of all splits

// Into how many ranges of query rows a task is split, where `wanted` more tasks each are needed to keep
// all threads busy to the end, and `least` to have one for every thread.
int64_t count_splits(const AttentionPair& pair, const HeadsTask& task, int64_t wanted, int64_t least) {
  const int64_t tokens = pair.student_q.tokens;
  const int64_t most = std::max<int64_t>(1, tokens / LEAST_SPLIT_ROWS);
  const int64_t bytes = task.units * tokens * pair.student_q.width * int64_t(sizeof(float));
  // Under a window splits meet few keys that others meet.
  if (pair.window < 0 && bytes > 0) {
    wanted = std::max(least, std::min(wanted, PARTIAL_BYTES / bytes));
  }
  return std::min(wanted, most);
}

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
  std::vector<HeadsTask> split_tasks;
  for (const HeadsTask& task : tasks) {
    const int64_t splits = count_splits(
        problem.pairs[task.pair], task, (wanted + count - 1) / count, (threads + count - 1) / count);
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
  std::vector<KeyPartial> partial(count);
  std::vector<double> cost(count);
  std::vector<int64_t> order(count);
  for (int64_t index = 0; index < count; ++index) {
    HeadsTask& task = tasks[index];
    const AttentionPair& pair = problem.pairs[task.pair];
    const int64_t tokens = pair.student_q.tokens, width = pair.student_q.width;
    sums[index].resize(pair.teacher_heads == nullptr ? 1 : pair.student_q.heads);
    task.sums = sums[index].data();
    if (task.splits > 1 && pair.grad_k.data != nullptr) {
      task.partial = &partial[index];
    }
    cost[index] = double(tokens) * tokens * (3 * width + pair.teacher_q.width) * task.units *
                  pair.group() / task.splits;
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
  std::vector<const HeadsTask*> firsts;  // of the splits of the same heads
  for (const HeadsTask& task : tasks) {
    if (task.split == 0 && task.partial != nullptr) firsts.push_back(&task);
  }
  // In as many parts as there are threads, of keys: of few heads too.
  run_tasks(int64_t(firsts.size()) * workers, workers, [&](int64_t place, int64_t worker) {
    const HeadsTask* first = firsts[place / workers];
    TaskRun(problem, *first, scratch[worker]).add_splits(first, place % workers, workers);
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
