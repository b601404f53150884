// Feature alignment on the CPU.
//
// Blocks of rows pass through the cache once: products by torch's library, row kernels between
// them. Per row, with E = 4 bytes:
//   none    reads (Ds + Dt) E, writes Ds E; 1 pass
//   direct  6 Ds Dt FLOPs; the projected block is reused and stays in the cache
//   gram    4 Ds Dt + 4 Ds^2 FLOPs; no projected block at all
// The gram route serves where it is as accurate as the direct one (feature_products.h).

#include "feature_alignment.h"

#include <algorithm>

#include "feature_bfloat16.h"
#include "feature_products.h"
#include "feature_rows.h"
#include "schedule.h"

namespace fakd {
namespace {

// Memory for a task's share of the weight gradients. The first task of a projection uses the
// result itself where that is float32.
void allocate_totals(const FeaturePair& pair, float* result, Totals& totals) {
  const int64_t ds = pair.student.columns, dt = pair.teacher.columns;
  if (pair.grad_projection >= 0) {
    totals.wide = result != nullptr ? result : totals.wide_memory.reserve(dt * ds);
    if (pair.route == Route::gram) {
      totals.narrow = totals.narrow_memory.reserve(ds * ds);
      totals.diagonal = totals.diagonal_memory.reserve(ds);
      std::memset(totals.diagonal, 0, ds * sizeof(float));
    }
  }
  if (pair.grad_bias >= 0) {
    totals.bias = totals.bias_memory.reserve(dt);
    std::memset(totals.bias, 0, dt * sizeof(float));
  }
}

void add_in_order(float* to, const float* from, int64_t count) {
  torch::stable::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    row_kernels().add_scaled(from + begin, 1.0f, end - begin, to + begin);
  });
}

void finish_projection(
    const Rows& result, const std::vector<Totals*>& shares, const Matrix& projection) {
  const int64_t count = result.rows * result.columns, ds = result.columns;
  float *wide = nullptr, *narrow = nullptr, *diagonal = nullptr;
  for (Totals* share : shares) {
    if (share->is_wide_started) {
      if (wide == nullptr) wide = share->wide;
      else add_in_order(wide, share->wide, count);
    }
    if (share->is_narrow_started) {
      if (narrow == nullptr) {
        narrow = share->narrow;
        diagonal = share->diagonal;
      } else {
        add_in_order(narrow, share->narrow, ds * ds);
        add_in_order(diagonal, share->diagonal, ds);
      }
    }
  }
  if (wide != nullptr && narrow != nullptr) {
    mirror(narrow, ds);
    for (int64_t column = 0; column < ds; ++column) narrow[column * ds + column] = 0;
    multiply(row_major(wide, result.rows, ds), projection, row_major(narrow, ds, ds), true);
    for (int64_t row = 0; row < result.rows; ++row) {
      const float* w = projection.data + row * projection.row_stride;
      row_kernels().add_product(w, diagonal, ds, wide + row * ds);
    }
  }
  for (int64_t row = 0; row < result.rows; ++row) {
    if (wide == nullptr) {  // no row counted
      clear_row(result, row);
    } else if (result.dtype != Dtype::float32 || wide != result.data) {
      write_row(row_kernels(), wide + row * ds, result, row);
    }
  }
}

void finish_bias(const Rows& result, const std::vector<Totals*>& shares) {
  Scratch memory(result.columns);
  std::memset(memory.get(), 0, result.columns * sizeof(float));
  for (const Totals* share : shares) add_in_order(memory.get(), share->bias, result.columns);
  write_row(row_kernels(), memory.get(), result, 0);
}

double cost_per_row(const FeaturePair& pair) {
  const double ds = double(pair.student.columns), dt = double(pair.teacher.columns);
  return pair.route == Route::none ? dt : ds * dt * (pair.route == Route::gram ? 4 : 6);
}

int64_t block_rows(const FeaturePair& pair) {
  if (pair.route == Route::gram) return GRAM_ROWS;
  const int64_t affordable = DIRECT_BYTES / 4 / std::max<int64_t>(1, pair.teacher.columns);
  return std::clamp(affordable, LEAST_DIRECT_ROWS, DIRECT_ROWS);
}

}  // namespace

void feature_alignment(const FeatureProblem& problem) {
  row_kernels();  // a wrong FAKD_ISA is refused here, not on some thread
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<CountedRows> counted;
  std::vector<std::unique_ptr<LazyWeights>> weights;
  std::vector<int64_t> rows;
  std::vector<double> costs;
  double share_bytes = 0, wide_bytes = 0;
  for (const FeaturePair& pair : problem.pairs) {
    const bool is_projected = pair.route != Route::none;
    counted.emplace_back(pair.student.rows, is_projected ? pair.row_weights : nullptr);
    weights.emplace_back(is_projected ? new LazyWeights(pair) : nullptr);
    rows.push_back(counted.back().count());
    costs.push_back(cost_per_row(pair));
    const Rows& grad = pair.grad_student;
    advise_huge_pages(grad.data, grad.rows * grad.columns * element_bytes(grad.dtype));
    zero_uncounted(pair.grad_student, pair.row_weights);
    if (pair.grad_projection >= 0) {
      share_bytes = std::max(share_bytes, 4.0 * pair.projection.rows * pair.projection.columns);
    }
    wide_bytes += 4.0 * pair.teacher.rows * pair.teacher.columns;
  }

  // Every task sums a weight gradient of its own. Where many cores would make that larger than a
  // quarter of what eager stores, pairs go one after the other and the products use the cores.
  const int64_t count = int64_t(problem.pairs.size());
  const double budget = std::max(64.0 * (1 << 20), wide_bytes / 4);
  const int64_t affordable =
      share_bytes > 0 ? std::max<int64_t>(count, int64_t(budget / share_bytes)) : 64 * threads;
  std::vector<Task> tasks = divide(rows, costs, threads, 128, affordable);
  const bool is_parallel = int64_t(tasks.size()) >= threads || count >= threads;
  if (!is_parallel) tasks = divide(rows, costs, 1, 128, count);

  std::vector<Totals> totals(tasks.size());
  std::vector<std::vector<Totals*>> projection_shares(problem.grad_projections.size());
  std::vector<std::vector<Totals*>> bias_shares(problem.grad_biases.size());
  for (size_t index = 0; index < tasks.size(); ++index) {
    const FeaturePair& pair = problem.pairs[tasks[index].pair];
    float* result = nullptr;
    if (pair.grad_projection >= 0) {
      const Rows& grad = problem.grad_projections[pair.grad_projection];
      auto& shares = projection_shares[pair.grad_projection];
      if (shares.empty() && grad.dtype == Dtype::float32) result = static_cast<float*>(grad.data);
      shares.push_back(&totals[index]);
    }
    if (pair.grad_bias >= 0) bias_shares[pair.grad_bias].push_back(&totals[index]);
    allocate_totals(pair, result, totals[index]);
  }

  const int64_t workers = is_parallel ? std::min<int64_t>(threads, int64_t(tasks.size())) : 1;
  std::vector<BlockScratch> scratch(workers);
  for (BlockScratch& room : scratch) room.is_alone = !is_parallel;
  run_tasks(int64_t(tasks.size()), workers, [&](int64_t index, int64_t worker) {
    const Task& task = tasks[index];
    const FeaturePair& pair = problem.pairs[task.pair];
    if (pair.route == Route::none) {
      RowComparison(problem, pair, scratch[worker].student, totals[index])
          .run(task.begin, task.end);
    } else {
      LazyWeights& shared = *weights[task.pair];
      std::unique_ptr<BlockTask> blocks;
      if (is_bfloat16(pair)) {
        blocks = std::make_unique<BfloatTask>(
            problem, pair, shared, counted[task.pair], scratch[worker], totals[index]);
      } else {
        blocks = std::make_unique<FloatTask>(
            problem, pair, shared, counted[task.pair], scratch[worker], totals[index]);
      }
      const int64_t rows_at_once = block_rows(pair);
      blocks->run(task.begin, task.end, is_parallel ? rows_at_once : threads * rows_at_once);
      if (pair.grad_projection >= 0 && projection_shares[pair.grad_projection].size() == 1) {
        finish_projection(
            problem.grad_projections[pair.grad_projection], {&totals[index]},
            shared.get().projection);
      }
    }
  });

  std::vector<double> sums(2 * problem.pairs.size(), 0.0);
  std::vector<const Matrix*> projections(problem.grad_projections.size(), nullptr);
  for (size_t index = 0; index < tasks.size(); ++index) {
    sums[2 * tasks[index].pair] += totals[index].cosine;
    sums[2 * tasks[index].pair + 1] += totals[index].euclidean;
    const FeaturePair& pair = problem.pairs[tasks[index].pair];
    if (pair.grad_projection >= 0) {
      projections[pair.grad_projection] = &weights[tasks[index].pair]->get().projection;
    }
  }
  for (size_t index = 0; index < sums.size(); ++index) problem.sums[index] = float(sums[index]);
  for (size_t index = 0; index < problem.grad_projections.size(); ++index) {
    if (projection_shares[index].size() == 1) continue;  // its task has finished it
    finish_projection(
        problem.grad_projections[index], projection_shares[index], *projections[index]);
  }
  for (size_t index = 0; index < problem.grad_biases.size(); ++index) {
    finish_bias(problem.grad_biases[index], bias_shares[index]);
  }
}

}  // namespace fakd
