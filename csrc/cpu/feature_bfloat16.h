// Pairs whose student and projection are bfloat16, on processors with bfloat16 products: the direct
// route with eager's own roundings (p and dL/dp are rounded to bfloat16, once each), and none of its
// passes. On other processors such pairs are widened to float32.
#pragma once

#include "feature_block.h"

namespace fakd {

// AMX-BF16 and AVX512-BF16 come together with it; torch's library uses what there is.
inline bool has_bfloat16_products() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

inline bool is_bfloat16(const FeaturePair& pair) {
  return has_bfloat16_products() && pair.route == Route::direct &&
         pair.student.dtype == Dtype::bfloat16 && pair.projection.dtype == Dtype::bfloat16;
}

class BfloatTask : public BlockTask {
 public:
  using BlockTask::BlockTask;

 private:
  void block() override {
    const Rows& w = pair_.projection;
    const BfloatMatrix projection =
        row_major(static_cast<const uint16_t*>(w.data), w.rows, w.columns, w.stride);
    const BfloatMatrix x = student();
    uint16_t* p = bits(scratch_.projected, rows_ * dt_);
    multiply(row_major<uint16_t>(p, rows_, dt_), x, projection.transposed());
    torch::stable::parallel_for(0, rows_, 16, [&](int64_t first, int64_t last) {
      Scratch memory(2 * dt_);
      for (int64_t row = first; row < last; ++row) compare(row, p + row * dt_, memory.get());
    });
    const BfloatMatrix grad_p = row_major<uint16_t>(p, rows_, dt_);
    if (wants_student()) {
      multiply(grad_target(), grad_p, projection);
      write_grad();
    }
    if (wants_projection()) {  // rounded once per block, summed in float32
      uint16_t* share = bits(scratch_.u, dt_ * ds_);
      multiply(row_major<uint16_t>(share, dt_, ds_), grad_p.transposed(), x);
      add_share(share);
    }
    if (wants_bias()) {
      float* wide = scratch_.v.reserve(dt_);
      sum_rows(dt_, totals_.bias, [&](int64_t row, float* sum) {
        kernels_.widen(p + row * dt_, Dtype::bfloat16, dt_, wide);
        kernels_.add_scaled(wide, 1.0f, dt_, sum);
      });
    }
  }

  static uint16_t* bits(Scratch& scratch, int64_t count) {
    return reinterpret_cast<uint16_t*>(scratch.reserve((count + 1) / 2));
  }

  // Terms of one row, and its p turned into dL/dp.
  void compare(int64_t row, uint16_t* p_bits, float* memory) {
    float* p = memory;
    kernels_.widen(p_bits, Dtype::bfloat16, dt_, p);
    if (weights_.bias != nullptr) kernels_.add_scaled(weights_.bias, 1.0f, dt_, p);
    const Rows& teacher = pair_.teacher;
    const char* address = row_address(teacher, counted_[begin_ + row]);
    const float* t = reinterpret_cast<const float*>(address);
    if (teacher.dtype != Dtype::float32) {
      kernels_.widen(address, teacher.dtype, dt_, memory + dt_);
      t = memory + dt_;
    }
    RowSums sums;
    kernels_.sums(p, t, dt_, &sums);
    const RowTerms& terms = scratch_.terms[row] = this->terms(sums, row);
    if (!wants_any()) return;
    kernels_.combine(p, t, weights_of(terms), dt_, p);
    kernels_.narrow_bfloat16(p, dt_, p_bits);
  }

  // The counted rows of the block, gathered where they are no run.
  BfloatMatrix student() {
    const Rows& from = pair_.student;
    if (counted_.is_run(begin_, begin_ + rows_)) {
      const char* address = row_address(from, counted_[begin_]);
      return row_major(reinterpret_cast<const uint16_t*>(address), rows_, ds_, from.stride);
    }
    uint16_t* to = bits(scratch_.student, rows_ * ds_);
    for (int64_t row = 0; row < rows_; ++row) {
      std::memcpy(to + row * ds_, row_address(from, counted_[begin_ + row]), 2 * ds_);
    }
    return row_major<uint16_t>(to, rows_, ds_);
  }
  BfloatMatrix grad_target() {
    const Rows& grad = pair_.grad_student;
    if (counted_.is_run(begin_, begin_ + rows_)) {
      const char* address = row_address(grad, counted_[begin_]);
      return row_major(reinterpret_cast<const uint16_t*>(address), rows_, ds_, grad.stride);
    }
    return row_major<uint16_t>(bits(scratch_.grad, rows_ * ds_), rows_, ds_);
  }
  void write_grad() {
    if (counted_.is_run(begin_, begin_ + rows_)) return;
    const uint16_t* from = bits(scratch_.grad, rows_ * ds_);
    for (int64_t row = 0; row < rows_; ++row) {
      char* address = row_address(pair_.grad_student, counted_[begin_ + row]);
      std::memcpy(address, from + row * ds_, 2 * ds_);
    }
  }

  void add_share(const uint16_t* share) {
    float* wide = scratch_.v.reserve(ds_);
    for (int64_t row = 0; row < dt_; ++row) {
      float* total = totals_.wide + row * ds_;
      float* to = totals_.is_wide_started ? wide : total;
      kernels_.widen(share + row * ds_, Dtype::bfloat16, ds_, to);
      if (totals_.is_wide_started) kernels_.add_scaled(wide, 1.0f, ds_, total);
    }
    totals_.is_wide_started = true;
  }
};

}  // namespace fakd
