"""What the kernels do to a tile of two maps: device functions, and the mathematics behind them.

The divergences of scores are those of logits, `_triton_logits`, whose statistics and gradients
serve here too; "mse", and maps that are averaged over heads, stand here alone.
"""

import triton
import triton.language as tl

from ...._triton_logits import (
    LN_2,
    LOG2_E,
    Gains,
    Mixture,
    Stats,
    add_tile,
    against_middle,
    middle_terms,
    tile_gradient,
    weighed,
)

LEAST_PROBABILITY = tl.constexpr(2.0**-126)  # as `problem.LEAST`
_HALF = tl.constexpr(0.5)  # of "jsd"


@triton.jit
def power(below, inverse_temperature):
    """exp(below / temperature), whose error does not grow with it: for "mse", whose gradient is of
    the second order in the probabilities."""
    x = below * inverse_temperature
    x = tl.where(x < -200.0, -200.0, x)  # a NaN stays
    whole = tl.floor(x * LOG2_E + 0.5)
    # log(2) in two parts, of which the first has few bits: the product is exact.
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4
    return tl.exp2(whole) * tl.exp2(rest * LOG2_E)


@triton.jit
def add_scores(stats, s, t, cols, inverse_temperature, FORM: tl.constexpr):
    """The statistics of rows of scores with a tile more."""
    if FORM.distance == "mse":
        top_s = tl.maximum(stats.top_s, tl.max(s, 1))
        top_t = tl.maximum(stats.top_t, tl.max(t, 1))
        sum_s = stats.sum_s * power(stats.top_s - top_s, inverse_temperature)
        sum_t = stats.sum_t * power(stats.top_t - top_t, inverse_temperature)
        sum_s += tl.sum(power(s - top_s[:, None], inverse_temperature), 1)
        sum_t += tl.sum(power(t - top_t[:, None], inverse_temperature), 1)
        zero = stats.moment
        stats = Stats(top_s, top_t, sum_s, sum_t, zero, zero, zero, zero)
    else:
        stats = add_tile(stats, s, t, cols, 0, inverse_temperature * LOG2_E, FORM)
    return stats


@triton.jit
def gap_terms(stats, s, t, balance, inverse_temperature):
    """exp(s), and (P_s - P_t) times the student's sum, of "mse"."""
    share = power(s - stats.top_s[:, None], inverse_temperature)
    other = power(t - stats.top_t[:, None], inverse_temperature)
    return share, share - other * balance[:, None]


@triton.jit
def second_sweep(stats, s, t, balance, inverse_temperature, FORM: tl.constexpr):
    """What a tile adds to the value and to the center of "jsd" and "mse", see `finish`."""
    if FORM.distance == "mse":
        share, gap = gap_terms(stats, s, t, balance, inverse_temperature)
        value, center = tl.sum(gap * gap, 1), tl.sum(gap * share, 1)
    else:
        scale = inverse_temperature * LOG2_E
        mixture = Mixture(_HALF, _HALF)
        value, center, _share, _by = middle_terms(stats, s, t, balance, scale, mixture)
    return value, center


@triton.jit
def finish(stats, value, center, FORM: tl.constexpr):
    """Value and center of "jsd" and "mse" from what a second sweep added up."""
    center /= stats.sum_s
    if FORM.distance == "mse":
        value = value / stats.sum_s / stats.sum_s
        center /= stats.sum_s  # of probabilities, not of their differences times the sum
    else:
        value = (value / stats.sum_t + center) * LN_2
    return value, center


@triton.jit
def scores_gradient(
    stats, s, t, cols, balance, center, gain, inverse_temperature, FORM: tl.constexpr
):
    """d loss / d scores of a tile; `gain` has `RowDistance.by_share` in it."""
    if FORM.distance == "mse":
        share, gap = gap_terms(stats, s, t, balance, inverse_temperature)
        grad = share * (gap / stats.sum_s[:, None] - center[:, None]) * gain[:, None]
    else:
        scale, gains = inverse_temperature * LOG2_E, Gains(gain, gain, gain)
        mixture = Mixture(_HALF, _HALF)
        grad = tile_gradient(stats, s, t, s, cols, 0, balance, center, gains, scale, mixture, FORM)
    return grad


@triton.jit
def log_1_plus(x):
    """log(1 + x), accurate where x is small: the rounding of the sum is divided out."""
    above = 1 + x
    return tl.where(above == 1, x, tl.log(above) * (x / (above - 1)))


@triton.jit
def log_ratio(x, y):
    """x / y and its logarithm, accurate where they are close: the rounding of the ratio is divided
    out, as in `log_1_plus`."""
    ratio = tl.div_rn(x, y)
    held = tl.where(ratio < LEAST_PROBABILITY, LEAST_PROBABILITY, ratio)
    held = tl.where(held > 3e38, 3e38, held)
    less = held - 1
    log = tl.log(held)
    log *= tl.where(tl.abs(less) < 0.5, (x - y) / y / less, 1.0)
    return ratio, tl.where(less == 0, (x - y) / y, log)


@triton.jit
def probability_terms(s, t, DISTANCE: tl.constexpr):
    """What elements of two maps of probabilities add to the distance, and the gradient."""
    is_moved = (s < LEAST_PROBABILITY) == 0  # a NaN is
    s = tl.where(is_moved, s, LEAST_PROBABILITY)
    t = tl.where(t < LEAST_PROBABILITY, LEAST_PROBABILITY, t)
    if DISTANCE == "mse":
        gap = s - t
        value, grad = gap * gap, 2 * gap
    elif DISTANCE == "kl":
        ratio, above = log_ratio(t, s)
        value, grad = t * above, -ratio
    elif DISTANCE == "reverse_kl":
        _ratio, above = log_ratio(s, t)
        value, grad = s * above, above + 1
    else:
        # Logarithms against the middle: where the sides are close, those of s and t would cancel.
        of_s, of_t = -log_1_plus(0.5 * (t - s) / s), -log_1_plus(0.5 * (s - t) / t)
        value, grad = 0.5 * (s * of_s + t * of_t), 0.5 * of_s
    return value, tl.where(is_moved, grad, 0.0)


@triton.jit
def mean_terms(top_s, share_s, top_t, share_t, DISTANCE: tl.constexpr):
    """What elements of averaged maps exp2(top) * share add to the distance, and its derivative `by`
    the student's, up to a constant of the row; in units of log 2, those of "mse" of 1.

    For "kl", whose -t / p overflows where p underflows, `by` is log2(t / p): see `weigh`.
    """
    p, t = tl.exp2(top_s) * share_s, tl.exp2(top_t) * share_t
    if DISTANCE == "mse":
        gap = p - t
        value, by = gap * gap, 2 * gap
    else:
        ratio = (top_s - top_t) + (tl.log2(share_s) - tl.log2(share_t))
        if DISTANCE == "kl":
            # Below what an excluded score is away: its own probability stays 0.
            by = tl.minimum(-ratio, 1e28)
            value = weighed(t, -ratio)
        elif DISTANCE == "reverse_kl":
            by = ratio
            value = weighed(p, by)
        else:
            of_p, of_t = against_middle(ratio, Mixture(_HALF, _HALF))
            by = of_p * 0.5
            value = weighed(p, by) + weighed(t, of_t * 0.5)
    return value, by


@triton.jit
def weigh(below, by, DISTANCE: tl.constexpr):
    """p and p times the derivative by it, where exp2(below) is p, or p times the sum of its row.

    For "kl" the constant is chosen so that equal maps give exactly 0: p (1 - t / p).
    """
    p = tl.exp2(below)
    weighted = p - tl.exp2(below + by) if DISTANCE == "kl" else weighed(p, by)
    return p, weighted
