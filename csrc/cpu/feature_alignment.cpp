// Feature alignment on the CPU.
//
// Blocks of rows pass through the cache once: products by torch's library, row kernels between
// them. Per row, with E = 4 bytes:
//   none    reads (Ds + Dt) E, writes Ds E; 1 pass
//   direct  6 Ds Dt FLOPs; the projected block is reused and stays in the cache
//   gram    4 Ds Dt + 4 Ds^2 FLOPs; no projected block at all
// A gram block in which some row's |p - t|^2 would cancel is done again on the direct route.

#include "feature_alignment.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>

#include "../common/row_gram.h"
#include "gemm.h"
#include "memory.h"
#include "schedule.h"

namespace fakd {
namespace {

// |p - t|^2 below this share of |p|^2 + |t|^2 is not taken from r1 - 2 r2 + r3: the three sums are
// accurate to about 1e-7 of themselves.
constexpr double CANCELLATION = 1.0 / 16;
// Rows of a block. Products of fewer rows lose speed: on the direct route, 384 -> 768, the whole took
// 1.07, 1.06 and 1.045 times the bare products with 320, 512 and 1024 rows, and the gram route is
// flat from 256 on (2 cores, AVX-512, 2026-11). Memory stays bounded for wide teachers.
constexpr int64_t DIRECT_ROWS = 1024, LEAST_DIRECT_ROWS = 256, DIRECT_BYTES = 16 << 20;
constexpr int64_t GRAM_ROWS = 512;
// Gradients beyond this, a private cache, go past the caches, which saves reading the lines first:
// 12 pairs of 4096 x 768 took 15.7 ms so and 20.5 ms otherwise (as above).
constexpr int64_t STREAM_BYTES = 2 << 20;

RowWeights weights_of(const RowTerms& terms) {
  return {
      float(terms.along_student), float(terms.along_teacher), float(terms.along_difference)};
}
// The same gradient as c p + d t, for the gram route, whose rows are never close to the teacher's.
float of_student(const RowTerms& terms) {
  return float(terms.along_student + terms.along_difference);
}
float of_teacher(const RowTerms& terms) {
  return float(terms.along_teacher - terms.along_difference);
}

size_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

char* row_address(const Rows& rows, int64_t row) {
  return static_cast<char*>(rows.data) + row * rows.stride * int64_t(element_bytes(rows.dtype));
}

void write_row(const RowKernels& kernels, const float* from, const Rows& to, int64_t row) {
  char* address = row_address(to, row);
  if (to.dtype == Dtype::bfloat16) {
    kernels.narrow_bfloat16(from, to.columns, reinterpret_cast<uint16_t*>(address));
  } else {
    std::memcpy(address, from, to.columns * sizeof(float));
  }
}

// Rows that count: all of them, or those of nonzero weight.
class CountedRows {
 public:
  explicit CountedRows(int64_t rows, const float* weights = nullptr) : count_(rows) {
    if (weights == nullptr) return;
    is_listed_ = true;
    for (int64_t row = 0; row < rows; ++row) {
      if (weights[row] != 0) rows_.push_back(row);
    }
    count_ = int64_t(rows_.size());
  }
  int64_t count() const { return count_; }
  int64_t operator[](int64_t index) const { return is_listed_ ? rows_[index] : index; }
  bool is_run(int64_t begin, int64_t end) const {
    return !is_listed_ || rows_[end - 1] - rows_[begin] == end - 1 - begin;
  }

 private:
  std::vector<int64_t> rows_;
  int64_t count_;
  bool is_listed_ = false;
};

// A block of counted rows in float32: the caller's own memory where it is that already.
Matrix fetch(
    const RowKernels& kernels, const Rows& from, const CountedRows& counted, int64_t begin,
    int64_t end, Scratch& scratch) {
  const int64_t rows = end - begin, columns = from.columns;
  if (from.dtype == Dtype::float32 && counted.is_run(begin, end)) {
    const float* data = reinterpret_cast<const float*>(row_address(from, counted[begin]));
    return row_major(data, rows, columns, from.stride);
  }
  float* to = scratch.reserve(rows * columns);
  torch::stable::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernels.widen(row_address(from, counted[begin + row]), from.dtype, columns, to + row * columns);
    }
  });
  return row_major(to, rows, columns);
}

// What every task of a projected pair shares, read only.
struct Weights {
  Scratch projection_copy, bias_copy, gram_copy, diagonal_copy, projected_bias_copy;
  Matrix projection;                      // [Dt, Ds] float32
  // W^T W [Ds, Ds] with its diagonal taken out: where columns of W are near orthogonal, as they
  // start, one large term per sum would cost the small ones their last bits.
  Matrix gram;
  const float* diagonal = nullptr;        // [Ds]
  const float* bias = nullptr;            // b [Dt]
  const float* projected_bias = nullptr;  // W^T b [Ds]
  double bias_square = 0;                 // |b|^2

  Weights(const RowKernels& kernels, const FeaturePair& pair) {
    const Rows& w = pair.projection;
    projection = fetch(kernels, w, CountedRows(w.rows), 0, w.rows, projection_copy);
    if (pair.bias.data != nullptr) {
      bias = fetch(kernels, pair.bias, CountedRows(1), 0, 1, bias_copy).data;
    }
    if (pair.route != Route::gram) return;
    const int64_t ds = w.columns;
    gram = row_major(gram_copy.reserve(ds * ds), ds, ds);
    multiply_symmetric(gram_copy.get(), projection.transposed(), projection);
    mirror(gram_copy.get(), ds);
    diagonal = diagonal_copy.reserve(ds);
    for (int64_t j = 0; j < ds; ++j) {
      diagonal_copy.get()[j] = gram_copy.get()[j * ds + j];
      gram_copy.get()[j * ds + j] = 0;
    }
    if (bias == nullptr) return;
    const Matrix b = row_major(bias, 1, w.rows);
    const Matrix out = row_major(projected_bias_copy.reserve(ds), 1, ds);
    multiply(out, b, projection);
    projected_bias = out.data;
    for (int64_t j = 0; j < w.rows; ++j) bias_square += double(bias[j]) * bias[j];
  }
};

// Computed by the first task that asks, on its thread.
class LazyWeights {
 public:
  explicit LazyWeights(const FeaturePair& pair) : pair_(pair) {}
  const Weights& get() {
    std::call_once(once_, [&] { weights_ = std::make_unique<Weights>(row_kernels(), pair_); });
    return *weights_;
  }

 private:
  const FeaturePair& pair_;
  std::once_flag once_;
  std::unique_ptr<Weights> weights_;
};

// Sums of one task, added up in task order when all are done.
struct Totals {
  double cosine = 0, euclidean = 0;
  float* wide = nullptr;    // [Dt, Ds] of the projection's gradient
  // gram: X^T diag(c) X [Ds, Ds] below its diagonal, and the diagonal; to be multiplied by W. The
  // diagonal is large, and summed apart for the sake of the rest.
  float* narrow = nullptr;
  float* diagonal = nullptr;  // [Ds]
  float* bias = nullptr;    // [Dt]
  Scratch wide_memory, narrow_memory, diagonal_memory, bias_memory;
  bool is_wide_started = false, is_narrow_started = false;
};

struct BlockScratch {
  Scratch student, teacher, projected, grad, u, v, student_sum, partial;
  std::vector<RowTerms> terms;
  std::vector<RowSums> sums;
};

class PairTask {
 public:
  PairTask(
      const FeatureProblem& problem, const FeaturePair& pair, const Weights& weights,
      const CountedRows& counted, BlockScratch& scratch, Totals& totals)
      : kernels_(row_kernels()), problem_(problem), pair_(pair), weights_(weights),
        counted_(counted), scratch_(scratch), totals_(totals),
        ds_(pair.student.columns), dt_(pair.teacher.columns) {}

  void run(int64_t begin, int64_t end, int64_t block_rows) {
    for (int64_t first = begin; first < end; first += block_rows) {
      const int64_t last = std::min(end, first + block_rows);
      begin_ = first;
      rows_ = last - first;
      x_ = fetch(kernels_, pair_.student, counted_, first, last, scratch_.student);
      t_ = fetch(kernels_, pair_.teacher, counted_, first, last, scratch_.teacher);
      scratch_.terms.resize(rows_);
      if (pair_.route != Route::gram || !gram_block()) direct_block();
      for (int64_t row = 0; row < rows_; ++row) {
        const double weight = row_weight(row);
        totals_.cosine += weight * scratch_.terms[row].cosine;
        totals_.euclidean += weight * scratch_.terms[row].euclidean;
      }
    }
  }

 private:
  bool wants_student() const { return pair_.grad_student.data != nullptr; }
  bool wants_projection() const { return pair_.grad_projection >= 0; }
  bool wants_bias() const { return pair_.grad_bias >= 0; }
  bool wants_any() const { return wants_student() || wants_projection() || wants_bias(); }
  const float* x(int64_t row) const { return x_.data + row * x_.row_stride; }
  const float* t(int64_t row) const { return t_.data + row * t_.row_stride; }
  double row_weight(int64_t row) const {
    return pair_.row_weights == nullptr ? 1.0 : double(pair_.row_weights[counted_[begin_ + row]]);
  }
  RowTerms terms(const RowSums& sums, int64_t row) const {
    const double weight = row_weight(row);
    return row_terms(
        sums.r1, sums.r2, sums.r3, sums.distance, weight * pair_.cosine_gain,
        weight * pair_.euclidean_gain, problem_.is_squared, dt_, problem_.eps);
  }

  void direct_block() {
    const Matrix p = row_major(scratch_.projected.reserve(rows_ * dt_), rows_, dt_);
    float* p_data = scratch_.projected.get();
    multiply(p, x_, weights_.projection.transposed());
    torch::stable::parallel_for(0, rows_, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        float* p_row = p_data + row * dt_;
        if (weights_.bias != nullptr) kernels_.add_scaled(weights_.bias, 1.0f, dt_, p_row);
        RowSums sums;
        kernels_.sums(p_row, t(row), dt_, &sums);
        const RowTerms& terms = scratch_.terms[row] = this->terms(sums, row);
        if (wants_any()) {
          kernels_.combine(p_row, t(row), weights_of(terms), dt_, p_row);
        }
      }
    });
    if (wants_student()) {
      Matrix grad = grad_target();
      multiply(grad, p, weights_.projection);
      write_grad();
    }
    if (wants_projection()) {
      multiply(
          row_major(totals_.wide, dt_, ds_), p.transposed(), x_, totals_.is_wide_started);
      totals_.is_wide_started = true;
    }
    if (wants_bias()) {
      sum_rows(dt_, totals_.bias, [&](int64_t row, float* sum) {
        kernels_.add_scaled(p_data + row * dt_, 1.0f, dt_, sum);
      });
    }
  }

  // out += the sum over rows of what `add(row, sum)` adds. In runs, so that a long sum does not lose
  // bits.
  template <class Add>
  void sum_rows(int64_t width, float* out, const Add& add) {
    constexpr int64_t RUN = 32;
    float* partial = scratch_.partial.reserve(width);
    for (int64_t begin = 0; begin < rows_; begin += RUN) {
      std::memset(partial, 0, width * sizeof(float));
      for (int64_t row = begin; row < std::min(rows_, begin + RUN); ++row) add(row, partial);
      kernels_.add_scaled(partial, 1.0f, width, out);
    }
  }

  // False: some row would cancel, and nothing has been added to the totals.
  bool gram_block() {
    const Matrix u = row_major(scratch_.u.reserve(rows_ * ds_), rows_, ds_);
    const Matrix v = row_major(scratch_.v.reserve(rows_ * ds_), rows_, ds_);
    float *u_data = scratch_.u.get(), *v_data = scratch_.v.get();
    scratch_.sums.resize(rows_);
    // First, so that one linear pass brings the teacher's rows into the cache for both products.
    torch::stable::parallel_for(0, rows_, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        scratch_.sums[row].r3 = kernels_.square(t(row), dt_);
      }
    });
    multiply(u, t_, weights_.projection);
    multiply(v, x_, weights_.gram);
    torch::stable::parallel_for(0, rows_, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) gram_sums(row, u_data, v_data);
    });
    for (const RowSums& sums : scratch_.sums) {
      if (!(sums.distance >= CANCELLATION * (sums.r1 + sums.r3))) return false;
    }
    float* grad = wants_student() ? const_cast<float*>(grad_target().data) : nullptr;
    const int64_t grad_stride = wants_student() ? grad_target().row_stride : 0;
    torch::stable::parallel_for(0, rows_, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const RowTerms& terms = scratch_.terms[row] = this->terms(scratch_.sums[row], row);
        float *u_row = u_data + row * ds_, *v_row = v_data + row * ds_;
        if (grad != nullptr) {  // v = W^T p, u = W^T t
          kernels_.combine(v_row, u_row, weights_of(terms), ds_, grad + row * grad_stride);
        }
        if (wants_projection() || wants_bias()) {
          kernels_.scale(x(row), of_student(terms), ds_, v_row);
          if (wants_projection()) kernels_.scale(x(row), of_teacher(terms), ds_, u_row);
        }
      }
    });
    if (wants_student()) write_grad();
    if (wants_projection()) {  // dW = W (X^T diag X) + T^T diag X
      multiply_symmetric(totals_.narrow, x_.transposed(), v, totals_.is_narrow_started);
      multiply(row_major(totals_.wide, dt_, ds_), t_.transposed(), u, totals_.is_wide_started);
      sum_rows(ds_, totals_.diagonal, [&](int64_t row, float* sum) {
        kernels_.add_product(x(row), v_data + row * ds_, ds_, sum);
      });
      totals_.is_narrow_started = totals_.is_wide_started = true;
    }
    if (weights_.bias != nullptr && (wants_projection() || wants_bias())) gram_bias(v_data);
    return true;
  }

  void gram_sums(int64_t row, const float* u_data, float* v_data) {
    const float* u_row = u_data + row * ds_;
    float* v_row = v_data + row * ds_;
    double dots[2];
    RowSums& sums = scratch_.sums[row];
    kernels_.add_product(x(row), weights_.diagonal, ds_, v_row);
    if (weights_.bias == nullptr) {
      kernels_.two_dots(x(row), u_row, v_row, ds_, dots);
      sums.r2 = dots[0];
      sums.r1 = dots[1];
    } else {  // p = W x + b: v becomes W^T p
      double offset[2], along_bias[2];
      kernels_.add_scaled(weights_.projected_bias, 1.0f, ds_, v_row);
      kernels_.two_dots(x(row), u_row, v_row, ds_, dots);
      kernels_.two_dots(x(row), weights_.projected_bias, weights_.projected_bias, ds_, offset);
      sums.r1 = dots[1] + offset[0] + weights_.bias_square;
      kernels_.two_dots(t(row), weights_.bias, weights_.bias, dt_, along_bias);
      sums.r2 = dots[0] + along_bias[0];
    }
    sums.distance = sums.r1 - 2 * sums.r2 + sums.r3;
  }

  // db = W (sum_i c_i x_i) + b sum_i c_i + sum_i d_i t_i, and b's share of dW, b (sum_i c_i x_i)^T,
  // where dL/dp_i = c_i p_i + d_i t_i. `scaled` rows are c_i x_i.
  void gram_bias(const float* scaled) {
    float* student_sum = scratch_.student_sum.reserve(ds_);
    std::memset(student_sum, 0, ds_ * sizeof(float));
    sum_rows(ds_, student_sum, [&](int64_t row, float* sum) {
      kernels_.add_scaled(scaled + row * ds_, 1.0f, ds_, sum);
    });
    if (wants_projection()) {
      multiply(
          row_major(totals_.wide, dt_, ds_), row_major(weights_.bias, dt_, 1, 1),
          row_major(student_sum, 1, ds_), true);
    }
    if (!wants_bias()) return;
    double along_student = 0;
    for (int64_t row = 0; row < rows_; ++row) along_student += of_student(scratch_.terms[row]);
    sum_rows(dt_, totals_.bias, [&](int64_t row, float* sum) {
      kernels_.add_scaled(t(row), of_teacher(scratch_.terms[row]), dt_, sum);
    });
    kernels_.add_scaled(weights_.bias, float(along_student), dt_, totals_.bias);
    multiply(
        row_major(totals_.bias, 1, dt_), row_major(student_sum, 1, ds_),
        weights_.projection.transposed(), true);
  }

  bool is_grad_in_place() const {
    return pair_.grad_student.dtype == Dtype::float32 && counted_.is_run(begin_, begin_ + rows_);
  }
  // Where the block's student gradient is computed: its final place if that is possible.
  Matrix grad_target() {
    if (is_grad_in_place()) {
      const char* address = row_address(pair_.grad_student, counted_[begin_]);
      return row_major(
          reinterpret_cast<const float*>(address), rows_, ds_, pair_.grad_student.stride);
    }
    return row_major(scratch_.grad.reserve(rows_ * ds_), rows_, ds_);
  }
  void write_grad() {
    if (is_grad_in_place()) return;
    const float* grad = scratch_.grad.get();
    torch::stable::parallel_for(0, rows_, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        write_row(kernels_, grad + row * ds_, pair_.grad_student, counted_[begin_ + row]);
      }
    });
  }

  const RowKernels& kernels_;
  const FeatureProblem& problem_;
  const FeaturePair& pair_;
  const Weights& weights_;
  const CountedRows& counted_;
  BlockScratch& scratch_;
  Totals& totals_;
  const int64_t ds_, dt_;
  int64_t begin_ = 0, rows_ = 0;
  Matrix x_{}, t_{};
};

// Pairs without a projection: one pass over student and teacher, the gradient written on the way.
// Rows go in groups: the square roots and divisions of one row hide behind the sums of the next.
class RowComparison {
 public:
  RowComparison(
      const FeatureProblem& problem, const FeaturePair& pair, Scratch& scratch, Totals& totals)
      : kernels_(row_kernels()), problem_(problem), pair_(pair), totals_(totals),
        width_(pair.teacher.columns), padded_((width_ + 15) / 16 * 16),
        memory_(scratch.reserve((2 * GROUP + 1) * padded_)) {
    const Rows& grad = pair.grad_student;
    is_streamed_ = grad.data != nullptr && grad.dtype == Dtype::float32 &&
                   grad.rows * width_ * 4 >= STREAM_BYTES && width_ % 16 == 0 &&
                   reinterpret_cast<uintptr_t>(grad.data) % 64 == 0;
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double weight = pair_.row_weights == nullptr ? 1.0 : double(pair_.row_weights[row]);
      if (weight == 0) continue;
      Member& member = group_[count_];
      member.row = row;
      member.weight = weight;
      member.student = read(pair_.student, row, memory_ + 2 * count_ * padded_);
      member.teacher = read(pair_.teacher, row, memory_ + (2 * count_ + 1) * padded_);
      kernels_.sums(member.student, member.teacher, width_, &member.sums);
      if (++count_ == GROUP) finish_group();
    }
    finish_group();
  }

 private:
  static constexpr int64_t GROUP = 4;
  struct Member {
    int64_t row;
    double weight;
    const float *student, *teacher;
    RowSums sums;
    RowTerms terms;
  };

  // The row in float32: in place, or widened into `to`.
  const float* read(const Rows& rows, int64_t row, float* to) const {
    const char* address = row_address(rows, row);
    if (rows.dtype == Dtype::float32) return reinterpret_cast<const float*>(address);
    kernels_.widen(address, rows.dtype, width_, to);
    return to;
  }

  void finish_group() {
    for (int64_t index = 0; index < count_; ++index) {
      Member& member = group_[index];
      member.terms = row_terms(
          member.sums.r1, member.sums.r2, member.sums.r3, member.sums.distance,
          member.weight * pair_.cosine_gain, member.weight * pair_.euclidean_gain,
          problem_.is_squared, width_, problem_.eps);
      totals_.cosine += member.weight * member.terms.cosine;
      totals_.euclidean += member.weight * member.terms.euclidean;
    }
    if (pair_.grad_student.data != nullptr) {
      for (int64_t index = 0; index < count_; ++index) write_grad(group_[index]);
    }
    count_ = 0;
  }

  void write_grad(const Member& member) {
    const Rows& grad = pair_.grad_student;
    const bool is_direct = grad.dtype == Dtype::float32;
    float* out = is_direct ? reinterpret_cast<float*>(row_address(grad, member.row))
                           : memory_ + 2 * GROUP * padded_;
    (is_streamed_ ? kernels_.combine_stream : kernels_.combine)(
        member.student, member.teacher, weights_of(member.terms), width_, out);
    if (!is_direct) write_row(kernels_, out, grad, member.row);
  }

  const RowKernels& kernels_;
  const FeatureProblem& problem_;
  const FeaturePair& pair_;
  Totals& totals_;
  const int64_t width_, padded_;
  float* memory_;
  bool is_streamed_;
  Member group_[GROUP];
  int64_t count_ = 0;
};

void zero_masked_grads(const FeaturePair& pair) {
  if (pair.row_weights == nullptr || pair.grad_student.data == nullptr) return;
  const Rows& grad = pair.grad_student;
  for (int64_t row = 0; row < grad.rows; ++row) {
    if (pair.row_weights[row] == 0) {
      std::memset(row_address(grad, row), 0, grad.columns * element_bytes(grad.dtype));
    }
  }
}

// Memory for a task's share of the weight gradients. The first task of a projection uses the
// result itself where that is float32.
void allocate_totals(const FeaturePair& pair, float* result, Totals& totals) {
  const int64_t ds = pair.student.columns, dt = pair.teacher.columns;
  if (pair.grad_projection >= 0) {
    totals.wide = result != nullptr ? result : totals.wide_memory.reserve(dt * ds);
    if (pair.route == Route::gram) {
      totals.narrow = totals.narrow_memory.reserve(ds * ds);
      totals.diagonal = totals.diagonal_memory.reserve(ds);
      std::memset(totals.diagonal, 0, ds * sizeof(float));
    }
  }
  if (pair.grad_bias >= 0) {
    totals.bias = totals.bias_memory.reserve(dt);
    std::memset(totals.bias, 0, dt * sizeof(float));
  }
}

void add_in_order(float* to, const float* from, int64_t count) {
  torch::stable::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    row_kernels().add_scaled(from + begin, 1.0f, end - begin, to + begin);
  });
}

void finish_projection(
    const Rows& result, const std::vector<Totals*>& shares, const Matrix& projection) {
  const int64_t count = result.rows * result.columns, ds = result.columns;
  float *wide = nullptr, *narrow = nullptr, *diagonal = nullptr;
  for (Totals* share : shares) {
    if (share->is_wide_started) {
      if (wide == nullptr) wide = share->wide;
      else add_in_order(wide, share->wide, count);
    }
    if (share->is_narrow_started) {
      if (narrow == nullptr) {
        narrow = share->narrow;
        diagonal = share->diagonal;
      } else {
        add_in_order(narrow, share->narrow, ds * ds);
        add_in_order(diagonal, share->diagonal, ds);
      }
    }
  }
  if (wide != nullptr && narrow != nullptr) {
    mirror(narrow, ds);
    for (int64_t column = 0; column < ds; ++column) narrow[column * ds + column] = 0;
    multiply(row_major(wide, result.rows, ds), projection, row_major(narrow, ds, ds), true);
    for (int64_t row = 0; row < result.rows; ++row) {
      const float* w = projection.data + row * projection.row_stride;
      row_kernels().add_product(w, diagonal, ds, wide + row * ds);
    }
  }
  for (int64_t row = 0; row < result.rows; ++row) {
    if (wide == nullptr) {  // no row counted
      std::memset(row_address(result, row), 0, ds * element_bytes(result.dtype));
    } else if (result.dtype != Dtype::float32 || wide != result.data) {
      write_row(row_kernels(), wide + row * ds, result, row);
    }
  }
}

void finish_bias(const Rows& result, const std::vector<Totals*>& shares) {
  Scratch memory(result.columns);
  std::memset(memory.get(), 0, result.columns * sizeof(float));
  for (const Totals* share : shares) add_in_order(memory.get(), share->bias, result.columns);
  write_row(row_kernels(), memory.get(), result, 0);
}

double cost_per_row(const FeaturePair& pair) {
  const double ds = double(pair.student.columns), dt = double(pair.teacher.columns);
  return pair.route == Route::none ? dt : ds * dt * (pair.route == Route::gram ? 4 : 6);
}

int64_t block_rows(const FeaturePair& pair) {
  if (pair.route == Route::gram) return GRAM_ROWS;
  const int64_t affordable = DIRECT_BYTES / 4 / std::max<int64_t>(1, pair.teacher.columns);
  return std::clamp(affordable, LEAST_DIRECT_ROWS, DIRECT_ROWS);
}

}  // namespace

void feature_alignment(const FeatureProblem& problem) {
  row_kernels();  // a wrong FAKD_ISA is refused here, not on some thread
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<CountedRows> counted;
  std::vector<std::unique_ptr<LazyWeights>> weights;
  std::vector<int64_t> rows;
  std::vector<double> costs;
  double share_bytes = 0, wide_bytes = 0;
  for (const FeaturePair& pair : problem.pairs) {
    const bool is_projected = pair.route != Route::none;
    counted.emplace_back(pair.student.rows, is_projected ? pair.row_weights : nullptr);
    weights.emplace_back(is_projected ? new LazyWeights(pair) : nullptr);
    rows.push_back(counted.back().count());
    costs.push_back(cost_per_row(pair));
    const Rows& grad = pair.grad_student;
    advise_huge_pages(grad.data, grad.rows * grad.columns * element_bytes(grad.dtype));
    zero_masked_grads(pair);
    if (pair.grad_projection >= 0) {
      share_bytes = std::max(share_bytes, 4.0 * pair.projection.rows * pair.projection.columns);
    }
    wide_bytes += 4.0 * pair.teacher.rows * pair.teacher.columns;
  }

  // Every task sums a weight gradient of its own. Where many cores would make that larger than a
  // quarter of what eager stores, pairs go one after the other and the products use the cores.
  const int64_t count = int64_t(problem.pairs.size());
  const double budget = std::max(64.0 * (1 << 20), wide_bytes / 4);
  const int64_t affordable =
      share_bytes > 0 ? std::max<int64_t>(count, int64_t(budget / share_bytes)) : 64 * threads;
  std::vector<Task> tasks = divide(rows, costs, threads, 128, affordable);
  const bool is_parallel = int64_t(tasks.size()) >= threads || count >= threads;
  if (!is_parallel) tasks = divide(rows, costs, 1, 128, count);

  std::vector<Totals> totals(tasks.size());
  std::vector<std::vector<Totals*>> projection_shares(problem.grad_projections.size());
  std::vector<std::vector<Totals*>> bias_shares(problem.grad_biases.size());
  for (size_t index = 0; index < tasks.size(); ++index) {
    const FeaturePair& pair = problem.pairs[tasks[index].pair];
    float* result = nullptr;
    if (pair.grad_projection >= 0) {
      const Rows& grad = problem.grad_projections[pair.grad_projection];
      auto& shares = projection_shares[pair.grad_projection];
      if (shares.empty() && grad.dtype == Dtype::float32) result = static_cast<float*>(grad.data);
      shares.push_back(&totals[index]);
    }
    if (pair.grad_bias >= 0) bias_shares[pair.grad_bias].push_back(&totals[index]);
    allocate_totals(pair, result, totals[index]);
  }

  const int64_t workers = is_parallel ? std::min<int64_t>(threads, int64_t(tasks.size())) : 1;
  std::vector<BlockScratch> scratch(workers);
  run_tasks(int64_t(tasks.size()), workers, [&](int64_t index, int64_t worker) {
    const Task& task = tasks[index];
    const FeaturePair& pair = problem.pairs[task.pair];
    if (pair.route == Route::none) {
      RowComparison(problem, pair, scratch[worker].student, totals[index])
          .run(task.begin, task.end);
    } else {
      PairTask(
          problem, pair, weights[task.pair]->get(), counted[task.pair], scratch[worker], totals[index])
          .run(task.begin, task.end, is_parallel ? block_rows(pair) : threads * block_rows(pair));
      if (pair.grad_projection >= 0 && projection_shares[pair.grad_projection].size() == 1) {
        finish_projection(
            problem.grad_projections[pair.grad_projection], {&totals[index]},
            weights[task.pair]->get().projection);
      }
    }
  });

  std::vector<double> sums(2 * problem.pairs.size(), 0.0);
  std::vector<const Matrix*> projections(problem.grad_projections.size(), nullptr);
  for (size_t index = 0; index < tasks.size(); ++index) {
    sums[2 * tasks[index].pair] += totals[index].cosine;
    sums[2 * tasks[index].pair + 1] += totals[index].euclidean;
    const FeaturePair& pair = problem.pairs[tasks[index].pair];
    if (pair.grad_projection >= 0) {
      projections[pair.grad_projection] = &weights[tasks[index].pair]->get().projection;
    }
  }
  for (size_t index = 0; index < sums.size(); ++index) problem.sums[index] = float(sums[index]);
  for (size_t index = 0; index < problem.grad_projections.size(); ++index) {
    if (projection_shares[index].size() == 1) continue;  // its task has finished it
    finish_projection(
        problem.grad_projections[index], projection_shares[index], *projections[index]);
  }
  for (size_t index = 0; index < problem.grad_biases.size(); ++index) {
    finish_bias(problem.grad_biases[index], bias_shares[index]);
  }
}

}  // namespace fakd
