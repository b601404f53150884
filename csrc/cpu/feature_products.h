// Pairs with a projection in float32: the direct and the gram route, block by block.
#pragma once

#include "feature_block.h"

namespace fakd {

// The gram route takes small differences of large sums where p and t have much in common, and is
// accurate where they have little, as early in training. It serves a block
// - whose correlation (sum r2)^2 / (sum r1 sum r3) is below this: beyond, errors of its gradients grow
//   past twice those of the direct route, which are eager's;
constexpr double CORRELATION = 1.0 / 16;
// - and where no row's |p - t|^2 is below this share of |p|^2 + |t|^2: it is taken from
//   r1 - 2 r2 + r3, sums that are accurate to about 1e-7 of themselves.
constexpr double CANCELLATION = 1.0 / 16;
// The first rows of a task go the direct route, to see whether the gram route may serve the others.
constexpr int64_t PROBE_ROWS = 64;
// Rows of a block. Products of fewer rows lose speed: on the direct route, 384 -> 768, the whole took
// 1.07, 1.06 and 1.045 times the bare products with 320, 512 and 1024 rows, and the gram route is
// flat from 256 on (2 cores, AVX-512, 2026-11). Memory stays bounded for wide teachers.
constexpr int64_t DIRECT_ROWS = 1024, LEAST_DIRECT_ROWS = 256, DIRECT_BYTES = 16 << 20;
constexpr int64_t GRAM_ROWS = 512;

// The same gradient as c p + d t, for the gram route, whose rows are never close to the teacher's.
inline float of_student(const RowTerms& terms) {
  return float(terms.along_student + terms.along_difference);
}
inline float of_teacher(const RowTerms& terms) {
  return float(terms.along_teacher - terms.along_difference);
}

class FloatTask : public BlockTask {
 public:
  using BlockTask::BlockTask;

 private:
  void block() override {
    x_ = fetch(kernels_, pair_.student, counted_, begin_, begin_ + rows_, scratch_.student);
    t_ = fetch(kernels_, pair_.teacher, counted_, begin_, begin_ + rows_, scratch_.teacher);
    const bool is_probe = pair_.route == Route::gram && !is_gram_known_;
    if (is_probe && problem_.is_route_forced) is_gram_ = is_gram_known_ = true;
    if (!is_gram_ || !gram_block()) direct_block();
    if (!is_gram_known_) is_gram_ = pair_.route == Route::gram && is_uncorrelated();
    is_gram_known_ = true;
  }
  int64_t first_rows(int64_t block_rows) const override {
    const bool is_probed = pair_.route == Route::gram && !problem_.is_route_forced;
    return is_probed ? std::min(PROBE_ROWS, block_rows) : block_rows;
  }
  bool is_uncorrelated() const {
    double r1 = 0, r2 = 0, r3 = 0;
    for (const RowSums& sums : scratch_.sums) {
      r1 += sums.r1;
      r2 += sums.r2;
      r3 += sums.r3;
    }
    return r2 * r2 < CORRELATION * r1 * r3;
  }
  // out = a b, or out += a b; rows of b are contiguous if packed operands are faster.
  void product(const Matrix& out, const Matrix& a, const Matrix& b, bool is_added = false) {
    if (scratch_.is_alone || !are_feature_products_packed()) return multiply(out, a, b, is_added);
    multiply_sum(kernels_, out, a, b, is_added, scratch_.products);
  }
  const float* x(int64_t row) const { return x_.data + row * x_.row_stride; }
  const float* t(int64_t row) const { return t_.data + row * t_.row_stride; }

  void direct_block() {
    const Matrix p = row_major(scratch_.projected.reserve(rows_ * dt_), rows_, dt_);
    float* p_data = scratch_.projected.get();
    product(p, x_, lazy_weights_.direct().transposed);
    scratch_.sums.resize(rows_);
    torch::stable::parallel_for(0, rows_, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        float* p_row = p_data + row * dt_;
        if (weights_.bias != nullptr) kernels_.add_scaled(weights_.bias, 1.0f, dt_, p_row);
        RowSums& sums = scratch_.sums[row];
        kernels_.sums(p_row, t(row), dt_, &sums);
        const RowTerms& terms = scratch_.terms[row] = this->terms(sums, row);
        if (wants_any()) {
          kernels_.combine(p_row, t(row), weights_of(terms), dt_, p_row);
        }
      }
    });
    if (wants_student()) {
      Matrix grad = grad_target();
      product(grad, p, weights_.projection);
      write_grad();
    }
    if (wants_projection()) {
      product(row_major(totals_.wide, dt_, ds_), p.transposed(), x_, totals_.is_wide_started);
      totals_.is_wide_started = true;
    }
    if (wants_bias()) {
      sum_rows(dt_, totals_.bias, [&](int64_t row, float* sum) {
        kernels_.add_scaled(p_data + row * dt_, 1.0f, dt_, sum);
      });
    }
  }

  // False: the route may not serve this block, and nothing has been added to the totals.
  bool gram_block() {
    const GramWeights& gram = lazy_weights_.gram();
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
    product(u, t_, weights_.projection);
    product(v, x_, gram.gram);
    torch::stable::parallel_for(0, rows_, 16, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) gram_sums(gram, row, u_data, v_data);
    });
    if (!is_uncorrelated()) return false;
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
      multiply_symmetric(
          totals_.narrow, x_.transposed(), v, totals_.is_narrow_started,
          [&](const auto&... operands) { product(operands...); });
      product(row_major(totals_.wide, dt_, ds_), t_.transposed(), u, totals_.is_wide_started);
      sum_rows(ds_, totals_.diagonal, [&](int64_t row, float* sum) {
        kernels_.add_product(x(row), v_data + row * ds_, ds_, sum);
      });
      totals_.is_narrow_started = totals_.is_wide_started = true;
    }
    if (weights_.bias != nullptr && (wants_projection() || wants_bias())) gram_bias(v_data);
    return true;
  }

  void gram_sums(const GramWeights& gram, int64_t row, const float* u_data, float* v_data) {
    const float* u_row = u_data + row * ds_;
    float* v_row = v_data + row * ds_;
    double dots[2];
    RowSums& sums = scratch_.sums[row];
    kernels_.add_product(x(row), gram.diagonal, ds_, v_row);
    if (weights_.bias == nullptr) {
      kernels_.two_dots(x(row), u_row, v_row, ds_, dots);
      sums.r2 = dots[0];
      sums.r1 = dots[1];
    } else {  // p = W x + b: v becomes W^T p
      double offset[2], along_bias[2];
      kernels_.add_scaled(gram.projected_bias, 1.0f, ds_, v_row);
      kernels_.two_dots(x(row), u_row, v_row, ds_, dots);
      kernels_.two_dots(x(row), gram.projected_bias, gram.projected_bias, ds_, offset);
      sums.r1 = dots[1] + offset[0] + gram.bias_square;
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

  Matrix x_{}, t_{};
  bool is_gram_ = false, is_gram_known_ = false;
};

}  // namespace fakd
