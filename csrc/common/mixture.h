// The mixture of the Jensen-Shannon divergence, beta T + (1 - beta) S.
#pragma once

namespace fakd {

// The shares of both sides. They add up to exactly 1 in float32, so that the mixture of equal sides is
// equal to them, and the smaller is rounded once: 1 - beta of a beta in float32 would keep none of its
// digits where beta is close to 1.
struct Mixture {
  float teacher = 0.5f, student = 0.5f;
};

inline Mixture mixture_of(double beta) {
  const float smaller = float(beta < 0.5 ? beta : 1.0 - beta);
  return beta < 0.5 ? Mixture{smaller, 1.0f - smaller} : Mixture{1.0f - smaller, smaller};
}

}  // namespace fakd
