// How the work of a call is divided among threads, whose cores may be unequally fast.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace fakd {

struct Task {
  int64_t pair;
  int64_t begin, end;  // counted rows of the pair
};

// Cut pairs into tasks, largest pairs first, each task at most a part of what is left by then: a
// thread whose core is slow, or shared, has taken less when all are done. Cuts depend on sizes and the
// thread count alone, so results do not depend on timing. A pair is not cut below `least_rows`, nor
// where tasks would be more than `most_tasks`: each sums a weight gradient of its own.
inline std::vector<Task> divide(
    const std::vector<int64_t>& rows, const std::vector<double>& cost_per_row, int64_t threads,
    int64_t least_rows, int64_t most_tasks) {
  std::vector<int64_t> order(rows.size());
  std::iota(order.begin(), order.end(), 0);
  const auto cost = [&](int64_t pair) { return rows[pair] * cost_per_row[pair]; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  double total = 0;
  for (int64_t pair : order) total += cost(pair);
  for (double share = 0.5 / threads;; share *= 2) {  // of what is left
    std::vector<Task> tasks;
    double left = total;
    for (int64_t pair : order) {
      const int64_t wanted = left > 0 ? int64_t(std::ceil(0.999 * cost(pair) / (share * left))) : 1;
      const int64_t cuts =
          std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, rows[pair] / least_rows));
      for (int64_t cut = 0; cut < cuts; ++cut) {
        tasks.push_back({pair, rows[pair] * cut / cuts, rows[pair] * (cut + 1) / cuts});
      }
      left -= cost(pair);
    }
    if (int64_t(tasks.size()) <= std::max<int64_t>(most_tasks, order.size()) || share > 1) return tasks;
  }
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
