// Elements of rows in global memory, as float32: 16 bytes at a time, or one by one.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fakd::cuda {

// A gradient waits for backward in float32 where the student is float16: it would underflow.
template <class X>
using GradOf = std::conditional_t<std::is_same_v<X, __half>, float, X>;

__device__ __forceinline__ float widen(float element) { return element; }
__device__ __forceinline__ float widen(__half element) { return __half2float(element); }
__device__ __forceinline__ float widen(__nv_bfloat16 element) { return __bfloat162float(element); }

__device__ __forceinline__ void narrow(float from, float* to) { *to = from; }
__device__ __forceinline__ void narrow(float from, __nv_bfloat16* to) {
  *to = __float2bfloat16_rn(from);
}

// COUNT elements as they lie in memory, where more than one begin on 16 bytes. A kernel loads many
// packets before it unpacks the first: what lies between two loads keeps the second waiting.
template <class E, int COUNT>
struct Packet {
  static_assert(COUNT == 1 || COUNT * sizeof(E) % 16 == 0);
  using One = std::conditional_t<sizeof(E) == 2, uint16_t, uint32_t>;
  using Word = std::conditional_t<COUNT == 1, One, uint4>;
  static constexpr int WORDS = COUNT * sizeof(E) / sizeof(Word);
  Word words[WORDS];

  __device__ __forceinline__ void clear() { memset(words, 0, sizeof(words)); }

  __device__ __forceinline__ void load(const E* from) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
  }

  __device__ __forceinline__ void unpack(float (&to)[COUNT]) const {
    E elements[COUNT];
    memcpy(elements, words, sizeof(words));
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = widen(elements[i]);
  }
};

template <int COUNT>
__device__ __forceinline__ void store(const float (&from)[COUNT], float* to) {
  if constexpr (COUNT == 1) {
    *to = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      *reinterpret_cast<float4*>(to + i) =
          make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    }
  }
}

template <int COUNT>
__device__ __forceinline__ void store(const float (&from)[COUNT], __nv_bfloat16* to) {
  if constexpr (COUNT == 1) {
    narrow(from[0], to);
  } else {
    static_assert(COUNT == 8);
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
      memcpy(&words[i], &pair, sizeof(pair));
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

template <class E>
__device__ __forceinline__ int to_alignment(const E* address) {
  return int(-reinterpret_cast<uintptr_t>(address) % 16 / sizeof(E));
}

// How many elements come before all three rows are aligned to 16 bytes together, or -1 where they
// never are. `grad` may be absent.
template <class X, class T, class G>
__device__ __forceinline__ int common_head(const X* student, const T* teacher, const G* grad) {
  int head = max(to_alignment(student), to_alignment(teacher));
  if (grad != nullptr) head = max(head, to_alignment(grad));
  const bool is_common = to_alignment(student + head) == 0 && to_alignment(teacher + head) == 0 &&
                         (grad == nullptr || to_alignment(grad + head) == 0);
  return is_common ? head : -1;
}

}  // namespace fakd::cuda
