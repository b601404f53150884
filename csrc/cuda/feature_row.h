// One row of student and teacher in the registers of its threads, and the sums of many rows.
// Compiled by nvcc, and by the tests for a CPU.
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
// first chunk, fewer than COUNT after the last. Chunks go to the threads in turn. A thread writes
// only where it has read, so that a gradient of the student's dtype may replace the student.
template <class X, class T, class G, int COUNT>
class Row {
 public:
  __device__ __forceinline__ Row(
      const X* student, const T* teacher, G* grad, int width, int head, bool is_counted,
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
  static constexpr bool IS_FLOAT_OCTET = COUNT == 8 && sizeof(X) == 4 && sizeof(T) == 4;
  static constexpr int HELD =
      COUNT == 1 ? LOOSE_ELEMENTS : (IS_FLOAT_OCTET ? ELEMENTS_OF_OCTETS : ELEMENTS);
  static constexpr int CHUNKS = HELD / COUNT;

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
  G* grad_;
  const Team& team_;
  int head_, chunks_, loose_place_;
  bool is_counted_, has_loose_;
  float loose_student_ = 0, loose_teacher_ = 0;
  Packet<X, COUNT> students_[CHUNKS];
  Packet<T, COUNT> teachers_[CHUNKS];
};

// What a row is compared with, besides its elements.
struct RowTask {
  int width;
  float weight;        // of the row
  const float* gains;  // of its pair: of the cosine and of the Euclidean term
  bool is_squared;
  float eps;
};

// Weighted values of one row, whose gradient is written unless `grad` is nullptr.
template <class X, class T, class G, int COUNT>
__device__ __forceinline__ float2 compare_row(
    const X* student, const T* teacher, G* grad, const RowTask& task, int head, const Team& team) {
  Row<X, T, G, COUNT> elements(student, teacher, grad, task.width, head, task.weight != 0, team);
  float sums[SUMS] = {};
  elements.read(sums);
  RowTerms terms;
  if (task.weight != 0) {
    terms = row_terms(
        sums, task.weight * task.gains[0], task.weight * task.gains[1], task.is_squared,
        float(task.width), task.eps);
  }
  if (grad != nullptr) elements.write_grad(terms);
  return make_float2(task.weight * terms.cosine, task.weight * terms.euclidean);
}

template <class X, class T, class G>
__device__ __forceinline__ float2 compare_row(
    const X* student, const T* teacher, G* grad, const RowTask& task, const Team& team) {
  constexpr bool IS_FLOAT = sizeof(X) == 4 && sizeof(T) == 4 && sizeof(G) == 4;
  constexpr int COUNT = IS_FLOAT ? 4 : 8;  // one load of the narrowest
  const int head = common_head(student, teacher, grad);
  return head >= 0 ? compare_row<X, T, G, COUNT>(student, teacher, grad, task, head, team)
                   : compare_row<X, T, G, 1>(student, teacher, grad, task, 0, team);
}

// A block adds `count` pairs of values, in an order that depends on their number alone.
__device__ __forceinline__ void add_values(
    const float* values, int64_t count, float* to, SharedArray<double, WARPS * 2>& sums) {
  const int thread = int(threadIdx.x);
  double cosine = 0, euclidean = 0;
  for (int64_t place = thread; place < count; place += THREADS) {
    cosine += values[2 * place];
    euclidean += values[2 * place + 1];
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
    to[thread] = float(total);
  }
}

}  // namespace fakd::cuda
