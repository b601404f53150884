// Runs CUDA kernels on a CPU, from the lines that nvcc compiles, and watches them.
//
// Blocks run one after the other. The threads of a block are fibres on one thread of the CPU: each
// runs until it waits, at a barrier or with its warp, and goes on when all those it waits for have
// come to the same line. What ends a run with exit code 3 and a sentence:
//   divergence  threads that wait for threads which wait elsewhere, or have left the kernel
//   race        a word of shared memory that two threads touch with no barrier between, one writing
//   unwritten   a word of shared memory that is read before its block has written it
//   bounds      an index outside a shared array; elsewhere AddressSanitizer finds it
// A shuffle orders no memory: only __syncthreads and __syncwarp do.
#pragma once

#include <math.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if __has_include(<cuda_bf16.h>)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "half_types.h"
#endif

#define FAKD_EMULATED
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
using std::max;
using std::min;

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10;

[[noreturn]] inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "emulator: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  std::_Exit(3);
}

enum class State { ready, at_barrier, with_warp, done };

struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  State state = State::ready;
  Site site;              // where it waits
  unsigned mask = 0;      // of the lanes it waits for
  int source = 0;         // the lane it takes from
  bool is_fence = false;  // __syncwarp
  uint64_t given = 0, taken = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Machine {
  std::vector<Fibre> fibres;
  std::function<void()> kernel;
  int current = 0, blocks = 0;  // this thread; blocks begun so far
  uint64_t barriers = 0;        // passed by the block
  std::function<void()> suspect;  // fails at the next barrier, unless a race explains it before
  std::vector<uint64_t> warp_barriers;
  ucontext_t context;
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;

  Fibre& fibre() { return fibres[current]; }

  void resume(int thread) {
    current = thread;
    threadIdx.x = unsigned(thread);
    __sanitizer_start_switch_fiber(&fake_stack, fibre().stack.get(), STACK_BYTES);
    swapcontext(&context, &fibre().context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  void pause(bool is_last = false) {
    Fibre& self = fibre();
    __sanitizer_start_switch_fiber(is_last ? nullptr : &self.fake_stack, stack, stack_bytes);
    swapcontext(&self.context, &context);
    __sanitizer_finish_switch_fiber(self.fake_stack, &stack, &stack_bytes);
  }

  void wait(State state, Site site) {
    fibre().state = state;
    fibre().site = site;
    pause();
  }

  bool release_block() {
    const Fibre& first = fibres[0];
    for (const Fibre& other : fibres) {
      if (other.state != State::at_barrier || !(other.site == first.site)) return false;
    }
    for (Fibre& other : fibres) other.state = State::ready;
    if (suspect) suspect();
    ++barriers;
    return true;
  }

  bool release_warp(int warp) {
    bool is_any = false;
    const int begin = warp * WARP, end = std::min<int>(begin + WARP, int(fibres.size()));
    for (int thread = begin; thread < end; ++thread) {
      const Fibre& self = fibres[thread];
      if (self.state != State::with_warp) continue;
      bool is_complete = true;
      for (int lane = 0; lane < WARP; ++lane) {
        if (!(self.mask >> lane & 1)) continue;
        if (begin + lane >= end) fail("line %d waits for lane %d: none", self.site.line, lane);
        const Fibre& other = fibres[begin + lane];
        is_complete &= other.state == State::with_warp && other.site == self.site &&
                       other.mask == self.mask;
      }
      if (!is_complete) continue;
      const unsigned mask = self.mask;
      for (int lane = 0; lane < WARP; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Fibre& other = fibres[begin + lane];
        if (!(mask >> other.source & 1)) {
          fail("line %d: lane %d takes from lane %d, which is not in the mask", other.site.line,
               lane, other.source);
        }
        other.taken = fibres[begin + other.source].given;
        other.state = State::ready;
      }
      // A fence of some lanes orders these only: it is not counted, which errs on the safe side.
      warp_barriers[warp] += fibres[begin].is_fence && mask == 0xffffffffu;
      is_any = true;
    }
    return is_any;
  }

  [[noreturn]] void report_divergence() {
    const char* words[] = {"runs", "waits at a barrier", "waits for its warp", "has left"};
    const Fibre& first = fibres[0];
    for (size_t thread = 1; thread < fibres.size(); ++thread) {
      const Fibre& other = fibres[thread];
      if (other.state == first.state && other.site == first.site) continue;
      fail("divergence in block %u: thread 0 %s (line %d), thread %zu %s (line %d)", blockIdx.x,
           words[int(first.state)], first.site.line, thread, words[int(other.state)],
           other.site.line);
    }
    fail("divergence in block %u: all threads wait at line %d with unequal masks", blockIdx.x,
         first.site.line);
  }

  void run_block();
};

inline Machine machine;

inline void run_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack, &machine.stack_bytes);
  machine.kernel();
  machine.fibre().state = State::done;
  machine.pause(true);
}

inline void Machine::run_block() {
  ++blocks;
  ++barriers;
  for (Fibre& fibre : fibres) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = STACK_BYTES;
    fibre.context.uc_link = nullptr;
    fibre.state = State::ready;
    makecontext(&fibre.context, run_thread, 0);
  }
  for (;;) {
    for (size_t thread = 0; thread < fibres.size(); ++thread) {
      if (fibres[thread].state == State::ready) resume(int(thread));
    }
    bool is_any = release_block(), is_done = true;
    for (size_t warp = 0; warp < warp_barriers.size(); ++warp) is_any |= release_warp(int(warp));
    for (const Fibre& fibre : fibres) is_done &= fibre.state == State::done;
    if (is_done && suspect) suspect();
    if (is_done) return;
    if (!is_any) report_divergence();
  }
}

// kernel<<<blocks, threads>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  machine.kernel = [=] { kernel(arguments...); };
  machine.fibres = std::vector<Fibre>(threads);
  machine.warp_barriers.assign((threads + WARP - 1) / WARP, 0);
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    machine.run_block();
  }
}

template <class T>
T exchange(unsigned mask, T value, int source, Site site, bool is_fence = false) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fibre& self = machine.fibre();
  if (!(mask >> machine.current % WARP & 1)) fail("line %d: a lane outside its mask", site.line);
  self.mask = mask;
  self.source = source & (WARP - 1);
  self.is_fence = is_fence;
  std::memcpy(&self.given, &value, sizeof(T));
  machine.wait(State::with_warp, site);
  std::memcpy(&value, &self.taken, sizeof(T));
  return value;
}

inline int lane() { return machine.current % WARP; }

}  // namespace emulator

#define FAKD_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FAKD_SITE) {
  emulator::machine.wait(emulator::State::at_barrier, {file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, FAKD_SITE) {
  emulator::exchange(mask, 0, emulator::lane(), {file, line}, true);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, FAKD_SITE) {
  return emulator::exchange(mask, value, source, {file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, FAKD_SITE) {
  return emulator::exchange(mask, value, emulator::lane() ^ bits, {file, line});
}

// Beyond the last lane a thread keeps its own value.
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, FAKD_SITE) {
  const int lane = emulator::lane(), source = lane + delta;
  return emulator::exchange(mask, value, source < emulator::WARP ? source : lane, {file, line});
}

template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "sums of floats depend on the order of atomics");
  const T before = *address;
  *address = T(before + value);
  return before;
}

#include "emulated_shared_array.h"
