// Matrix products of the CPU engine: torch's own library, on blocks that fit the cache.
//
// Inside a parallel region the product runs on the calling thread; outside on all of them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <utility>

// Its richer message exists from torch 2.13 on.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fakd {

// A matrix in memory somebody else owns; strides in elements. bfloat16 travels as its 16 bits.
template <class Element>
struct MatrixOf {
  const Element* data;
  int64_t rows, columns, row_stride, column_stride;

  MatrixOf transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  MatrixOf some_rows(int64_t first, int64_t count) const {
    return {data + first * row_stride, count, columns, row_stride, column_stride};
  }
  MatrixOf some_columns(int64_t first, int64_t count) const {
    return {data + first * column_stride, rows, count, row_stride, column_stride};
  }
};
using Matrix = MatrixOf<float>;
using BfloatMatrix = MatrixOf<uint16_t>;

template <class Element>
MatrixOf<Element> row_major(const Element* data, int64_t rows, int64_t columns, int64_t stride) {
  return {data, rows, columns, stride, 1};
}
template <class Element>
MatrixOf<Element> row_major(const Element* data, int64_t rows, int64_t columns) {
  return row_major(data, rows, columns, columns);
}

// Equal matrices, a stride apart.
struct Stack {
  Matrix first;
  int64_t count, stride;

  Stack transposed() const { return {first.transposed(), count, stride}; }
};

inline int32_t torch_dtype(const float*) { return aoti_torch_dtype_float32(); }
inline int32_t torch_dtype(const uint16_t*) { return aoti_torch_dtype_bfloat16(); }

class Blob {
 public:
  template <class Element>
  explicit Blob(const MatrixOf<Element>& matrix) {
    const int64_t sizes[2] = {matrix.rows, matrix.columns};
    const int64_t strides[2] = {matrix.row_stride, matrix.column_stride};
    create(matrix.data, 2, sizes, strides);
  }
  explicit Blob(const Stack& stack) {
    const Matrix& first = stack.first;
    const int64_t sizes[3] = {stack.count, first.rows, first.columns};
    const int64_t strides[3] = {stack.stride, first.row_stride, first.column_stride};
    create(first.data, 3, sizes, strides);
  }
  ~Blob() { aoti_torch_delete_tensor_object(handle_); }
  Blob(const Blob&) = delete;
  Blob& operator=(const Blob&) = delete;
  AtenTensorHandle handle() const { return handle_; }

 private:
  template <class Element>
  void create(const Element* data, int64_t rank, const int64_t* sizes, const int64_t* strides) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob_v2(
        const_cast<Element*>(data), rank, sizes, strides, 0, torch_dtype(data),
        aoti_torch_device_type_cpu(), 0, &handle_, aoti_torch_layout_strided(), nullptr, 0));
  }

  AtenTensorHandle handle_ = nullptr;
};

// out = a b, or out += a b. `out` must not overlap a or b.
template <class Element>
void multiply(
    const MatrixOf<Element>& out, const MatrixOf<Element>& a, const MatrixOf<Element>& b,
    bool is_added = false) {
  if (out.rows == 0 || out.columns == 0) return;
  const Blob result(out), left(a), right(b);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(
      result.handle(), result.handle(), left.handle(), right.handle(), is_added ? 1.0 : 0.0, 1.0));
}

// The same for every matrix of a stack, in one call.
inline void multiply(const Stack& out, const Stack& a, const Stack& b, bool is_added = false) {
  if (out.count == 1) return multiply(out.first, a.first, b.first, is_added);
  if (out.count == 0 || out.first.rows == 0 || out.first.columns == 0) return;
  const Blob result(out), left(a), right(b);
  if (is_added) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(
        result.handle(), result.handle(), left.handle(), right.handle(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_bmm_out(result.handle(), left.handle(), right.handle()));
  }
}

// The lower triangle of a product known to be symmetric, in strips: two thirds of the time of the
// whole. `mirror` copies it above the diagonal. `product` multiplies, as `multiply` does.
template <class Product>
void multiply_symmetric(
    float* out, const Matrix& a, const Matrix& b, bool is_added, const Product& product) {
  constexpr int64_t STRIP = 64;
  const int64_t width = a.rows;
  for (int64_t begin = 0; begin < width; begin += STRIP) {
    const int64_t end = begin + STRIP < width ? begin + STRIP : width;
    product(
        row_major<float>(out + begin * width, end - begin, end, width),
        a.some_rows(begin, end - begin), b.some_columns(0, end), is_added);
  }
}

inline void mirror(float* square, int64_t width) {
  for (int64_t row = 0; row < width; ++row) {
    for (int64_t column = 0; column < row; ++column) {
      square[column * width + row] = square[row * width + column];
    }
  }
}

}  // namespace fakd
