"""What the row kernels of outputs do to a tile of logits: device functions, and their mathematics.

A row is swept tile by tile with running maxima. Logits stay as they are, less the maximum so far
(`below`); temperature only enters where exponentials are taken, exp2(below * scale), so that one
sweep serves the distance at its temperature and the cross-entropy at 1. Both sides go through the
same instructions, hence equal sides give equal bits, and a gradient of "kl" of exactly 0.

An entry of probability 0 adds 0 to what it would weigh, whatever that is: the difference of two
logits of -inf is NaN.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._triton import tanh

# Below every logit: the maximum of no logits, from which differences are finite.
LEAST = tl.constexpr(-3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class RowForm(NamedTuple):
    """What is compiled into the row kernel."""

    distance: str
    wants_grad: bool
    has_labels: bool
    has_weights: bool
    is_warm: bool  # the cross-entropy has another temperature than the distance
    is_student_capped: bool
    is_teacher_capped: bool
    has_student_bias: bool
    has_teacher_bias: bool
    is_wide: bool  # a row is more than a tile
    is_aligned: bool  # strides and what may be read of a row are multiples of 16 entries
    is_interpreted: bool


class Side(NamedTuple):
    """Rows of one side, and how their logits are made."""

    ptrs: tl.tensor  # [BLOCK_N, BLOCK_V], of the first tile
    bias_ptr: tl.tensor
    softcap: tl.tensor
    inverse_softcap: tl.tensor
    vocab: tl.tensor
    padded: tl.tensor  # columns that may be read, vocab at least


class Mixture(NamedTuple):
    """Shares of both sides in that of "jsd", see `_triton_outputs.mixture_of`."""

    teacher: tl.tensor
    student: tl.tensor


class Stats(NamedTuple):
    """Of rows, [BLOCK_N] each, over the tiles so far."""

    top_s: tl.tensor
    top_t: tl.tensor
    sum_s: tl.tensor  # of exponentials below the maximum, at the temperature
    sum_t: tl.tensor
    pivot: tl.tensor  # "reverse_kl": the teacher's logit where the student's is largest
    moment: tl.tensor  # "kl": sum of exp(t) (t - s); "reverse_kl": of exp(s) (s - t)
    sum_ce: tl.tensor  # as sum_s, at temperature 1
    label_logit: tl.tensor


@triton.jit
def known_multiple(size, IS_ALIGNED: tl.constexpr):
    """A multiple of 16, so that the compiler sees it: of hints on arguments it makes nothing."""
    if IS_ALIGNED:
        size = size // 16 * 16
    return size


@triton.jit
def load_logits(
    side,
    begin,
    cols,
    is_read,
    HAS_BIAS: tl.constexpr,
    IS_CAPPED: tl.constexpr,
    HAS_HOLES: tl.constexpr = False,
):
    """A tile in float32, -inf where there is none, and its tanh if it is capped.

    HAS_HOLES: nor is there one where the memory has -inf, which a cap would make a number.
    """
    # Two masks: that of the memory keeps loads of 16 bytes where a vocabulary is no multiple of 4.
    mask = is_read[:, None] & (cols < side.padded)[None, :]
    x = tl.load(side.ptrs + begin, mask=mask, other=-float("inf")).to(tl.float32)
    is_column = cols < side.vocab
    x = tl.where(is_column[None, :], x, -float("inf"))
    is_away = (x == -float("inf")) if HAS_HOLES else (is_column == 0)[None, :]
    if HAS_BIAS:
        x += tl.load(side.bias_ptr + cols, mask=is_column, other=0.0).to(tl.float32)[None, :]
    bent = x
    if IS_CAPPED:
        bent = tanh(x * side.inverse_softcap)
        x = tl.where(is_away, -float("inf"), bent * side.softcap)
    return x, bent


@triton.jit
def load_sides(student, teacher, begin, is_read, BLOCK_V: tl.constexpr, FORM: tl.constexpr):
    """Columns of a tile, its logits of both sides, and the student's tanh."""
    cols = begin + tl.arange(0, BLOCK_V)
    s, bent = load_logits(
        student, begin, cols, is_read, FORM.has_student_bias, FORM.is_student_capped
    )
    t, _bent = load_logits(
        teacher, begin, cols, is_read, FORM.has_teacher_bias, FORM.is_teacher_capped
    )
    return cols, s, t, bent


@triton.jit
def load_labels(labels_ptr, rows, is_kept, vocab):
    """Labels, -1 for those outside the vocabulary: nothing can be raised here."""
    label = tl.load(labels_ptr + rows, mask=is_kept, other=-1)
    return tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)


@triton.jit
def cross_entropy(log_sum, label_logit, label):
    return tl.where(label < 0, float("nan"), log_sum - label_logit)


@triton.jit
def weighed(share, x):
    """share * x, 0 where share is: sums of these are what a distance is made of."""
    return tl.where(share == 0, 0.0, share * x)


@triton.jit
def renew(top, x, scale):
    """The new maximum, the factor of old sums below it, the tile below it, and its exponentials."""
    above = tl.maximum(top, tl.max(x, 1))
    below = x - above[:, None]
    return above, tl.exp2((top - above) * scale), below, tl.exp2(below * scale)


@triton.jit
def no_stats(BLOCK_N: tl.constexpr):
    least = tl.full((BLOCK_N,), LEAST, tl.float32)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    return Stats(least, least, zero, zero, zero, zero, zero, zero)


@triton.jit
def add_tile(stats, s, t, cols, label, scale, FORM: tl.constexpr):
    """The statistics with a tile more.

    The moment is of logits below their maxima, which it follows: logits that differ by a constant
    cost it no digits. That of "reverse_kl" has the teacher's below its pivot instead: the likeliest
    entry then weighs 0, where its gradient, p (s - t - mean), would be a difference of two numbers
    that are nearly the same.
    """
    top_s, shrink_s, below_s, share_s = renew(stats.top_s, s, scale)
    top_t, shrink_t, below_t, share_t = renew(stats.top_t, t, scale)
    pivot, moment = stats.pivot, stats.moment
    if FORM.distance == "kl":
        apart = (stats.top_t - stats.top_s) - (top_t - top_s)
        moment = weighed(shrink_t, moment + apart * stats.sum_t)
        moment += tl.sum(weighed(share_t, below_t - below_s), 1)
    elif FORM.distance == "reverse_kl":
        found = tl.max(tl.where(below_s == 0, t, -float("inf")), 1)
        # Any pivot serves where the teacher excludes that entry: the distance is infinite.
        pivot = tl.where((top_s > stats.top_s) & (found > -float("inf")), found, pivot)
        apart = (stats.top_s - top_s) - (stats.pivot - pivot)
        moment = weighed(shrink_s, moment + apart * stats.sum_s)
        moment += tl.sum(weighed(share_s, below_s - (t - pivot[:, None])), 1)
    sum_ce, label_logit = stats.sum_ce, stats.label_logit
    if FORM.has_labels:
        # Not a load of its own: where the gradient replaces the logits, it might come too late.
        label_logit += tl.sum(tl.where(cols[None, :] == label[:, None], s, 0.0), 1)
        if FORM.is_warm:
            shrink = tl.exp2((stats.top_s - top_s) * LOG2_E)
            sum_ce = sum_ce * shrink + tl.sum(tl.exp2(below_s * LOG2_E), 1)
    sum_s = stats.sum_s * shrink_s + tl.sum(share_s, 1)
    sum_t = stats.sum_t * shrink_t + tl.sum(share_t, 1)
    return Stats(top_s, top_t, sum_s, sum_t, pivot, moment, sum_ce, label_logit)


@triton.jit
def against_middle(ratio, mixture):
    """log2(p / m) and log2(t / m) of their mixture m, from log2(p / t).

    Neither overflows, and both are 0 where ratio is: the shares add up to exactly 1.
    """
    larger = tl.where(ratio < 0, mixture.teacher, mixture.student)
    smaller = tl.where(ratio < 0, mixture.student, mixture.teacher)
    common = -tl.log2(larger + smaller * tl.exp2(-tl.abs(ratio)))
    return common + tl.minimum(ratio, 0.0), common - tl.maximum(ratio, 0.0)


@triton.jit
def middle_terms(stats, s, t, log_ratio, scale, mixture):
    """Of "jsd", in units of log 2: what a tile adds to KL(T || M) and KL(S || M), times the sum of
    the side's exponentials and its share; for the gradient exp(s), and S's share of log(p / m)."""
    below_s, below_t = s - stats.top_s[:, None], t - stats.top_t[:, None]
    of_p, of_t = against_middle((below_s - below_t) * scale - log_ratio[:, None], mixture)
    by = mixture.student * of_p
    share_s = tl.exp2(below_s * scale)
    of_teacher = tl.sum(weighed(tl.exp2(below_t * scale), mixture.teacher * of_t), 1)
    return of_teacher, tl.sum(weighed(share_s, by), 1), share_s, by


class RowDistance(NamedTuple):
    """Of rows whose sums are whole, [BLOCK_N] each."""

    value: tl.tensor  # "jsd", "mse": without the sweep that they need
    center: tl.tensor  # mean of what the student's probabilities are multiplied by, in its units
    balance: tl.tensor  # of both sums, sum_s / sum_t; its logarithm to base 2 for "jsd"
    by_share: tl.tensor  # what turns `tile_gradient` into the gradient of the distance


@triton.jit
def distance_of(stats, inverse_temperature, FORM: tl.constexpr):
    # Closer than a difference of logarithms where the sides are close; exactly 1 and 0 if equal.
    balance = tl.div_rn(stats.sum_s, stats.sum_t)
    value = tl.zeros(balance.shape, tl.float32)
    center = tl.zeros(balance.shape, tl.float32)
    by_share = inverse_temperature / stats.sum_s
    if FORM.distance == "kl":
        value = stats.moment / stats.sum_t * inverse_temperature + tl.log2(balance) * LN_2
    elif FORM.distance == "reverse_kl":
        center = stats.moment / stats.sum_s
        value = (center + (stats.top_t - stats.pivot)) * inverse_temperature
        value -= tl.log2(balance) * LN_2
        by_share *= inverse_temperature
    elif FORM.distance == "jsd":
        balance = tl.log2(balance)
        by_share *= LN_2
    else:
        by_share *= 2
    return RowDistance(value, center, balance, by_share)


class Gains(NamedTuple):
    """What the gradients of both terms are multiplied by, [BLOCK_N] each."""

    by_share: tl.tensor  # the distance's: 1 / sum_s is in it, and the units of `center`
    by_share_ce: tl.tensor
    by_label: tl.tensor


@triton.jit
def tile_gradient(
    stats, s, t, bent, cols, label, balance, center, gains, scale, mixture, FORM: tl.constexpr
):
    """d loss / d logits of a tile, as they were before their cap.

    `balance` is the ratio of both sums for "kl", its logarithm for "jsd"; `center` the mean of what
    the probabilities of the student are multiplied by, in its units.
    """
    below_s, below_t = s - stats.top_s[:, None], t - stats.top_t[:, None]
    if FORM.distance == "kl":
        grad = tl.exp2(below_s * scale) - tl.exp2(below_t * scale) * balance[:, None]
    elif FORM.distance == "reverse_kl":
        by = below_s - (t - stats.pivot[:, None]) - center[:, None]
        grad = weighed(tl.exp2(below_s * scale), by)
    else:
        _t, _s, share, by = middle_terms(stats, s, t, balance, scale, mixture)
        grad = weighed(share, by - center[:, None])
    grad *= gains.by_share[:, None]
    if FORM.has_labels:
        grad += tl.exp2(below_s * LOG2_E) * gains.by_share_ce[:, None]
        is_label = cols[None, :] == label[:, None]
        grad -= tl.where(is_label, gains.by_label[:, None], 0.0)
    if FORM.is_student_capped:
        grad *= 1 - bent * bent
    return grad
