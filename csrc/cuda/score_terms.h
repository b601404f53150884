// The dual-softmax family in float32: what a row of scores of both sides adds up to, and from there
// its distance, its cross-entropy and its gradient.
//
// Scores stay as they are, less the maximum so far (`below`); the temperature only enters where
// exponentials are taken, so that one sweep serves the distance at its temperature and the
// cross-entropy at 1. With z = exp(below / temperature) and Z its sum, P = z / Z:
//   kl          KL(T||S) = sum z_t (t - s) / Z_t + log(Z_s / Z_t)     ds = (z_s - z_t Z_s / Z_t) / Z_s
//   reverse_kl  KL(S||T) = sum z_s (s - t) / Z_s - log(Z_s / Z_t)     ds = P_s (s - t - its mean)
//   mse         sum D^2, D = P_s - P_t                                ds = 2 P_s (D - sum P_s D)
//   jsd         from log(P_s / M) and log(P_t / M), M the mixture     ds = P_s (log(P_s / M) - its mean)
// Both sides go through the same instructions: equal sides give equal bits, and a gradient of kl of
// exactly 0. An entry of probability 0 adds 0 to what it would weigh, whatever that is: the
// difference of two scores of -inf is NaN.
#pragma once

#include "row_team.h"
#include "score_rows.h"

namespace fakd::cuda {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
// Below every score: the maximum of no scores, from which differences are finite.
constexpr float NO_SCORE = -3.4028234663852886e38f;

// share * x, 0 where share is.
__device__ __forceinline__ float weighed(float share, float x) {
  return share == 0 ? 0.0f : share * x;
}

__device__ __forceinline__ float sum_of(const float (&x)[OCTET]) {
  static_assert(OCTET == 8);
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// log2(p / m) and log2(t / m) of their mixture m, from log2(p / t). Neither overflows, and both are 0
// where the ratio is.
struct AgainstMiddle {
  float student, teacher;

  __device__ __forceinline__ AgainstMiddle(float ratio, const Mixture& mixture) {
    const float larger = ratio < 0 ? mixture.teacher : mixture.student;
    const float smaller = ratio < 0 ? mixture.student : mixture.teacher;
    const float common = -log2f(larger + smaller * exp2f(-fabsf(ratio)));
    student = common + (ratio < 0 ? ratio : 0.0f);
    teacher = common - (ratio > 0 ? ratio : 0.0f);
  }
};

// What concerns all rows of a launch.
struct Settings {
  float inverse_temperature;
  Mixture mixture;
  float scale;  // of exponents of 2: log2(e) / temperature
  bool has_labels, is_warm;  // whether the cross-entropy has another temperature

  __device__ __forceinline__ explicit Settings(const ScoreParams& params)
      : inverse_temperature(params.inverse_temperature), mixture(params.mixture),
        scale(params.inverse_temperature * LOG2_E), has_labels(params.labels != nullptr),
        is_warm(has_labels && params.inverse_temperature != 1) {}

  // The rounding of a scaled score grows with the score. Gradients of mse, of the second order in
  // the probabilities, show it: there the slower expf, which rounds nothing before.
  template <Distance DISTANCE>
  __device__ __forceinline__ float power(float below) const {
    if constexpr (DISTANCE == Distance::mse) return expf(below * inverse_temperature);
    return exp2f(below * scale);
  }
};

// Of the octets that a thread has seen; of its row, once the team has met.
template <Distance DISTANCE>
struct RowStats {
  float top_s = NO_SCORE, top_t = NO_SCORE;
  // Of reverse_kl: the teacher's score where the student's is largest. The moment is below it: the
  // likeliest entry then weighs 0, where its gradient, P (s - t - mean), would be a difference of
  // two numbers that are nearly the same. Any serves where the teacher excludes that entry.
  float pivot = 0;
  float sum_s = 0, sum_t = 0;
  float moment = 0;  // kl: sum of z_t (t - s); reverse_kl: of z_s (s - t); both below their maxima
  float sum_ce = 0;  // as sum_s, at temperature 1
  float label_score = 0;

  // The larger maximum, with its pivot.
  static __device__ __forceinline__ void meet(float (&mine)[3], const float (&other)[3]) {
    if (other[0] > mine[0] || (other[0] == mine[0] && other[2] > mine[2])) mine[2] = other[2];
    mine[0] = fmaxf(mine[0], other[0]);
    mine[1] = fmaxf(mine[1], other[1]);
  }

  // The sums below larger maxima.
  __device__ __forceinline__ void rise(const float (&to)[3], const Settings& by) {
    const float shrink_s = by.template power<DISTANCE>(top_s - to[0]);
    const float shrink_t = by.template power<DISTANCE>(top_t - to[1]);
    if constexpr (DISTANCE == Distance::kl) {
      const float apart = (top_t - top_s) - (to[1] - to[0]);
      moment = weighed(shrink_t, moment + apart * sum_t);
    } else if constexpr (DISTANCE == Distance::reverse_kl) {
      const float apart = (top_s - to[0]) - (pivot - to[2]);
      moment = weighed(shrink_s, moment + apart * sum_s);
    }
    if (by.is_warm) sum_ce *= exp2f((top_s - to[0]) * LOG2_E);
    sum_s *= shrink_s;
    sum_t *= shrink_t;
    top_s = to[0];
    top_t = to[1];
    pivot = to[2];
  }

  __device__ __forceinline__ void add(
      int column, const float (&s)[OCTET], const float (&t)[OCTET], int label,
      const Settings& by) {
    float to[3] = {top_s, top_t, pivot};
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
      if (DISTANCE == Distance::reverse_kl && s[j] > to[0] && t[j] > -INFINITY) to[2] = t[j];
      to[0] = fmaxf(to[0], s[j]);
      to[1] = fmaxf(to[1], t[j]);
    }
    rise(to, by);
    // Added up as a tree: after a share of 1, the likeliest entry's, every sum rounds like that.
    float shares_s[OCTET], shares_t[OCTET], moments[OCTET], shares_ce[OCTET];
#pragma unroll
    for (int j = 0; j < OCTET; ++j) {
      const float below_s = s[j] - top_s, below_t = t[j] - top_t;
      shares_s[j] = by.template power<DISTANCE>(below_s);
      shares_t[j] = by.template power<DISTANCE>(below_t);
      if constexpr (DISTANCE == Distance::kl) moments[j] = weighed(shares_t[j], below_t - below_s);
      if constexpr (DISTANCE == Distance::reverse_kl) {
        moments[j] = weighed(shares_s[j], below_s - (t[j] - pivot));
      }
      shares_ce[j] = by.is_warm ? exp2f(below_s * LOG2_E) : 0.0f;
    }
    sum_s += sum_of(shares_s);
    sum_t += sum_of(shares_t);
    if constexpr (DISTANCE == Distance::kl || DISTANCE == Distance::reverse_kl) {
      moment += sum_of(moments);
    }
    if (by.is_warm) sum_ce += sum_of(shares_ce);
    // Not a load of its own: where the gradient replaces the logits, it might come too late.
    if (by.has_labels && label >= column && label < column + OCTET) {
#pragma unroll
      for (int j = 0; j < OCTET; ++j) {
        if (column + j == label) label_score = s[j];
      }
    }
  }

  template <class Team>
  __device__ __forceinline__ void meet(Team& team, const Settings& by) {
    // A thread that has seen nothing has no pivot to give.
    float tops[3] = {top_s, top_t, top_s == NO_SCORE ? -INFINITY : pivot};
    team.reduce(tops, [](float (&mine)[3], const float (&other)[3]) { meet(mine, other); });
    if (tops[2] == -INFINITY) tops[2] = 0;
    rise(tops, by);
    float sums[5] = {sum_s, sum_t, moment, sum_ce, label_score};
    team.add_up(sums);
    sum_s = sums[0];
    sum_t = sums[1];
    moment = sums[2];
    sum_ce = by.is_warm ? sums[3] : sums[0];
    label_score = sums[4];
  }
};

// Of a row whose statistics are whole: its distance, and the gradient of an element of it.
template <Distance DISTANCE>
struct RowDistance {
  const RowStats<DISTANCE>& row;
  const Settings& by;
  // Z_s / Z_t, its logarithm to base 2 for jsd: closer than a difference of logarithms where the
  // sides are close, exactly 1 and 0 where they are equal.
  float balance;
  float center = 0;  // the mean of what the probabilities of the student are multiplied by
  float value = 0;

  __device__ __forceinline__ RowDistance(const RowStats<DISTANCE>& row, const Settings& by)
      : row(row), by(by), balance(row.sum_s / row.sum_t) {
    if constexpr (DISTANCE == Distance::kl) {
      value = row.moment / row.sum_t * by.inverse_temperature + log2f(balance) * LN_2;
    } else if constexpr (DISTANCE == Distance::reverse_kl) {
      center = row.moment / row.sum_s;
      value = (center + (row.top_t - row.pivot)) * by.inverse_temperature - log2f(balance) * LN_2;
    } else if constexpr (DISTANCE == Distance::jsd) {
      balance = log2f(balance);
    }
  }

  static constexpr bool NEEDS_SWEEP = DISTANCE == Distance::jsd || DISTANCE == Distance::mse;

  // What the sweep between adds up: the value's part without the center, and the center.
  __device__ __forceinline__ void add(float s, float t, float (&sums)[2]) const {
    const float share_s = by.template power<DISTANCE>(s - row.top_s);
    if constexpr (DISTANCE == Distance::jsd) {
      const AgainstMiddle against = against_middle(s, t);
      const float share_t = by.template power<DISTANCE>(t - row.top_t);
      sums[0] += weighed(share_t, by.mixture.teacher * against.teacher);
      sums[1] += weighed(share_s, by.mixture.student * against.student);
    } else {
      const float apart = difference(share_s, t);
      sums[0] += apart * apart;
      sums[1] += apart * share_s;
    }
  }

  __device__ __forceinline__ void finish(const float (&sums)[2]) {
    center = sums[1] / row.sum_s;
    if constexpr (DISTANCE == Distance::jsd) {
      value = (sums[0] / row.sum_t + center) * LN_2;
    } else {
      // Of differences that are not divided by Z_s yet.
      center /= row.sum_s;
      value = sums[0] / row.sum_s / row.sum_s;
    }
  }

  // What `gradient` leaves to be multiplied by.
  __device__ __forceinline__ float factor() const {
    const float by_share = by.inverse_temperature / row.sum_s;
    if constexpr (DISTANCE == Distance::kl) return by_share;
    if constexpr (DISTANCE == Distance::reverse_kl) return by_share * by.inverse_temperature;
    if constexpr (DISTANCE == Distance::jsd) return by_share * LN_2;
    return by_share * 2;
  }

  __device__ __forceinline__ float gradient(float s, float t) const {
    const float share = by.template power<DISTANCE>(s - row.top_s);
    if constexpr (DISTANCE == Distance::kl) return difference(share, t);
    if constexpr (DISTANCE == Distance::reverse_kl) {
      return weighed(share, (s - row.top_s) - (t - row.pivot) - center);
    }
    if constexpr (DISTANCE == Distance::jsd) {
      return weighed(share, by.mixture.student * against_middle(s, t).student - center);
    }
    return share * (difference(share, t) / row.sum_s - center);
  }

 private:
  // (P_s - P_t) Z_s
  __device__ __forceinline__ float difference(float share_s, float t) const {
    return share_s - by.template power<DISTANCE>(t - row.top_t) * balance;
  }

  __device__ __forceinline__ AgainstMiddle against_middle(float s, float t) const {
    const float apart = (s - row.top_s) - (t - row.top_t);
    return AgainstMiddle(apart * by.scale - balance, by.mixture);
  }
};

}  // namespace fakd::cuda
