"""What the kernels do to a tile of scores: device functions, and the mathematics behind them.

Scores are in units of log 2, s = outer * tanh(inner * q.k) with a softcap and inner * q.k without,
so that exp(score) is one exp2. Both sides go through the same instructions, hence equal sides give
equal bits, and gradients of exactly 0.
"""

import triton
import triton.language as tl

# A score that does not count, on either side: its probability underflows to 0, and differences of
# two are 0, where infinities would give NaN.
MASKED = tl.constexpr(-3.4028234663852886e38)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def renew(top, total, s):
    """Online softmax of rows, with a tile of scores more.

    Returns the new maximum and sum, the factor of the old sum in it, the exponentials of the tile,
    and its scores below the maximum.
    """
    above = tl.maximum(top, tl.max(s, 1))
    shrink = tl.exp2(top - above)
    below = s - above[:, None]
    share = tl.exp2(below)
    return above, total * shrink + tl.sum(share, 1), shrink, share, below


@triton.jit
def against_middle(ratio):
    """log2(p / m) and log2(t / m), m = (p + t) / 2, from log2(p / t): neither overflows."""
    common = 1 - tl.log2(1 + tl.exp2(-tl.abs(ratio)))
    return common + tl.minimum(ratio, 0.0), common - tl.maximum(ratio, 0.0)


@triton.jit
def terms(log_p, log_t, ratio, DISTANCE: tl.constexpr):
    """What elements add to the distance, and its derivative `by` p, up to a constant of the row.

    Student and teacher probabilities are given by their logarithms to base 2, and that of p / t;
    results are in units of log 2, those of "mse" of 1. For "kl", whose -t / p overflows where p
    underflows, `by` is log2(t / p) instead: see `weigh`.
    """
    if DISTANCE == "kl":
        by = -ratio
        value = tl.exp2(log_t) * by
    elif DISTANCE == "reverse_kl":
        by = ratio
        value = tl.exp2(log_p) * by
    elif DISTANCE == "mse":
        gap = tl.exp2(log_p) - tl.exp2(log_t)
        by = 2 * gap
        value = gap * gap
    else:
        of_p, of_t = against_middle(ratio)
        by = of_p * 0.5
        value = tl.exp2(log_p) * by + tl.exp2(log_t) * of_t * 0.5
    return value, by


@triton.jit
def weigh(below, by, DISTANCE: tl.constexpr):
    """p times the derivative by p, where exp2(below) is p, or p times the sum of its row.

    Its sum over a row is the `center` that softmax takes off. For "kl" the constant is chosen so
    that equal maps give exactly 0: p (1 - t / p).
    """
    p = tl.exp2(below)
    return p - tl.exp2(below + by) if DISTANCE == "kl" else p * by


@triton.jit
def score_gradient(s, t, share, balance, center, DISTANCE: tl.constexpr):
    """d distance / d s, times the sum of the row, for scores below the maxima of their rows.

    `balance` is Z^S / Z^T of the rows' sums, or its logarithm where the distance is one of
    logarithms. Equal sides have s = t, a balance of 1 or 0, and give exactly 0.
    """
    if DISTANCE == "kl":
        result = tl.exp2(s) - tl.exp2(t) * balance
    elif DISTANCE == "mse":
        p = tl.exp2(s)
        result = p * (2 * share * (p - tl.exp2(t) * balance) - center)
    elif DISTANCE == "reverse_kl":
        result = tl.exp2(s) * (s - t - balance - center)
    else:
        of_p, _ = against_middle(s - t - balance)
        result = tl.exp2(s) * (of_p * 0.5 - center)
    return result
