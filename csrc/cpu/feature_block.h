// What the tasks of projected pairs share: the weights, the totals' scratch, the walk over blocks.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>

#include "feature_alignment.h"
#include "gemm.h"
#include "product_sums.h"

namespace fakd {

// What every task of a projected pair shares, read only.
struct Weights {
  Scratch projection_copy, bias_copy;
  Matrix projection{};          // [Dt, Ds] float32
  const float* bias = nullptr;  // b [Dt]

  Weights(const RowKernels& kernels, const FeaturePair& pair) {
    const Rows& w = pair.projection;
    projection = fetch(kernels, w, CountedRows(w.rows), 0, w.rows, projection_copy);
    if (pair.bias.data != nullptr) {
      bias = fetch(kernels, pair.bias, CountedRows(1), 0, 1, bias_copy).data;
    }
  }
};

// What the direct route needs besides: W^T [Ds, Dt], its rows contiguous where packed products want
// that.
struct DirectWeights {
  Scratch transposed_copy;
  Matrix transposed{};

  explicit DirectWeights(const Weights& weights) {
    const Matrix& w = weights.projection;
    transposed = w.transposed();
    if (!are_feature_products_packed()) return;
    float* out = transposed_copy.reserve(w.rows * w.columns);
    for (int64_t row = 0; row < w.rows; ++row) {
      const float* from = w.data + row * w.row_stride;
      for (int64_t column = 0; column < w.columns; ++column) out[column * w.rows + row] = from[column];
    }
    transposed = row_major(static_cast<const float*>(out), w.columns, w.rows);
  }
};

// What the gram route needs besides.
struct GramWeights {
  Scratch gram_copy, diagonal_copy, projected_bias_copy;
  // W^T W [Ds, Ds] with its diagonal taken out: where columns of W are near orthogonal, as they
  // start, one large term per sum would cost the small ones their last bits.
  Matrix gram{};
  const float* diagonal = nullptr;        // [Ds]
  const float* projected_bias = nullptr;  // W^T b [Ds]
  double bias_square = 0;                 // |b|^2

  explicit GramWeights(const Weights& weights) {
    const Matrix& w = weights.projection;
    const int64_t ds = w.columns;
    gram = row_major<float>(gram_copy.reserve(ds * ds), ds, ds);
    multiply_symmetric(gram_copy.get(), w.transposed(), w, false, multiply<float>);
    mirror(gram_copy.get(), ds);
    diagonal = diagonal_copy.reserve(ds);
    for (int64_t j = 0; j < ds; ++j) {
      diagonal_copy.get()[j] = gram_copy.get()[j * ds + j];
      gram_copy.get()[j * ds + j] = 0;
    }
    if (weights.bias == nullptr) return;
    const Matrix out = row_major<float>(projected_bias_copy.reserve(ds), 1, ds);
    multiply(out, row_major(weights.bias, 1, w.rows), w);
    projected_bias = out.data;
    for (int64_t j = 0; j < w.rows; ++j) {
      bias_square += double(weights.bias[j]) * weights.bias[j];
    }
  }
};

// Each computed by the first task that asks, on its thread.
class LazyWeights {
 public:
  explicit LazyWeights(const FeaturePair& pair) : pair_(pair) {}
  const Weights& get() {
    std::call_once(once_, [&] { weights_ = std::make_unique<Weights>(row_kernels(), pair_); });
    return *weights_;
  }
  const DirectWeights& direct() {
    std::call_once(direct_once_, [&] { direct_ = std::make_unique<DirectWeights>(get()); });
    return *direct_;
  }
  const GramWeights& gram() {
    std::call_once(gram_once_, [&] { gram_ = std::make_unique<GramWeights>(get()); });
    return *gram_;
  }

 private:
  const FeaturePair& pair_;
  std::once_flag once_, direct_once_, gram_once_;
  std::unique_ptr<Weights> weights_;
  std::unique_ptr<DirectWeights> direct_;
  std::unique_ptr<GramWeights> gram_;
};

struct BlockScratch {
  Scratch student, teacher, projected, grad, u, v, student_sum, partial;
  std::vector<RowTerms> terms;
  std::vector<RowSums> sums;
  SumScratch products;
  bool is_alone = false;  // whether products may use all threads
};

// One task of a projected pair: its rows, block by block. What a block does is `block()`.
class BlockTask {
 public:
  BlockTask(
      const FeatureProblem& problem, const FeaturePair& pair, LazyWeights& weights,
      const CountedRows& counted, BlockScratch& scratch, Totals& totals)
      : kernels_(row_kernels()), problem_(problem), pair_(pair), lazy_weights_(weights),
        weights_(weights.get()), counted_(counted), scratch_(scratch), totals_(totals),
        ds_(pair.student.columns), dt_(pair.teacher.columns) {}
  virtual ~BlockTask() = default;

  void run(int64_t begin, int64_t end, int64_t block_rows) {
    for (begin_ = begin; begin_ < end; begin_ += rows_) {
      rows_ = std::min(end - begin_, begin_ == begin ? first_rows(block_rows) : block_rows);
      scratch_.terms.resize(rows_);
      block();
      for (int64_t row = 0; row < rows_; ++row) {
        const double weight = row_weight(row);
        totals_.cosine += weight * scratch_.terms[row].cosine;
        totals_.euclidean += weight * scratch_.terms[row].euclidean;
      }
    }
  }

 protected:
  virtual void block() = 0;
  virtual int64_t first_rows(int64_t block_rows) const { return block_rows; }

  bool wants_student() const { return pair_.grad_student.data != nullptr; }
  bool wants_projection() const { return pair_.grad_projection >= 0; }
  bool wants_bias() const { return pair_.grad_bias >= 0; }
  bool wants_any() const { return wants_student() || wants_projection() || wants_bias(); }
  double row_weight(int64_t row) const {
    return pair_.row_weights == nullptr ? 1.0 : double(pair_.row_weights[counted_[begin_ + row]]);
  }
  RowTerms terms(const RowSums& sums, int64_t row) const {
    const double weight = row_weight(row);
    return row_terms(
        sums.r1, sums.r2, sums.r3, sums.distance, weight * pair_.cosine_gain,
        weight * pair_.euclidean_gain, problem_.is_squared, dt_, problem_.eps);
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

  const RowKernels& kernels_;
  const FeatureProblem& problem_;
  const FeaturePair& pair_;
  LazyWeights& lazy_weights_;
  const Weights& weights_;
  const CountedRows& counted_;
  BlockScratch& scratch_;
  Totals& totals_;
  const int64_t ds_, dt_;
  int64_t begin_ = 0, rows_ = 0;
};

}  // namespace fakd
