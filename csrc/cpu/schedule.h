// How the work of a call is divided: whole pairs, or runs of rows within a pair, per thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

namespace fakd {

struct Task {
  int64_t pair;
  int64_t begin, end;  // counted rows of the pair
  double cost;         // any unit
};

// The latest finishing time if each task in turn goes to the least busy thread.
inline double makespan(const std::vector<Task>& tasks, int64_t threads) {
  std::vector<double> busy(threads, 0.0);
  for (const Task& task : tasks) *std::min_element(busy.begin(), busy.end()) += task.cost;
  return *std::max_element(busy.begin(), busy.end());
}

// Cut pairs into the fewest tasks that keep every thread busy to within 15 %, largest first. Cuts
// depend on sizes and the thread count alone, so results do not depend on timing. A pair is not cut
// below `least_rows`: each task sums a weight gradient of its own.
inline std::vector<Task> divide(
    const std::vector<int64_t>& rows, const std::vector<double>& cost_per_row, int64_t threads,
    int64_t least_rows, int64_t most_tasks) {
  double total = 0;
  for (size_t pair = 0; pair < rows.size(); ++pair) total += rows[pair] * cost_per_row[pair];
  std::vector<Task> best;
  for (int64_t goal = 1; goal <= 4 * threads; ++goal) {
    std::vector<Task> tasks;
    for (size_t pair = 0; pair < rows.size(); ++pair) {
      const double cost = rows[pair] * cost_per_row[pair];
      const int64_t share = total > 0 ? int64_t(goal * cost * rows.size() / total + 0.5) : 1;
      const int64_t most = std::max<int64_t>(1, rows[pair] / least_rows);
      const int64_t cuts = std::clamp<int64_t>(share, 1, most);
      for (int64_t cut = 0; cut < cuts; ++cut) {
        const int64_t begin = rows[pair] * cut / cuts, end = rows[pair] * (cut + 1) / cuts;
        tasks.push_back({int64_t(pair), begin, end, (end - begin) * cost_per_row[pair]});
      }
    }
    if (!best.empty() && int64_t(tasks.size()) > most_tasks) break;
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
      return a.cost > b.cost;
    });
    if (best.empty() || makespan(tasks, threads) < 0.99 * makespan(best, threads)) best = tasks;
    if (makespan(best, threads) <= 1.15 * total / threads) break;
  }
  return best;
}

// Run `work(task, worker)` for every task, each worker taking the next one when it is free.
template <class Work>
void run_tasks(int64_t count, int64_t workers, const Work& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < count; task = next++) work(task, worker);
    }
  });
}

}  // namespace fakd
