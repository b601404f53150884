// A row of the student's logits against the few entries that an offline teacher has stored.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "output_kl.h"
#include "row_kernels.h"

namespace fakd {

// One stored entry: its place in the row, the student's logit and the teacher's log-probability.
struct TopEntry {
  int64_t index;
  double logit, log_teacher;
  double student = 0, teacher = 0;  // exponentials
};

class TopRow {
 public:
  TopRow(const OutputTerms& terms, const TopEntries& top)
      : kernels_(row_kernels()), terms_(terms), top_(top) {}

  // `row.grad` holds the student's logits and becomes the gradient by them.
  ScoreValues score(int64_t token, const ScoreRow& row, float weight, bool wants_grad) {
    const double gain = double(weight) * terms_.kl_coefficient;
    const double label_gain = double(weight) * terms_.label_coefficient;
    float* x = row.grad;
    // The logits may have been capped; from here on they are what softmax sees.
    if (terms_.student.softcap > 0) {
      kernels_.cap_row(x, row.n, terms_.student.scale, terms_.student.softcap, x, row.slope);
    }
    read(token, x);
    const double label_logit = row.label < 0 ? 0 : x[row.label];
    ScoreValues values =
        top_.has_ghost ? with_ghost(row, label_logit, gain, label_gain, wants_grad)
                       : without_ghost(row, label_logit, gain, label_gain, wants_grad);
    if (wants_grad && terms_.student.softcap > 0) kernels_.multiply_row(row.slope, row.n, x);
    return values;
  }

 private:
  void read(int64_t token, const float* x) {
    entries_.clear();
    for (int64_t place = token * top_.count; place < (token + 1) * top_.count; ++place) {
      const int64_t index = top_.indices[place];
      if (index >= 0) entries_.push_back({index, x[index], top_.log_probabilities[place]});
    }
  }

  // T (log T - log S), 0 where T is 0.
  static double term(double t, double log_t, double log_s) {
    return t == 0 ? 0 : t * (log_t - log_s);
  }

  // The stored entries and, as one outcome, all others; temperature 1. Others have the gradient
  // S_i (1 - T_g / S_g), g the ghost.
  ScoreValues with_ghost(
      const ScoreRow& row, double label_logit, double gain, double label_gain, bool wants_grad) {
    float* x = row.grad;
    double teacher_mass = 0, most = -INFINITY;
    for (TopEntry& entry : entries_) {
      entry.teacher = std::exp(entry.log_teacher);
      teacher_mass += entry.teacher;
      most = std::max(most, entry.logit);
      x[entry.index] = -INFINITY;
    }
    const ScoreSide plain;
    const bool has_others = int64_t(entries_.size()) < row.n;
    const Powers others = has_others ? kernels_.powers_row(x, row.n, plain, nullptr) : Powers{};
    const double log_others = has_others ? others.most + std::log(others.sum) : -INFINITY;
    most = std::max(most, log_others);
    double student_mass = has_others ? std::exp(log_others - most) : 0.0;
    for (TopEntry& entry : entries_) {
      entry.student = std::exp(entry.logit - most);
      student_mass += entry.student;
    }
    const double log_all = most + std::log(student_mass);
    // Rounded probabilities may exceed 1 together: the teacher's outcomes are scaled to sum to it.
    double teacher_ghost = has_others ? std::max(0.0, 1.0 - teacher_mass) : 0.0;
    teacher_mass += teacher_ghost;
    teacher_ghost /= teacher_mass;
    const double log_mass = std::log(teacher_mass);
    const double student_ghost = std::exp(log_others - log_all);
    ScoreValues values;
    if (teacher_ghost > 0) {
      values.distance = teacher_ghost * (std::log(teacher_ghost) - (log_others - log_all));
    }
    for (const TopEntry& entry : entries_) {
      values.distance += term(
          entry.teacher / teacher_mass, entry.log_teacher - log_mass, entry.logit - log_all);
    }
    if (row.label >= 0) values.cross_entropy = log_all - label_logit;
    if (!wants_grad) return values;
    if (row.label < 0) label_gain = 0;
    if (has_others) {
      const double by_power =
          (gain * (student_ghost - teacher_ghost) + label_gain * student_ghost) / others.sum;
      kernels_.scale(x, float(by_power), row.n, x);
    }
    for (const TopEntry& entry : entries_) {
      const double s = entry.student / student_mass, t = entry.teacher / teacher_mass;
      x[entry.index] = float(gain * (s - t) + label_gain * s);
    }
    if (row.label >= 0) x[row.label] -= float(label_gain);
    return values;
  }

  // Both distributions over the stored entries alone, at the temperature; cross-entropy over all.
  ScoreValues without_ghost(
      const ScoreRow& row, double label_logit, double gain, double label_gain, bool wants_grad) {
    float* x = row.grad;
    ScoreValues values;
    double by_power = 0;
    if (row.label >= 0) {
      const Powers all = kernels_.powers_row(x, row.n, ScoreSide{}, nullptr);
      values.cross_entropy = std::log(all.sum) - (label_logit - all.most);
      by_power = label_gain / all.sum;
    }
    if (wants_grad) {
      if (row.label >= 0) kernels_.scale(x, float(by_power), row.n, x);
      else std::fill(x, x + row.n, 0.0f);
      if (row.label >= 0) x[row.label] -= float(label_gain);
    }
    const double tau = terms_.student.inverse_temperature;
    double most_s = -INFINITY, most_t = -INFINITY;
    for (const TopEntry& entry : entries_) {
      most_s = std::max(most_s, entry.logit * tau);
      most_t = std::max(most_t, entry.log_teacher * tau);
    }
    double sum_s = 0, sum_t = 0;
    for (TopEntry& entry : entries_) {
      sum_s += entry.student = std::exp(entry.logit * tau - most_s);
      sum_t += entry.teacher = std::exp(entry.log_teacher * tau - most_t);
    }
    const double log_s = most_s + std::log(sum_s), log_t = most_t + std::log(sum_t);
    for (const TopEntry& entry : entries_) {
      const double s = entry.student / sum_s, t = entry.teacher / sum_t;
      values.distance += term(t, entry.log_teacher * tau - log_t, entry.logit * tau - log_s);
      if (wants_grad) x[entry.index] += float(gain * tau * (s - t));
    }
    return values;
  }

  const RowKernels& kernels_;
  const OutputTerms& terms_;
  const TopEntries& top_;
  std::vector<TopEntry> entries_;
};

}  // namespace fakd
