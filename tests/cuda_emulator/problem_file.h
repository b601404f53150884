// What the programs of this folder read their problems with.
// Every tensor has memory of its own, exactly as large as it is, so that AddressSanitizer sees a
// step beyond.
#pragma once

#include "launch_shape.h"

namespace {

using fakd::cuda::Dtype;

struct Memory {
  std::vector<std::unique_ptr<char[]>> all;

  // Begins `offset` bytes after a multiple of 16; NaN in every dtype until it is written.
  char* allocate(size_t bytes, size_t offset) {
    all.emplace_back(new char[bytes + offset]);
    std::memset(all.back().get(), 0xff, bytes + offset);
    return all.back().get() + offset;
  }
};

size_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

void check(bool is_good, const char* words) {
  if (!is_good) emulator::fail("%s", words);
}

void read(std::FILE* file, void* to, size_t bytes) {
  check(std::fread(to, 1, bytes, file) == bytes, "the problem ends too early");
}

int64_t read_number(std::FILE* file) {
  int64_t number;
  read(file, &number, sizeof(number));
  return number;
}

struct Tensor {
  char* data;
  Dtype dtype;
  int64_t stride;
};

Tensor read_tensor(std::FILE* file, Memory& memory, int64_t rows, int64_t width) {
  Tensor tensor;
  tensor.dtype = Dtype(read_number(file));
  tensor.stride = read_number(file);
  const size_t offset = size_t(read_number(file));
  const int64_t count = rows == 0 ? 0 : (rows - 1) * tensor.stride + width;
  const size_t bytes = size_t(count) * element_bytes(tensor.dtype);
  tensor.data = memory.allocate(bytes, offset);
  read(file, tensor.data, bytes);
  return tensor;
}

}  // namespace
