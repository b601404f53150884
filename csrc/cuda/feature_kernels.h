// The kernels of feature_alignment.h. Compiled by nvcc, and by the tests for a CPU.
#pragma once

#include "elements.h"
#include "feature_alignment.h"
#include "feature_terms.h"
#include "shared_array.h"
#include "warp.h"

namespace fakd::cuda {

// The threads that share a row: a warp, or the whole block.
struct Team {
  int size, member;
  SharedArray<float, WARPS * SUMS>& shared;

  // Every thread receives the sums of all, the same bits. Once per block.
  __device__ __forceinline__ void add_up(float (&sums)[SUMS]) const {
#pragma unroll
    for (float& sum : sums) sum = sum_of_warp(sum);
    if (size == WARP_SIZE) return;
    if (threadIdx.x % WARP_SIZE == 0) {
      for (int k = 0; k < SUMS; ++k) shared[threadIdx.x / WARP_SIZE * SUMS + k] = sums[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < SUMS; ++k) {
      sums[k] = 0;
      for (int warp = 0; warp < WARPS; ++warp) sums[k] += shared[warp * SUMS + k];
    }
  }
};

// One row. COUNT elements make a chunk, which is loaded at once; `head` elements come before the
// first chunk, fewer than COUNT after the last. Chunks go to the threads in turn.
template <class X, class T, int COUNT>
class Row {
 public:
  __device__ __forceinline__ Row(
      const X* student, const T* teacher, GradOf<X>* grad, int width, int head, bool is_counted,
      const Team& team)
      : student_(student), teacher_(teacher), grad_(grad), team_(team), head_(head),
        chunks_((width - head) / COUNT), is_counted_(is_counted) {
    const int loose = width - chunks_ * COUNT;
    has_loose_ = team.member < loose;
    loose_place_ = team.member < head ? team.member : chunks_ * COUNT + team.member;
  }

  // Reads the row, if it counts; sums are those of all its elements. The last tile stays here.
  __device__ __forceinline__ void read(float (&sums)[SUMS]) {
    if (has_loose_ && is_counted_) {
      loose_student_ = widen(student_[loose_place_]);
      loose_teacher_ = widen(teacher_[loose_place_]);
      add_element(loose_student_, loose_teacher_, sums);
    }
    for (int tile = 0; tile < tiles(); ++tile) {
      read_tile(tile);
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
        float p[COUNT], t[COUNT];
        students_[i].unpack(p);
        teachers_[i].unpack(t);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) add_element(p[j], t[j], sums);
      }
    }
    team_.add_up(sums);
  }

  __device__ __forceinline__ void write_grad(const RowTerms& terms) {
    if (has_loose_) {
      narrow(gradient(loose_student_, loose_teacher_, terms), grad_ + loose_place_);
    }
    for (int tile = tiles() - 1; tile >= 0; --tile) {
      if (tile != tiles() - 1) read_tile(tile);
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
        const int chunk = place(tile, i);
        if (chunk >= chunks_) continue;
        float p[COUNT], t[COUNT];
        students_[i].unpack(p);
        teachers_[i].unpack(t);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) p[j] = gradient(p[j], t[j], terms);
        store(p, grad_ + head_ + chunk * COUNT);
      }
    }
  }

 private:
  static constexpr int CHUNKS = (COUNT == 1 ? LOOSE_ELEMENTS : ELEMENTS) / COUNT;

  __device__ __forceinline__ int tiles() const {
    return (chunks_ + team_.size * CHUNKS - 1) / (team_.size * CHUNKS);
  }

  __device__ __forceinline__ int place(int tile, int i) const {
    return (tile * CHUNKS + i) * team_.size + team_.member;
  }

  // Zeros where there is nothing to read.
  __device__ __forceinline__ void read_tile(int tile) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      students_[i].clear();
      teachers_[i].clear();
      const int chunk = place(tile, i);
      if (chunk < chunks_ && is_counted_) {
        students_[i].load(student_ + head_ + chunk * COUNT);
        teachers_[i].load(teacher_ + head_ + chunk * COUNT);
      }
    }
  }

  static __device__ __forceinline__ float gradient(float p, float t, const RowTerms& terms) {
    return terms.along_difference * (p - t) + (terms.along_student * p + terms.along_teacher * t);
  }

  const X* student_;
  const T* teacher_;
  GradOf<X>* grad_;
  const Team& team_;
  int head_, chunks_, loose_place_;
  bool is_counted_, has_loose_;
  float loose_student_ = 0, loose_teacher_ = 0;
  Packet<X, COUNT> students_[CHUNKS];
  Packet<T, COUNT> teachers_[CHUNKS];
};

// Weighted values of one row, whose gradient is written.
template <class X, class T, int COUNT>
__device__ __forceinline__ float2 align_row(
    const FeatureParams& params, int pair, int64_t row, int head, const Team& team) {
  const FeatureLine& line = params.lines[pair];
  GradOf<X>* grad = static_cast<GradOf<X>*>(line.grad);
  const float weight = line.row_weights == nullptr ? 1.0f : line.row_weights[row];
  Row<X, T, COUNT> elements(
      static_cast<const X*>(line.student) + row * line.student_stride,
      static_cast<const T*>(line.teacher) + row * line.teacher_stride,
      grad == nullptr ? nullptr : grad + row * line.width, line.width, head, weight != 0, team);
  float sums[SUMS] = {};
  elements.read(sums);
  RowTerms terms;
  if (weight != 0) {
    terms = row_terms(
        sums, weight * params.coefficients[2 * pair], weight * params.coefficients[2 * pair + 1],
        params.is_squared, float(line.width), params.eps);
  }
  if (grad != nullptr) elements.write_grad(terms);
  return make_float2(weight * terms.cosine, weight * terms.euclidean);
}

template <class X, class T>
__device__ __forceinline__ float2 align_row(
    const FeatureParams& params, int pair, int64_t row, const Team& team) {
  constexpr int COUNT = sizeof(X) == 4 && sizeof(T) == 4 ? 4 : 8;  // one load of the narrower
  const FeatureLine& line = params.lines[pair];
  const GradOf<X>* grad = static_cast<const GradOf<X>*>(line.grad);
  const int head = common_head(
      static_cast<const X*>(line.student) + row * line.student_stride,
      static_cast<const T*>(line.teacher) + row * line.teacher_stride,
      grad == nullptr ? nullptr : grad + row * line.width);
  return head >= 0 ? align_row<X, T, COUNT>(params, pair, row, head, team)
                   : align_row<X, T, 1>(params, pair, row, 0, team);
}

template <class X>
__device__ __forceinline__ float2 align_row(
    const FeatureParams& params, int pair, int64_t row, const Team& team) {
  switch (params.lines[pair].teacher_dtype) {
    case Dtype::float16: return align_row<X, __half>(params, pair, row, team);
    case Dtype::bfloat16: return align_row<X, __nv_bfloat16>(params, pair, row, team);
    default: return align_row<X, float>(params, pair, row, team);
  }
}

// A block takes one wide row, or as many rows as it has warps.
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
    align_rows(const __grid_constant__ FeatureParams params) {
  __shared__ SharedArray<float, WARPS * SUMS> sums;
  __shared__ SharedArray<float, WARPS * 2> values;
  const int thread = int(threadIdx.x), warp = thread / WARP_SIZE;
  const int pair = find_line(params, int(blockIdx.x));
  const FeatureLine& line = params.lines[pair];
  const int64_t block = int(blockIdx.x) - line.first_block;
  const bool is_wide = line.width > WIDEST_OF_WARP;
  const Team team{is_wide ? THREADS : WARP_SIZE, is_wide ? thread : thread % WARP_SIZE, sums};
  const int64_t row = is_wide ? block : block * WARPS + warp;

  float2 value = make_float2(0, 0);
  if (row < line.rows) {
    switch (line.student_dtype) {
      case Dtype::float16: value = align_row<__half>(params, pair, row, team); break;
      case Dtype::bfloat16: value = align_row<__nv_bfloat16>(params, pair, row, team); break;
      default: value = align_row<float>(params, pair, row, team);
    }
  }
  if (thread % WARP_SIZE == 0) {
    values[2 * warp] = value.x;
    values[2 * warp + 1] = value.y;
  }
  __syncthreads();
  if (thread < 2) {
    float total = 0;
    for (int i = 0; i < (is_wide ? 1 : WARPS); ++i) total += values[2 * i + thread];
    params.slots[2 * int64_t(blockIdx.x) + thread] = total;
  }
}

// A block adds the slots of one pair, in an order that depends on their number alone.
__global__ void __launch_bounds__(THREADS) sum_slots(const __grid_constant__ FeatureParams params) {
  __shared__ SharedArray<double, WARPS * 2> sums;
  const int pair = int(blockIdx.x), thread = int(threadIdx.x);
  const int begin = params.lines[pair].first_block;
  const int end = pair + 1 < params.count ? params.lines[pair + 1].first_block : params.blocks;
  double cosine = 0, euclidean = 0;
  for (int64_t slot = int64_t(begin) + thread; slot < end; slot += THREADS) {
    cosine += params.slots[2 * slot];
    euclidean += params.slots[2 * slot + 1];
  }
  cosine = sum_of_warp(cosine);
  euclidean = sum_of_warp(euclidean);
  if (thread % WARP_SIZE == 0) {
    sums[thread / WARP_SIZE * 2] = cosine;
    sums[thread / WARP_SIZE * 2 + 1] = euclidean;
  }
  __syncthreads();
  if (thread < 2) {
    double total = 0;
    for (int warp = 0; warp < WARPS; ++warp) total += sums[2 * warp + thread];
    params.sums[2 * pair + thread] = float(total);
  }
}

}  // namespace fakd::cuda
