"""Maps averaged over heads first: values and gradients of a block of rows of all heads.

A mean map of scores needs the maximum and sum of every head's row before its first element, and a
head's gradient needs its center, a sum over the row of the derivative by the mean map:

    ds_h = P_h (by / H - sum_j P_h by / H),    by = d distance / d mean map

so the program that has a row of all heads sweeps it three times: sums, mean maps, gradients. The
numbers of heads stay in registers, [BLOCK_N, HEADS]. Bytes: the student's maps are read three
times and the teacher's twice, from memory once if L2 holds the rows of all heads in flight; the
gradient is written once. Rows of more than a tile are read twice more, the teacher's once: `by`
does not stay, so it is computed again.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...._triton_logits import LEAST, LN_2, LOG2_E
from . import fields
from .distances import mean_terms, probability_terms, weigh
from .rows import (
    allowed_keys,
    load_gain,
    load_int,
    load_probabilities,
    load_scores,
    open_maps,
    open_rows,
    store_gradient,
    store_value,
)


class Side(NamedTuple):
    """The maps of one side, and the sums of their rows."""

    maps: tl.tensor
    heads: tl.tensor
    tops: tl.tensor  # [BLOCK_N, HEADS]
    shares: tl.tensor  # one over the sums


@triton.jit
def put(numbers, head, values):
    """Numbers of heads with those of one head, [BLOCK_N], in their place."""
    is_head = tl.arange(0, numbers.shape[1])[None, :] == head
    return tl.where(is_head, values[:, None], numbers)


@triton.jit
def get(numbers, head):
    is_head = tl.arange(0, numbers.shape[1])[None, :] == head
    return tl.sum(tl.where(is_head, numbers, 0.0), 1)


@triton.jit
def open_side(
    rows,
    FIELD: tl.constexpr,
    COUNT: tl.constexpr,
    DTYPE: tl.constexpr,
    begin,
    scale,
    BLOCK_V: tl.constexpr,
    HEADS: tl.constexpr,
    FORM: tl.constexpr,
):
    """Maxima of rows of every head, and one over the sums of their exponentials below them.

    They are kept apart: rounded to one number, the logarithm of the whole sum would cost
    probabilities as many digits as scores have before the point.
    """
    maps, heads = open_maps(rows, FIELD, 0, DTYPE, FORM), load_int(rows.line + COUNT)
    tops = tl.zeros((rows.weights.shape[0], HEADS), tl.float32)
    shares = tl.zeros((rows.weights.shape[0], HEADS), tl.float32)
    for head in range(heads):
        ptrs = maps.ptrs + head * maps.head_stride
        top = tl.full((rows.weights.shape[0],), LEAST, tl.float32)
        total = tl.zeros((rows.weights.shape[0],), tl.float32)
        for start in range(begin, rows.last, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            x = load_scores(ptrs, rows, cols, allowed_keys(rows, cols, FORM), FORM)
            above = tl.maximum(top, tl.max(x, 1))
            total = total * tl.exp2((top - above) * scale)
            total += tl.sum(tl.exp2((x - above[:, None]) * scale), 1)
            top = above
        tops, shares = put(tops, head, top), put(shares, head, 1 / total)
    return Side(maps, heads, tops, shares)


@triton.jit
def head_tile(side, head, rows, cols, allowed, scale, FORM: tl.constexpr):
    """Logarithms to base 2 of a tile of one head, times the sums of its rows."""
    x = load_scores(side.maps.ptrs + head * side.maps.head_stride, rows, cols, allowed, FORM)
    return (x - get(side.tops, head)[:, None]) * scale


@triton.jit
def mean_tile(side, rows, cols, allowed, scale, FORM: tl.constexpr):
    """A tile of the mean map, exp2(top) * share: a running maximum, so that none underflows."""
    top = tl.full(allowed.shape, LEAST, tl.float32)
    total = tl.zeros(allowed.shape, tl.float32)
    for head in range(side.heads):
        below = head_tile(side, head, rows, cols, allowed, scale, FORM)
        share = get(side.shares, head)[:, None]
        above = below - top
        smaller = tl.exp2(-tl.abs(above))  # the one of the two that is not the maximum
        total = tl.where(above > 0, total * smaller + share, total + smaller * share)
        top = tl.maximum(top, below)
    return top, total / side.heads


@triton.jit
def compare_tile(student, teacher, rows, start, scale, BLOCK_V: tl.constexpr, FORM: tl.constexpr):
    """Keys of a tile, which of them count, the values of its rows, and `by`."""
    cols = start + tl.arange(0, BLOCK_V)
    allowed = allowed_keys(rows, cols, FORM)
    top_s, share_s = mean_tile(student, rows, cols, allowed, scale, FORM)
    top_t, share_t = mean_tile(teacher, rows, cols, allowed, scale, FORM)
    values, by = mean_terms(top_s, share_s, top_t, share_t, tl.constexpr(FORM.distance))
    return cols, allowed, tl.sum(tl.where(allowed, values, 0.0), 1), by


@triton.jit
def head_terms(student, head, rows, cols, allowed, by, scale, FORM: tl.constexpr):
    """Probabilities of a tile of one head, what they weigh, and its sum: times the rows' sums."""
    below = head_tile(student, head, rows, cols, allowed, scale, FORM)
    p, weighted = weigh(below, by, tl.constexpr(FORM.distance))
    return p, weighted, tl.sum(tl.where(allowed, weighted, 0.0), 1)


@triton.jit
def store_head(
    grad, student, head, rows, cols, allowed, p, weighted, center, gain, FORM: tl.constexpr
):
    share = get(student.shares, head)
    values = (weighted - p * (center * share)[:, None]) * (gain * share)[:, None]
    store_gradient(grad.ptrs + head * grad.head_stride, rows, cols, values, allowed, FORM)


@triton.jit(do_not_specialize=["inverse_temperature"])
def mean_scores_kernel(
    table_ptr,
    coefficients_ptr,
    inverse_temperature,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    GRAD: tl.constexpr,
    FORM: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HEADS: tl.constexpr,
):
    rows = open_rows(table_ptr, LINES, BLOCK_N, True, FORM)
    scale = inverse_temperature * LOG2_E
    begin = rows.first // BLOCK_V * BLOCK_V
    student = open_side(
        rows, fields.STUDENT, fields.HEADS, STUDENT, begin, scale, BLOCK_V, HEADS, FORM
    )
    teacher = open_side(
        rows, fields.TEACHER, fields.TEACHER_HEADS, TEACHER, begin, scale, BLOCK_V, HEADS, FORM
    )
    if FORM.wants_grad:
        gain = load_gain(rows, coefficients_ptr) * inverse_temperature / student.heads
        if FORM.distance == "reverse_kl" or FORM.distance == "jsd":
            gain *= LN_2
        grad = open_maps(rows, fields.GRAD, 0, GRAD, FORM)
    if FORM.is_wide:
        value = tl.zeros((BLOCK_N,), tl.float32)
        centers = tl.zeros((BLOCK_N, HEADS), tl.float32)
        for start in range(begin, rows.last, BLOCK_V):
            cols, allowed, values, by = compare_tile(
                student, teacher, rows, start, scale, BLOCK_V, FORM
            )
            value += values
            if FORM.wants_grad:
                for head in range(student.heads):
                    _p, _weighted, center = head_terms(
                        student, head, rows, cols, allowed, by, scale, FORM
                    )
                    centers = put(centers, head, get(centers, head) + center)
        if FORM.wants_grad:
            for start in range(0, rows.tokens, BLOCK_V):
                cols, allowed, values, by = compare_tile(
                    student, teacher, rows, start, scale, BLOCK_V, FORM
                )
                for head in range(student.heads):
                    p, weighted, _center = head_terms(
                        student, head, rows, cols, allowed, by, scale, FORM
                    )
                    center = get(centers, head)
                    store_head(
                        grad, student, head, rows, cols, allowed, p, weighted, center, gain, FORM
                    )
    else:
        cols, allowed, value, by = compare_tile(student, teacher, rows, 0, scale, BLOCK_V, FORM)
        if FORM.wants_grad:
            for head in range(student.heads):
                p, weighted, center = head_terms(
                    student, head, rows, cols, allowed, by, scale, FORM
                )
                store_head(
                    grad, student, head, rows, cols, allowed, p, weighted, center, gain, FORM
                )
    if FORM.distance != "mse":
        value *= LN_2
    store_value(rows, value)


@triton.jit
def mean_probabilities(maps, heads, rows, cols, SHAPE: tl.constexpr, FORM: tl.constexpr):
    total = tl.zeros(SHAPE, tl.float32)
    for head in range(heads):
        total += load_probabilities(maps.ptrs + head * maps.head_stride, rows, cols, FORM)
    return total / heads


@triton.jit
def mean_probabilities_kernel(
    table_ptr,
    coefficients_ptr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    GRAD: tl.constexpr,
    FORM: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Every head has the gradient of the mean map: both sides are read once."""
    rows = open_rows(table_ptr, LINES, BLOCK_N, True, FORM)
    student = open_maps(rows, fields.STUDENT, 0, STUDENT, FORM)
    teacher = open_maps(rows, fields.TEACHER, 0, TEACHER, FORM)
    heads, others = load_int(rows.line + fields.HEADS), load_int(rows.line + fields.TEACHER_HEADS)
    value = tl.zeros((BLOCK_N,), tl.float32)
    begin, end = rows.first // BLOCK_V * BLOCK_V, rows.last
    if FORM.wants_grad:
        begin, end = 0, rows.tokens
        grad = open_maps(rows, fields.GRAD, 0, GRAD, FORM)
    for start in range(begin, end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        s = mean_probabilities(student, heads, rows, cols, (BLOCK_N, BLOCK_V), FORM)
        t = mean_probabilities(teacher, others, rows, cols, (BLOCK_N, BLOCK_V), FORM)
        values, by = probability_terms(s, t, tl.constexpr(FORM.distance))
        allowed = allowed_keys(rows, cols, FORM)
        value += tl.sum(tl.where(allowed, values, 0.0), 1)
        if FORM.wants_grad:
            by *= (load_gain(rows, coefficients_ptr) / heads)[:, None]
            for head in range(heads):
                ptrs = grad.ptrs + head * grad.head_stride
                store_gradient(ptrs, rows, cols, by, allowed, FORM)
    store_value(rows, value)
