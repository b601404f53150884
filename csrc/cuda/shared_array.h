// An array in shared memory. The emulator of the tests has its own, which watches for races.
#pragma once

#ifndef FAKD_EMULATED
namespace fakd::cuda {

template <class T, int COUNT>
struct SharedArray {
  T items[COUNT];
  __device__ T& operator[](int index) { return items[index]; }
};

}  // namespace fakd::cuda
#endif
