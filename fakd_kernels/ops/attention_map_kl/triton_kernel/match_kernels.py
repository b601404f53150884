"""Maps compared head by head: values and gradient of a block of rows of one head.

Bytes, all that it costs, with T keys of s and t bytes and a gradient of g:

    probabilities    T (s + t + g): every element stands for itself
    scores           likewise up to 4096 keys, which stay in registers; of more, T (s + t) again for
                     the gradient and, of "jsd" and "mse", for the value. A sweep begins where the
                     one before ended, so that L2 serves what it holds of all rows in flight.

Causal maps and windows are read where keys count only; the gradient is written whole.
"""

import triton
import triton.language as tl

from ...._triton_logits import distance_of, no_stats
from . import fields
from .distances import add_scores, finish, probability_terms, scores_gradient, second_sweep
from .rows import (
    allowed_keys,
    load_gain,
    load_probabilities,
    load_scores,
    open_maps,
    open_rows,
    store_gradient,
    store_value,
)


@triton.jit
def open_sides(
    table_ptr,
    heads_ptr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORM: tl.constexpr,
):
    rows = open_rows(table_ptr, LINES, BLOCK_N, False, FORM)
    student = open_maps(rows, fields.STUDENT, rows.head, STUDENT, FORM)
    teacher_head = tl.load(heads_ptr + tl.load(rows.line + fields.TEACHER_HEADS) + rows.head)
    teacher = open_maps(rows, fields.TEACHER, teacher_head, TEACHER, FORM)
    return rows, student.ptrs, teacher.ptrs


@triton.jit
def load_sides(student_ptrs, teacher_ptrs, rows, begin, BLOCK_V: tl.constexpr, FORM: tl.constexpr):
    """Keys of a tile, which of them count, and the scores of both sides."""
    cols = begin + tl.arange(0, BLOCK_V)
    allowed = allowed_keys(rows, cols, FORM)
    s = load_scores(student_ptrs, rows, cols, allowed, FORM)
    t = load_scores(teacher_ptrs, rows, cols, allowed, FORM)
    return cols, allowed, s, t


@triton.jit(do_not_specialize=["inverse_temperature"])
def scores_kernel(
    table_ptr,
    heads_ptr,
    coefficients_ptr,
    inverse_temperature,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    GRAD: tl.constexpr,
    FORM: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows, student, teacher = open_sides(
        table_ptr, heads_ptr, STUDENT, TEACHER, LINES, BLOCK_N, FORM
    )
    stats = no_stats(BLOCK_N)
    begin = rows.first // BLOCK_V * BLOCK_V
    end = (tl.cdiv(rows.last, BLOCK_V) - 1) * BLOCK_V  # where the last tile that is read begins
    if FORM.is_wide:
        for start in range(begin, rows.last, BLOCK_V):
            cols, allowed, s, t = load_sides(student, teacher, rows, start, BLOCK_V, FORM)
            stats = add_scores(stats, s, t, cols, inverse_temperature, FORM)
    else:
        cols, allowed, s, t = load_sides(student, teacher, rows, 0, BLOCK_V, FORM)
        stats = add_scores(stats, s, t, cols, inverse_temperature, FORM)
    value, center, balance, by_share = distance_of(stats, inverse_temperature, FORM)
    if FORM.distance == "jsd" or FORM.distance == "mse":
        if FORM.is_wide:
            for back in range(0, rows.last - begin, BLOCK_V):
                cols, allowed, s, t = load_sides(student, teacher, rows, end - back, BLOCK_V, FORM)
                more, more_center = second_sweep(stats, s, t, balance, inverse_temperature, FORM)
                value += more
                center += more_center
        else:
            value, center = second_sweep(stats, s, t, balance, inverse_temperature, FORM)
        value, center = finish(stats, value, center, FORM)
    store_value(rows, value)
    if FORM.wants_grad:
        gain = load_gain(rows, coefficients_ptr) * by_share
        grad_ptrs = open_maps(rows, fields.GRAD, rows.head, GRAD, FORM).ptrs
        if FORM.is_wide:
            last = (tl.cdiv(rows.tokens, BLOCK_V) - 1) * BLOCK_V
            for place in range(0, rows.tokens, BLOCK_V):
                start = place if FORM.distance == "jsd" or FORM.distance == "mse" else last - place
                cols, allowed, s, t = load_sides(student, teacher, rows, start, BLOCK_V, FORM)
                grad = scores_gradient(
                    stats, s, t, cols, balance, center, gain, inverse_temperature, FORM
                )
                store_gradient(grad_ptrs, rows, cols, grad, allowed, FORM)
        else:
            grad = scores_gradient(
                stats, s, t, cols, balance, center, gain, inverse_temperature, FORM
            )
            store_gradient(grad_ptrs, rows, cols, grad, allowed, FORM)


@triton.jit
def probabilities_kernel(
    table_ptr,
    heads_ptr,
    coefficients_ptr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    GRAD: tl.constexpr,
    FORM: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows, student, teacher = open_sides(
        table_ptr, heads_ptr, STUDENT, TEACHER, LINES, BLOCK_N, FORM
    )
    value = tl.zeros((BLOCK_N,), tl.float32)
    begin, end = rows.first // BLOCK_V * BLOCK_V, rows.last
    if FORM.wants_grad:
        begin, end = 0, rows.tokens
        gain = load_gain(rows, coefficients_ptr)
        grad_ptrs = open_maps(rows, fields.GRAD, rows.head, GRAD, FORM).ptrs
    for start in range(begin, end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        allowed = allowed_keys(rows, cols, FORM)
        s, t = (
            load_probabilities(student, rows, cols, FORM),
            load_probabilities(teacher, rows, cols, FORM),
        )
        values, grad = probability_terms(s, t, tl.constexpr(FORM.distance))
        value += tl.sum(tl.where(allowed, values, 0.0), 1)
        if FORM.wants_grad:
            store_gradient(grad_ptrs, rows, cols, grad * gain[:, None], allowed, FORM)
    store_value(rows, value)
