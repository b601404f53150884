// Rows of both sides in global memory, swept eight elements at a time.
#pragma once

#include "dual_softmax.h"
#include "elements.h"

namespace fakd::cuda {

constexpr int OCTET = 8;  // 16 bytes of half precision, 32 of float32
// Of each side in the registers of a thread. The arithmetic takes more of them than that of feature
// alignment: with twice as many octets, 128 registers spill.
constexpr int OCTETS = 2;
constexpr float LEAST_SCORE = -1e30f;  // what -inf counts as in a map: differences must exist

// Eight elements as they lie in memory: half precision fills the first word only.
struct Octet {
  uint4 words[2];
};

// A row of one tensor. Its dtype is told at run time, by branches that all threads take alike: one
// kernel serves every pair of dtypes.
class Strip {
 public:
  __device__ __forceinline__ Strip(
      const ScoreRows& rows, Dtype dtype, int64_t batch, int64_t row)
      : bytes_(dtype == Dtype::float32 ? 4 : 2), dtype_(dtype) {
    const int64_t place = batch * rows.batch_stride + row * rows.row_stride;
    address_ = rows.data == nullptr ? nullptr : static_cast<char*>(rows.data) + place * bytes_;
  }

  __device__ __forceinline__ bool exists() const { return address_ != nullptr; }

  // How many elements come before the first that begins on 16 bytes.
  __device__ __forceinline__ int head() const {
    return exists() ? int(-reinterpret_cast<uintptr_t>(address_) % 16) / bytes_ : 0;
  }

  // Whether octets that begin `head` elements into the row are aligned.
  __device__ __forceinline__ void align(int head) {
    is_aligned_ = reinterpret_cast<uintptr_t>(address_ + head * bytes_) % 16 == 0;
  }
  __device__ __forceinline__ bool is_aligned() const { return is_aligned_; }

  // A whole, aligned octet.
  __device__ __forceinline__ void load(int column, Octet& to) const {
    const uint4* from = reinterpret_cast<const uint4*>(at(column));
    to.words[0] = from[0];
    if (bytes_ == 4) to.words[1] = from[1];
  }

  __device__ __forceinline__ void unpack(const Octet& from, float (&to)[OCTET]) const {
    switch (dtype_) {
      case Dtype::float16: unpack<__half>(from, to); break;
      case Dtype::bfloat16: unpack<__nv_bfloat16>(from, to); break;
      default: unpack<float>(from, to);
    }
  }

  __device__ __forceinline__ float element(int column) const {
    switch (dtype_) {
      case Dtype::float16: return widen(*reinterpret_cast<const __half*>(at(column)));
      case Dtype::bfloat16: return widen(*reinterpret_cast<const __nv_bfloat16*>(at(column)));
      default: return *reinterpret_cast<const float*>(at(column));
    }
  }

  // Of a gradient, which is float32 or bfloat16.
  __device__ __forceinline__ void store_octet(int column, const float (&from)[OCTET]) const {
    if (dtype_ == Dtype::float32) store(from, reinterpret_cast<float*>(at(column)));
    else store(from, reinterpret_cast<__nv_bfloat16*>(at(column)));
  }
  __device__ __forceinline__ void store_element(int column, float from) const {
    if (dtype_ == Dtype::float32) narrow(from, reinterpret_cast<float*>(at(column)));
    else narrow(from, reinterpret_cast<__nv_bfloat16*>(at(column)));
  }

 private:
  __device__ __forceinline__ char* at(int column) const {
    return address_ + int64_t(column) * bytes_;
  }

  template <class E>
  static __device__ __forceinline__ void unpack(const Octet& from, float (&to)[OCTET]) {
    E elements[OCTET];
    memcpy(elements, from.words, sizeof(elements));
#pragma unroll
    for (int j = 0; j < OCTET; ++j) to[j] = widen(elements[j]);
  }

  char* address_;
  int bytes_;
  Dtype dtype_;
  bool is_aligned_ = false;
};

// Which elements of a row count: of logits all; of maps the keys that its query may attend to.
struct Counted {
  int first, last;
  const float* key_weights;  // of the batch entry, or nullptr
  int query;                 // attends to itself, whatever the weights

  __device__ __forceinline__ bool operator()(int column) const {
    if (column < first || column >= last) return false;
    return key_weights == nullptr || key_weights[column] != 0 || column == query;
  }
};

// A row of student, teacher and gradient. Octets go to the threads of its team in turn; that in
// which the row begins, and that in which it ends, may be parts.
template <bool IS_MAP, class Team>
class ScoreRow {
 public:
  __device__ __forceinline__ ScoreRow(
      const ScoreParams& params, const ScoreLine& line, int64_t row, const Team& team)
      : ScoreRow(params, line, row / line.rows_of_batch, int(row % line.rows_of_batch), team) {}

  // Calls step(column, student, teacher) for the octets that count, from the end at which the last
  // sweep ended. Scores are -inf where nothing counts.
  template <class Step>
  __device__ __forceinline__ void sweep(const Step& step) {
    over_octets([&](int column, const Octet& s, const Octet& t) {
      if (!is_counted(column)) return;
      float student[OCTET], teacher[OCTET];
      unpack(student_, s, column, params_.student, student);
      unpack(teacher_, t, column, params_.teacher, teacher);
      step(column, student, teacher);
    });
  }

  // Likewise, and step leaves the gradient in the student's place: it is written, with 0 where
  // nothing counts.
  template <class Step>
  __device__ __forceinline__ void write(const Step& step) {
    over_octets([&](int column, const Octet& s, const Octet& t) {
      float student[OCTET] = {}, teacher[OCTET];
      if (is_counted(column)) {
        unpack(student_, s, column, params_.student, student);
        unpack(teacher_, t, column, params_.teacher, teacher);
        step(column, student, teacher);
      }
      store(column, student);
    });
  }

  __device__ __forceinline__ bool wants_grad() const { return grad_.exists(); }

  // The gradient of a row that does not count; nothing is read.
  __device__ __forceinline__ void clear() const {
    const float zeros[OCTET] = {};
    for (int column = begin_; column < width_; column += team_.size * OCTET) store(column, zeros);
  }

 private:
  __device__ __forceinline__ ScoreRow(
      const ScoreParams& params, const ScoreLine& line, int64_t batch, int query, const Team& team)
      : params_(params), team_(team), student_(line.student, line.student_dtype, batch, query),
        teacher_(line.teacher, line.teacher_dtype, batch, query),
        grad_(line.grad, line.grad_dtype, batch, query), width_(line.width),
        counted_{0, line.width, nullptr, query} {
    if (IS_MAP) {
      counted_.first = max(0, query - line.keys_behind);
      counted_.last = min(width_, query + line.keys_ahead + 1);
      if (line.row_weights != nullptr) counted_.key_weights = line.row_weights + batch * width_;
    }
    const int head = max(student_.head(), max(teacher_.head(), grad_.head()));
    student_.align(head);
    teacher_.align(head);
    grad_.align(head);
    begin_ = (head == 0 ? 0 : head - OCTET) + team.member * OCTET;
    tiles_ = (width_ - (begin_ - team.member * OCTET) + tile_width() - 1) / tile_width();
  }

  __device__ __forceinline__ int tile_width() const { return team_.size * OCTETS * OCTET; }

  __device__ __forceinline__ int column_of(int tile, int i) const {
    return begin_ + tile * tile_width() + i * team_.size * OCTET;
  }

  __device__ __forceinline__ bool is_whole(int column) const {
    return column >= 0 && column + OCTET <= width_;
  }

  // Whether some element of an octet may count.
  __device__ __forceinline__ bool is_counted(int column) const {
    return column < counted_.last && column + OCTET > counted_.first;
  }

  template <class Step>
  __device__ __forceinline__ void over_octets(const Step& step) {
    for (int k = 0; k < tiles_; ++k) {
      const int tile = is_backward_ ? tiles_ - 1 - k : k;
      if (tile != held_) load(tile);
#pragma unroll
      for (int i = 0; i < OCTETS; ++i) {
        const int column = column_of(tile, i);
        if (column < width_) step(column, students_[i], teachers_[i]);
      }
    }
    is_backward_ = !is_backward_;
  }

  // All loads of a tile before any is used. Elements that cannot be had so are read by `unpack`.
  __device__ __forceinline__ void load(int tile) {
    held_ = tile;
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
      const int column = column_of(tile, i);
      const bool is_read = is_whole(column) && is_counted(column);
      if (is_read && student_.is_aligned()) student_.load(column, students_[i]);
      if (is_read && teacher_.is_aligned()) teacher_.load(column, teachers_[i]);
    }
  }

  __device__ __forceinline__ void unpack(
      const Strip& strip, const Octet& octet, int column, const LogitSide& side,
      float (&to)[OCTET]) const {
    const bool is_loaded = is_whole(column) && strip.is_aligned();
    if (is_loaded) strip.unpack(octet, to);
    else {
#pragma unroll
      for (int j = 0; j < OCTET; ++j) {
        to[j] = column + j >= 0 && column + j < width_ ? strip.element(column + j) : 0.0f;
      }
    }
    if (IS_MAP) {
#pragma unroll
      for (int j = 0; j < OCTET; ++j) {
        if (to[j] < LEAST_SCORE) to[j] = LEAST_SCORE;
        if (!counted_(column + j)) to[j] = -INFINITY;
      }
      return;
    }
    if (side.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < OCTET; ++j) {
        if (column + j >= 0 && column + j < width_) to[j] += side.bias[column + j];
      }
    }
    if (side.softcap > 0) {
#pragma unroll
      for (int j = 0; j < OCTET; ++j) to[j] = side.softcap * tanhf(to[j] / side.softcap);
    }
    if (is_whole(column)) return;
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
      if (column + j < 0 || column + j >= width_) to[j] = -INFINITY;
    }
  }

  __device__ __forceinline__ void store(int column, const float (&grad)[OCTET]) const {
    if (is_whole(column) && grad_.is_aligned()) {
      grad_.store_octet(column, grad);
      return;
    }
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
      if (column + j >= 0 && column + j < width_) grad_.store_element(column + j, grad[j]);
    }
  }

  const ScoreParams& params_;
  const Team& team_;
  Strip student_, teacher_, grad_;
  int width_;
  Counted counted_;
  int begin_;  // the first column of this thread; negative where the row begins within an octet
  int tiles_, held_ = -1;  // the tile in registers
  bool is_backward_ = false;
  Octet students_[OCTETS], teachers_[OCTETS];
};

}  // namespace fakd::cuda
