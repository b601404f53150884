// One binary for every processor: the row kernels are compiled for each instruction set in a
// region of its own, and the best one is chosen once, at first use.

#include "row_kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "intrinsics.h"

namespace fakd {
namespace baseline {
#define FAKD_VECTOR_BYTES 16
#if defined(__aarch64__)
#define FAKD_ISA_NAME "neon"
#else
#define FAKD_ISA_NAME "baseline"
#endif
#include "row_kernels.inc"
#undef FAKD_VECTOR_BYTES
#undef FAKD_ISA_NAME
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define FAKD_VECTOR_BYTES 32
#define FAKD_ISA_NAME "avx2"
#define FAKD_STREAM(address, value) _mm256_stream_ps(address, (__m256)(value))
#define FAKD_MAX(a, b) _mm256_max_ps((__m256)(a), (__m256)(b))
#include "row_kernels.inc"
#undef FAKD_VECTOR_BYTES
#undef FAKD_ISA_NAME
#undef FAKD_STREAM
#undef FAKD_MAX
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")
#endif
namespace avx512 {
#define FAKD_VECTOR_BYTES 64
#define FAKD_ISA_NAME "avx512"
#define FAKD_STREAM(address, value) _mm512_stream_ps(address, (__m512)(value))
#define FAKD_MAX(a, b) _mm512_max_ps((__m512)(a), (__m512)(b))
#define FAKD_LARGEST(a) _mm512_reduce_max_ps((__m512)(a))
#define FAKD_SUM(a) _mm512_reduce_add_ps((__m512)(a))
#define FAKD_SCALE_BY_POWER(a, n) _mm512_scalef_ps((__m512)(a), (__m512)(n))
#define FAKD_LOAD_LANES(rest, x, lanes) \
  _mm512_mask_loadu_ps((__m512)(rest), __mmask16((1u << (lanes)) - 1), x)
#define FAKD_STORE_LANES(x, lanes, a) \
  _mm512_mask_storeu_ps(x, __mmask16((1u << (lanes)) - 1), (__m512)(a))
#include "row_kernels.inc"
#undef FAKD_VECTOR_BYTES
#undef FAKD_ISA_NAME
#undef FAKD_STREAM
#undef FAKD_MAX
#undef FAKD_LARGEST
#undef FAKD_SUM
#undef FAKD_SCALE_BY_POWER
#undef FAKD_LOAD_LANES
#undef FAKD_STORE_LANES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

namespace {

const RowKernels& choose() {
  const RowKernels* usable[3] = {};
  int count = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    usable[count++] = &avx512::KERNELS;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    usable[count++] = &avx2::KERNELS;
  }
#endif
  usable[count++] = &baseline::KERNELS;
  const char* wanted = std::getenv("FAKD_ISA");
  if (wanted == nullptr || *wanted == '\0') return *usable[0];
  std::string names;
  for (int index = 0; index < count; ++index) {
    if (std::strcmp(usable[index]->name, wanted) == 0) return *usable[index];
    names += std::string(index ? ", " : "") + usable[index]->name;
  }
  throw std::runtime_error(
      "FAKD_ISA must be an instruction set of this processor: got " + std::string(wanted) +
      "; choose one of " + names + " or unset it.");
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

enum class Products { library, packed, measured };

Products choose_products(const RowKernels& kernels) {
  const bool are_there = kernels.sum_depth > 0;
  const char* wanted = std::getenv("FAKD_PRODUCTS");
  if (wanted == nullptr || *wanted == '\0') return are_there ? Products::measured : Products::library;
  if (std::strcmp(wanted, "library") == 0) return Products::library;
  if (are_there && std::strcmp(wanted, "packed") == 0) return Products::packed;
  throw std::runtime_error(
      "FAKD_PRODUCTS must be library, or packed where the instruction set has them, which " +
      std::string(kernels.name) + (are_there ? " has" : " has not") + ": got " + wanted +
      "; choose one or unset it.");
}

struct Choice {
  const RowKernels& kernels = choose();
  Products products = choose_products(kernels);
};

const Choice& choice() {
  static const Choice made;
  return made;
}

}  // namespace

const RowKernels& row_kernels() { return choice().kernels; }
bool are_products_packed() { return choice().products != Products::library; }
bool are_feature_products_packed() {
  static const bool is_library_better = is_intel();
  return choice().products == Products::packed ||
         (choice().products == Products::measured && !is_library_better);
}

}  // namespace fakd
