// Rows of logits, shared by the ops on outputs: distance, cross-entropy and gradient of a token.
#pragma once

#include "output_kl.h"
#include "row_kernels.h"

namespace fakd {

// Room for what a row kernel needs beside the logits of both sides.
struct OutputScratch {
  Scratch slope, label_powers, student, teacher;
};

class OutputRows {
 public:
  explicit OutputRows(const OutputTerms& terms)
      : kernels_(row_kernels()), terms_(terms), counted_(terms.tokens, terms.row_weights) {}

  const CountedRows& counted() const { return counted_; }

  double weight(int64_t token) const {
    return terms_.row_weights == nullptr ? 1.0 : double(terms_.row_weights[token]);
  }

  // A row of logits of both sides, as `score_row` wants it.
  ScoreRow row(int64_t token, OutputScratch& scratch) const {
    ScoreRow row{};
    row.n = terms_.vocabulary;
    row.student_side = terms_.student;
    row.teacher_side = terms_.teacher;
    row.distance = terms_.distance;
    row.mixture = terms_.mixture;
    if (terms_.student.softcap > 0) row.slope = scratch.slope.reserve(row.n);
    if (terms_.labels != nullptr) {
      row.label = terms_.labels[token];
      row.label_powers = scratch.label_powers.reserve(row.n);
    }
    return row;
  }

  // Gains of a token's gradient: weight times the coefficient of each term.
  void score(int64_t token, const ScoreRow& row, bool wants_grad) const {
    const float weight = float(this->weight(token));
    record(token, kernels_.score_row(
        row, weight * terms_.kl_coefficient, weight * terms_.label_coefficient, wants_grad));
  }

  void record(int64_t token, const ScoreValues& values) const {
    terms_.per_token[2 * token] = float(values.distance);
    terms_.per_token[2 * token + 1] = float(values.cross_entropy);
  }

  // Sums over all tokens in their order, so that they do not depend on threads; float64 of values
  // that were rounded to float32 one by one.
  void finish() const {
    double sums[2] = {0, 0};
    for (int64_t token = 0; token < terms_.tokens; ++token) {
      const double weight = this->weight(token);
      for (int term = 0; term < 2; ++term) {
        float& value = terms_.per_token[2 * token + term];
        if (weight == 0) value = 0;
        else sums[term] += weight * value;
      }
    }
    terms_.sums[0] = float(sums[0]);
    terms_.sums[1] = float(sums[1]);
  }

 private:
  const RowKernels& kernels_;
  const OutputTerms& terms_;
  const CountedRows counted_;
};

}  // namespace fakd
