// One binary for every processor: the row kernels are compiled for each instruction set in a
// region of its own, and the best one is chosen once, at first use.

#include "row_kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "intrinsics.h"

#ifdef FAKD_HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#define FAKD_FRACTION(a) _mm512_reduce_ps((__m512)(a), 8)  // a less the nearest integer
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
#undef FAKD_FRACTION
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

#ifdef FAKD_HAS_TILES
// The processor has matrix tiles, and the system lets this process use them.
bool has_tiles() {
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & AMX_BF16) == 0 || (edx & AMX_TILE) == 0) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

struct InstructionSet {
  const char* name;
  const RowKernels* kernels;
  BfloatUnit unit;
};

InstructionSet choose() {
  std::vector<InstructionSet> usable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    usable.push_back({"avx512", &avx512::KERNELS, BfloatUnit::none});
#ifdef FAKD_HAS_TILES
    if (__builtin_cpu_supports("avx512bf16")) {
      // Half as fast as products in float32 on a Sapphire Rapids class Xeon, where a dot product took
      // 0.73 ns and a multiply-add 0.18 (2026-11); twice as fast where both take a cycle, as AMD's do by
      // their tables: not measured.
      const auto place = is_intel() ? usable.end() : usable.begin();
      usable.insert(place, {"avx512_bf16", &avx512::KERNELS, BfloatUnit::dots});
      if (has_tiles()) {
        usable.insert(usable.begin(), {"amx_bf16", &avx512::KERNELS, BfloatUnit::tiles});
      }
    }
#endif
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    usable.push_back({"avx2", &avx2::KERNELS, BfloatUnit::none});
  }
#endif
  usable.push_back({baseline::KERNELS.name, &baseline::KERNELS, BfloatUnit::none});
  const char* wanted = std::getenv("FAKD_ISA");
  if (wanted == nullptr || *wanted == '\0') return usable[0];
  std::string names;
  for (const InstructionSet& set : usable) {
    if (std::strcmp(set.name, wanted) == 0) return set;
    names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::runtime_error(
      "FAKD_ISA must be an instruction set of this processor: got " + std::string(wanted) +
      "; choose one of " + names + " or unset it.");
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
  InstructionSet set = choose();
  Products products = choose_products(*set.kernels);
};

const Choice& choice() {
  static const Choice made;
  return made;
}

}  // namespace

const RowKernels& row_kernels() { return *choice().set.kernels; }
const char* instruction_set() { return choice().set.name; }
BfloatUnit bfloat_unit() { return are_products_packed() ? choice().set.unit : BfloatUnit::none; }
bool are_products_packed() { return choice().products != Products::library; }
bool are_feature_products_packed() {
  static const bool is_library_better = is_intel();
  return choice().products == Products::packed ||
         (choice().products == Products::measured && !is_library_better);
}

}  // namespace fakd
