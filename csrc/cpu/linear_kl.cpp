// KL of two LM heads from hidden states: logits exist as one float32 block of tokens, reused.
//
// For a block of R tokens: S = H_S W_S^T and T = H_T W_T^T; a row kernel turns S into its gradient
// and T into nothing; dH = dS W_S, dW_S += dS^T H_S. In all 2 N V (3 Ds + Dt) FLOPs; beyond the
// gradients 2 R V float32, and where W_S is not float32 up to 4 V Ds bytes more, 6 V Ds of more than
// 2 Ds tokens. Threads work through the vocabulary in slices that stay in their caches. A slice of the
// gradient gives way to the logits of the next block at once, while that of the head is at hand. Where
// hidden states and head are bfloat16 and the processor multiplies that, it takes them as they are;
// elsewhere they are widened to float32.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "head_gradient.h"
#include "head_products.h"
#include "head_slices.h"
#include "memory.h"
#include "output_rows.h"
#include "schedule.h"
#include "top_rows.h"

namespace fakd {
namespace {

// Tokens per block decide the speed of products: few tokens read both heads too often.
constexpr int64_t BLOCK_BYTES = 20 << 20, LEAST_TOKENS = 48;

class LinearRun {
 public:
  explicit LinearRun(const LinearProblem& problem)
      : kernels_(row_kernels()), problem_(problem), rows_(problem.terms),
        count_(rows_.counted().count()), vocabulary_(problem.terms.vocabulary), slices_(vocabulary_),
        has_teacher_(problem.teacher.head.rows > 0), student_products_(problem.student),
        teacher_products_(problem.teacher), block_(choose_block()),
        grad_head_(problem.grad_head, student_products_.is_tiled(), count_, block_),
        scratch_(slices_.workers()),
        biases_{
            bias_of(problem.student.bias, bias_rooms_[0]),
            bias_of(problem.teacher.bias, bias_rooms_[1])} {
    for (int64_t worker = 0; worker < torch::stable::get_num_threads(); ++worker) {
      row_rooms_.push_back({{}, {problem.terms, problem.top}});
    }
  }

  void run() {
    zero_uncounted(problem_.grad_hidden, problem_.terms.row_weights);
    if (problem_.grad_bias.data != nullptr) bias_sums_.assign(vocabulary_, 0.0);
    if (count_ > 0) {
      student_.reserve(block_ * vocabulary_);
      if (has_teacher_) teacher_.reserve(block_ * vocabulary_);
    }
    Block block;
    for (int64_t begin = 0; begin < count_; begin += block_) {
      const Block next = fetch_block(begin, std::min(count_, begin + block_));
      multiply_student(block, next);
      if (has_teacher_) multiply_teacher(next);
      block = next;
      run_rows(block);
    }
    if (wants_grad()) multiply_student(block, {});
    grad_head_.finish();
    write_bias_grad();
    rows_.finish();
  }

 private:
  // Tokens of a block: whole units of them, as far as there are so many.
  int64_t choose_block() const {
    const int64_t sides = has_teacher_ ? 2 : 1;
    const int64_t token_bytes = std::max<int64_t>(1, sides * vocabulary_ * int64_t(sizeof(float)));
    const bool is_tiled = student_products_.is_tiled();
    const int64_t unit = is_tiled ? TILE_DEPTH : WIDEST_VECTOR;
    int64_t most = problem_.block_bytes > 0 ? std::max<int64_t>(1, problem_.block_bytes / token_bytes)
                                           : std::max(LEAST_TOKENS, BLOCK_BYTES / token_bytes);
    if (problem_.block_bytes <= 0 && is_tiled) most = round_up(most, unit);
    const int64_t blocks = std::max<int64_t>(1, (count_ + most - 1) / most);
    const int64_t even = (count_ + blocks - 1) / blocks;
    return std::max<int64_t>(1, std::min(most, round_up(even, unit)));
  }

  bool wants_grad() const {
    return problem_.grad_hidden.data != nullptr || problem_.grad_head.data != nullptr ||
           problem_.grad_bias.data != nullptr;
  }

  // What a thread needs for rows of logits.
  struct RowRoom {
    OutputScratch scratch;
    TopRow top;
  };

  // Tokens in turn, and their hidden states as long as these are needed.
  struct Block {
    int64_t begin = 0, end = 0;
    Matrix student = {}, teacher = {};

    int64_t tokens() const { return end - begin; }
  };

  Block fetch_block(int64_t begin, int64_t end) {
    Block block = {begin, end};
    const auto& places = rows_.counted();
    Scratch& room = student_hidden_[begin / block_ % 2];  // the other has those of the last block
    block.student = fetch(kernels_, problem_.student.hidden, places, begin, end, room);
    if (has_teacher_) {
      block.teacher = fetch(
          kernels_, problem_.teacher.hidden, places, begin, end, teacher_hidden_);
    }
    return block;
  }

  Matrix logits(const Scratch& room, const Block& block) const {
    return row_major<float>(room.get(), block.tokens(), vocabulary_);
  }

  void run_rows(const Block& block) {
    const int64_t workers = std::min<int64_t>(int64_t(row_rooms_.size()), block.tokens());
    run_tasks(block.tokens(), workers, [&](int64_t index, int64_t worker) {
      run_row(rows_.counted()[block.begin + index], index, row_rooms_[worker]);
    });
  }

  // The gradients of a block, whose dS is in the place of its logits; then the logits of the next.
  void multiply_student(const Block& block, const Block& next) {
    const bool wants_grads = wants_grad() && block.tokens() > 0;
    const bool wants_hidden = wants_grads && problem_.grad_hidden.data != nullptr;
    const int64_t size = block.tokens() * block.student.columns;
    float* sums = wants_hidden ? grad_hidden_.reserve(slices_.parts() * size) : nullptr;
    if (wants_grads && grad_head_.is_wanted()) grad_head_.take(block.student, block.begin);
    student_products_.take_for_logits(next.student);
    const auto work = [&](const HeadSlice& slice, int64_t first, const Part& part, int64_t worker) {
      if (wants_grads) {
        float* sum = wants_hidden ? sums + part.index * size : nullptr;
        multiply_gradients(block, slice, first, part, sum, scratch_[worker]);
      }
      student_products_.multiply_logits(
          logits(student_, next).some_columns(first, slice.rows()), slice);
    };
    slices_.run(problem_.student.head, work);
    if (wants_hidden) write_hidden_grad(sums, block.begin, block.end);
  }

  void multiply_teacher(const Block& block) {
    teacher_products_.take_for_logits(block.teacher);
    slices_.run_alone(problem_.teacher.head, [&](const HeadSlice& slice, int64_t first) {
      teacher_products_.multiply_logits(
          logits(teacher_, block).some_columns(first, slice.rows()), slice);
    });
  }

  // dW += dS^T H and the like, every thread on entries of its own; dH = dS W in a sum per part.
  void multiply_gradients(
      const Block& block, const HeadSlice& slice, int64_t first, const Part& part,
      float* grad_hidden, HeadScratch& scratch) {
    const Matrix logits = this->logits(student_, block).some_columns(first, slice.rows());
    const LogitGradient gradient = student_products_.gradient(logits, scratch);
    if (grad_hidden != nullptr) {
      const Matrix sum = row_major<float>(grad_hidden, block.tokens(), block.student.columns);
      student_products_.multiply_gradient(gradient, slice, sum, first > part.begin, scratch);
    }
    if (grad_head_.is_wanted()) grad_head_.add(gradient, first, scratch);
    if (!bias_sums_.empty()) add_bias_grad(logits, first);
  }

  // In float64: a running sum over all tokens in float32 would lose bits.
  void add_bias_grad(const Matrix& gradient, int64_t first) {
    double* sums = bias_sums_.data() + first;
    for (int64_t token = 0; token < gradient.rows; ++token) {
      const float* row = gradient.data + token * gradient.row_stride;
      for (int64_t j = 0; j < gradient.columns; ++j) sums[j] += row[j];
    }
  }

  void write_bias_grad() {
    if (bias_sums_.empty()) return;
    const std::vector<float> rounded(bias_sums_.begin(), bias_sums_.end());
    write_row(kernels_, rounded.data(), problem_.grad_bias, 0);
  }

  const float* bias_of(const Rows& bias, Scratch& room) const {
    if (bias.data == nullptr) return nullptr;
    if (bias.dtype == Dtype::float32) return static_cast<const float*>(bias.data);
    float* out = room.reserve(bias.columns);
    kernels_.widen(bias.data, bias.dtype, bias.columns, out);
    return out;
  }

  void run_row(int64_t token, int64_t place, RowRoom& room) {
    float* student = student_.get() + place * vocabulary_;
    if (biases_[0] != nullptr) kernels_.add_scaled(biases_[0], 1.0f, vocabulary_, student);
    ScoreRow row = rows_.row(token, room.scratch);
    row.student = row.grad = student;
    if (!has_teacher_) {
      rows_.record(token, room.top.score(token, row, float(rows_.weight(token)), wants_grad()));
      return;
    }
    float* teacher = teacher_.get() + place * vocabulary_;
    if (biases_[1] != nullptr) kernels_.add_scaled(biases_[1], 1.0f, vocabulary_, teacher);
    row.teacher = row.spare = teacher;
    rows_.score(token, row, wants_grad());
  }

  void write_hidden_grad(float* sums, int64_t begin, int64_t end) {
    const Rows& grad = problem_.grad_hidden;
    const int64_t size = (end - begin) * grad.columns;
    for (int64_t part = 1; part < slices_.parts(); ++part) {
      kernels_.add_scaled(sums + part * size, 1.0f, size, sums);
    }
    for (int64_t row = begin; row < end; ++row, sums += grad.columns) {
      write_row(kernels_, sums, grad, rows_.counted()[row]);
    }
  }

  const RowKernels& kernels_;
  const LinearProblem& problem_;
  const OutputRows rows_;
  const int64_t count_, vocabulary_;
  const HeadSlices slices_;
  const bool has_teacher_;
  HeadProducts student_products_, teacher_products_;
  const int64_t block_;
  Scratch student_, teacher_, student_hidden_[2], teacher_hidden_, grad_hidden_;
  HeadGradient grad_head_;
  std::vector<HeadScratch> scratch_;  // of each worker
  std::vector<RowRoom> row_rooms_;    // likewise
  Scratch bias_rooms_[2];
  const float* biases_[2];  // of student and teacher
  std::vector<double> bias_sums_;
};

}  // namespace

void linear_kl(const LinearProblem& problem) { LinearRun(problem).run(); }

}  // namespace fakd
