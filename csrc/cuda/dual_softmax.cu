// Launches of the dual-softmax family; the caller has set the device.

#include <cuda_runtime_api.h>

#include "dual_softmax_kernels.h"
#include "launch.h"

namespace fakd::cuda {
namespace {

template <Kind KIND>
void launch_rows(const ScoreParams& params, Distance distance, cudaStream_t stream) {
  if (params.blocks == 0) return;
  auto kernel = score_rows<Distance::kl, KIND>;
  if (distance == Distance::reverse_kl) kernel = score_rows<Distance::reverse_kl, KIND>;
  if (distance == Distance::jsd) kernel = score_rows<Distance::jsd, KIND>;
  if constexpr (KIND != Kind::logits) {
    if (distance == Distance::mse) kernel = score_rows<Distance::mse, KIND>;
  }
  kernel<<<params.blocks, THREADS, 0, stream>>>(params);
  check_launch("score_rows");
}

template <int TERMS>
void launch_sums(const ScoreParams& params, cudaStream_t stream) {
  sum_rows<TERMS><<<params.count, THREADS, 0, stream>>>(params);
  check_launch("sum_rows");
}

}  // namespace

void score_logits(
    const ScoreLine& line, const ScoreParams& all, Distance distance, void* stream) {
  for (const ScoreParams& params : plan({line}, all)) {
    launch_rows<Kind::logits>(params, distance, static_cast<cudaStream_t>(stream));
  }
}

void sum_logits(const ScoreLine& line, void* stream) {
  for (const ScoreParams& params : plan({line}, ScoreParams{})) {
    launch_sums<2>(params, static_cast<cudaStream_t>(stream));
  }
}

void score_maps(
    const std::vector<ScoreLine>& lines, const ScoreParams& all, Distance distance,
    bool are_scores, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  for (const ScoreParams& params : plan(lines, all)) {
    if (are_scores) launch_rows<Kind::scores>(params, distance, on);
    else launch_rows<Kind::probabilities>(params, distance, on);
    launch_sums<1>(params, on);
  }
}

}  // namespace fakd::cuda
