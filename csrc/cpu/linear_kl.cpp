// KL of two LM heads from hidden states: logits exist as one float32 block of tokens, reused.
//
// For a block of R tokens: S = H_S W_S^T and T = H_T W_T^T; a row kernel turns S into its gradient
// and T into nothing; dH = dS W_S, dW_S += dS^T H_S. In all 2 N V (3 Ds + Dt) FLOPs; beyond the
// gradients 2 R V float32. Every thread has its own part of the vocabulary and works through it in
// slices that stay in its cache; heads in half precision are widened slice by slice.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "memory.h"
#include "output_rows.h"
#include "product_sums.h"
#include "top_rows.h"

namespace fakd {
namespace {

// Tokens per block decide the speed of products: few tokens read both heads too often.
constexpr int64_t BLOCK_BYTES = 20 << 20, LEAST_TOKENS = 48;
// Rows of a head that are multiplied at a time.
constexpr int64_t SLICE = 512;

class LinearRun {
 public:
  explicit LinearRun(const LinearProblem& problem)
      : kernels_(row_kernels()), problem_(problem), rows_(problem.terms),
        count_(rows_.counted().count()), vocabulary_(problem.terms.vocabulary),
        parts_(std::min<int64_t>(
            torch::stable::get_num_threads(), (vocabulary_ + SLICE - 1) / SLICE)),
        has_teacher_(problem.teacher.hidden.data != nullptr), sum_scratch_(parts_) {
    const int64_t sides = has_teacher_ ? 2 : 1;
    const int64_t token_bytes = std::max<int64_t>(1, sides * vocabulary_ * int64_t(sizeof(float)));
    const int64_t most = problem.block_bytes > 0
                             ? std::max<int64_t>(1, problem.block_bytes / token_bytes)
                             : std::max(LEAST_TOKENS, BLOCK_BYTES / token_bytes);
    const int64_t blocks = std::max<int64_t>(1, (count_ + most - 1) / most);
    const int64_t even = (count_ + blocks - 1) / blocks;
    // Whole vectors of tokens, as far as there are so many.
    block_ = std::min(most, (even + WIDEST_VECTOR - 1) / WIDEST_VECTOR * WIDEST_VECTOR);
  }

  void run() {
    zero_uncounted(problem_.grad_hidden, problem_.terms.row_weights);
    prepare_sums();
    if (count_ > 0) {
      student_.reserve(block_ * vocabulary_);
      if (has_teacher_) teacher_.reserve(block_ * vocabulary_);
    }
    for (int64_t begin = 0; begin < count_; begin += block_) {
      run_block(begin, std::min(count_, begin + block_));
    }
    write_sums();
    rows_.finish();
  }

 private:
  bool wants_grad() const {
    return problem_.grad_hidden.data != nullptr || problem_.grad_head.data != nullptr ||
           problem_.grad_bias.data != nullptr;
  }

  // Sums over tokens: in the caller's memory where that is float32, else in ours.
  void prepare_sums() {
    if (problem_.grad_bias.data != nullptr) bias_sums_.assign(vocabulary_, 0.0);
    const Rows& head = problem_.grad_head;
    if (head.data == nullptr) return;
    const int64_t size = head.rows * head.columns;
    grad_head_ = head.dtype == Dtype::float32 ? static_cast<float*>(head.data)
                                              : own_grad_head_.reserve(size);
    advise_huge_pages(grad_head_, size * sizeof(float));
    if (count_ == 0) std::memset(grad_head_, 0, size * sizeof(float));
  }

  void write_sums() {
    const Rows& head = problem_.grad_head;
    if (grad_head_ != nullptr && grad_head_ != head.data) {
      torch::stable::parallel_for(0, head.rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          write_row(kernels_, grad_head_ + row * head.columns, head, row);
        }
      });
    }
    if (bias_sums_.empty()) return;
    const std::vector<float> rounded(bias_sums_.begin(), bias_sums_.end());
    write_row(kernels_, rounded.data(), problem_.grad_bias, 0);
  }

  void run_block(int64_t begin, int64_t end) {
    const int64_t tokens = end - begin;
    const Matrix hidden = fetch(
        kernels_, problem_.student.hidden, rows_.counted(), begin, end, student_hidden_);
    const Matrix logits = row_major<float>(student_.get(), tokens, vocabulary_);
    multiply_head(logits, hidden, problem_.student.head);
    if (has_teacher_) {
      const Matrix teacher_hidden = fetch(
          kernels_, problem_.teacher.hidden, rows_.counted(), begin, end, teacher_hidden_);
      multiply_head(
          row_major<float>(teacher_.get(), tokens, vocabulary_), teacher_hidden,
          problem_.teacher.head);
    }
    torch::stable::parallel_for(0, tokens, 1, [&](int64_t first, int64_t last) {
      OutputScratch scratch;
      const float* biases[2] = {
          bias_of(problem_.student.bias, scratch.student),
          bias_of(problem_.teacher.bias, scratch.teacher)};
      TopRow top(problem_.terms, problem_.top);
      for (int64_t index = first; index < last; ++index) {
        run_row(rows_.counted()[begin + index], index, biases, scratch, top);
      }
    });
    if (wants_grad()) multiply_gradients(logits, hidden, begin, end);
  }

  // dW += dS^T H and the like, every thread on entries of its own; dH = dS W in a sum per part.
  void multiply_gradients(
      const Matrix& gradient, const Matrix& hidden, int64_t begin, int64_t end) {
    const int64_t tokens = end - begin, width = hidden.columns;
    const bool wants_hidden = problem_.grad_hidden.data != nullptr;
    float* sums = wants_hidden ? grad_hidden_.reserve(parts_ * tokens * width) : nullptr;
    for_slices(problem_.student.head, [&](const Matrix& slice, int64_t first, const Part& part) {
      const Matrix columns = columns_of(gradient, first, slice.rows);
      SumScratch& scratch = sum_scratch_[part.index];
      if (wants_hidden) {
        const float* sum = sums + part.index * tokens * width;
        const Matrix out = row_major(sum, tokens, width);
        multiply_sum(kernels_, out, columns, slice, first > part.begin, scratch);
      }
      if (grad_head_ != nullptr) {
        const Matrix out = row_major<float>(grad_head_ + first * width, slice.rows, width);
        multiply_sum(kernels_, out, columns.transposed(), hidden, begin > 0, scratch);
      }
      if (!bias_sums_.empty()) add_bias_grad(columns, first);
    });
    if (wants_hidden) write_hidden_grad(sums, begin, end);
  }

  // In float64: a running sum over all tokens in float32 would lose bits.
  void add_bias_grad(const Matrix& gradient, int64_t first) {
    double* sums = bias_sums_.data() + first;
    for (int64_t token = 0; token < gradient.rows; ++token) {
      const float* row = gradient.data + token * gradient.row_stride;
      for (int64_t j = 0; j < gradient.columns; ++j) sums[j] += row[j];
    }
  }

  static Matrix columns_of(const Matrix& matrix, int64_t first, int64_t count) {
    return {matrix.data + first, matrix.rows, count, matrix.row_stride, 1};
  }

  const float* bias_of(const Rows& bias, Scratch& room) const {
    if (bias.data == nullptr) return nullptr;
    if (bias.dtype == Dtype::float32) return static_cast<const float*>(bias.data);
    float* out = room.reserve(bias.columns);
    kernels_.widen(bias.data, bias.dtype, bias.columns, out);
    return out;
  }

  void run_row(
      int64_t token, int64_t place, const float* const biases[2], OutputScratch& scratch,
      TopRow& top) {
    float* student = student_.get() + place * vocabulary_;
    if (biases[0] != nullptr) kernels_.add_scaled(biases[0], 1.0f, vocabulary_, student);
    ScoreRow row = rows_.row(token, scratch);
    row.student = row.grad = student;
    if (!has_teacher_) {
      rows_.record(token, top.score(token, row, float(rows_.weight(token)), wants_grad()));
      return;
    }
    float* teacher = teacher_.get() + place * vocabulary_;
    if (biases[1] != nullptr) kernels_.add_scaled(biases[1], 1.0f, vocabulary_, teacher);
    row.teacher = row.spare = teacher;
    rows_.score(token, row, wants_grad());
  }

  // out = hidden head^T
  void multiply_head(const Matrix& out, const Matrix& hidden, const Rows& head) {
    const int64_t panel = kernels_.panel;
    if (panel == 0) {
      for_slices(head, [&](const Matrix& slice, int64_t first, const Part&) {
        multiply(columns_of(out, first, slice.rows), hidden, slice.transposed());
      });
      return;
    }
    float* packed = packed_.reserve((hidden.rows + panel - 1) / panel * panel * hidden.columns);
    kernels_.pack_rows(hidden.data, hidden.row_stride, hidden.rows, hidden.columns, packed);
    for_slices(head, [&](const Matrix& slice, int64_t first, const Part&) {
      kernels_.multiply_rows(
          packed, hidden.rows, hidden.columns, slice.data, slice.row_stride, slice.rows,
          const_cast<float*>(out.data) + first, out.row_stride);
    });
  }

  void write_hidden_grad(float* sums, int64_t begin, int64_t end) {
    const Rows& grad = problem_.grad_hidden;
    const int64_t size = (end - begin) * grad.columns;
    for (int64_t part = 1; part < parts_; ++part) {
      kernels_.add_scaled(sums + part * size, 1.0f, size, sums);
    }
    for (int64_t row = begin; row < end; ++row, sums += grad.columns) {
      write_row(kernels_, sums, grad, rows_.counted()[row]);
    }
  }

  // What one thread has of the vocabulary.
  struct Part {
    int64_t index, begin, end;
  };

  // All rows of a head, in float32: work(slice, first row, part), the parts side by side.
  template <class Work>
  void for_slices(const Rows& head, const Work& work) const {
    const CountedRows all(head.rows);
    torch::stable::parallel_for(0, parts_, 1, [&](int64_t index, int64_t last) {
      Scratch room;
      for (; index < last; ++index) {
        const Part part = {index, head.rows * index / parts_, head.rows * (index + 1) / parts_};
        for (int64_t first = part.begin; first < part.end; first += SLICE) {
          const int64_t end = std::min(part.end, first + SLICE);
          work(fetch(kernels_, head, all, first, end, room), first, part);
        }
      }
    });
  }

  const RowKernels& kernels_;
  const LinearProblem& problem_;
  const OutputRows rows_;
  const int64_t count_, vocabulary_;
  const int64_t parts_;  // of the vocabulary, one per thread
  const bool has_teacher_;
  int64_t block_ = 0;
  Scratch student_, teacher_, packed_, student_hidden_, teacher_hidden_, grad_hidden_;
  Scratch own_grad_head_;
  std::vector<SumScratch> sum_scratch_;  // of each part
  float* grad_head_ = nullptr;
  std::vector<double> bias_sums_;
};

}  // namespace

void linear_kl(const LinearProblem& problem) { LinearRun(problem).run(); }

}  // namespace fakd
