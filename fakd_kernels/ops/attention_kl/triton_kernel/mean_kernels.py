"""heads="mean": the sums of every head, the mean maps, and each head's center.

A mean map needs the sums of all its heads before its first element, and a head's gradient needs its
center, a sum over the row of the derivative by the mean map:

    ds_h = P_h (by / H - sum_j P_h by / H),    by = d distance / d mean map

so there are four sweeps where "match" has three: `sums_kernel`, `map_kernel`, `center_kernel` and
the gradient kernels. `map_kernel` leaves `by` once for all heads, for a strip of query rows at a
time (see `mean`), and the later sweeps read it instead of the teacher.

FLOPs, for H heads of the student and H' of the teacher: 2 T^2 (7 H Ks + 2 H' Kt) with both
gradients, half if causal; of "match" 2 T^2 H (5 Ks + 3 Kt). Bytes: `by` is written once and read
three times a head, 4 bytes per element each, from L2 where a strip fits in it.
"""

import triton
import triton.language as tl

from ...._triton import load_pointer, load_size
from . import fields
from .kept import head_ptr, load_map, load_sums, store_numbers, store_sums, store_values
from .rows import (
    Side,
    find_pair,
    is_own,
    load_float,
    load_int,
    load_rows,
    meets,
    open_rows,
    open_side,
    other_weights,
    place_program,
    row_ptrs,
    score,
)
from .tile_math import LN2, MASKED, renew, terms, weigh


@triton.jit
def sums_kernel(
    table_ptr,
    HAS_WEIGHTS: tl.constexpr,
    FORM: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """The maximum and sum of each row of one side, whose fields are those of the student."""
    line, _block, begin, head, batch = place_program(table_ptr, LINES, BLOCK_OWN, True)
    rows = open_rows(line, begin, batch, BLOCK_OWN, HAS_WEIGHTS)
    side = open_side(line + fields.STUDENT, rows, batch, head, BLOCK_OWN, BLOCK_OTHER, FORM)
    top = tl.full((BLOCK_OWN,), MASKED, tl.float32)
    total = tl.zeros((BLOCK_OWN,), tl.float32)
    for start in range(rows.first, rows.last, BLOCK_OTHER):
        weights = other_weights(start, rows, BLOCK_OTHER, HAS_WEIGHTS)
        s = score(side, start, rows, FORM)
        s = tl.where(meets(start, weights, rows, HAS_WEIGHTS), s, MASKED)
        top, total, _shrink, _share, _below = renew(top, total, s)
    heads = tl.load(line + fields.STUDENT + fields.HEADS)
    store_sums(line, line + fields.STUDENT_SUMS, heads, batch, head, top, 1 / total, rows)


@triton.jit
def log_mean(
    line,
    side,
    sums_field,
    batch,
    start,
    rows,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    FORM: tl.constexpr,
):
    """log2 of a tile of the mean map, as the largest of the heads and what the mean is below it.

    A running maximum, so that none underflows; in two parts, see `store_sums`.
    """
    heads, group = load_int(side + fields.HEADS), load_int(side + fields.OTHER_GROUP)
    width = load_int(side + fields.WIDTH)
    inner, outer = load_float(side + fields.INNER), load_float(side + fields.OUTER)
    own_ptrs, _stride = row_ptrs(side + fields.OWN, batch, 0, rows.begin, BLOCK_OWN, FORM)
    other_ptrs, stride = row_ptrs(side + fields.OTHER, batch, 0, 0, BLOCK_OTHER, FORM)
    own_step = load_size(side + fields.OWN + 2, FORM.is_aligned)
    other_step = load_size(side + fields.OTHER + 2, FORM.is_aligned)
    own = rows.begin + tl.arange(0, BLOCK_OWN)
    tokens = tl.load(line + fields.TOKENS)
    sums_ptr, sums_stride = head_ptr(line, sums_field, heads, batch, 0)
    top = tl.full((BLOCK_OWN, BLOCK_OTHER), MASKED, tl.float32)
    total = tl.zeros((BLOCK_OWN, BLOCK_OTHER), tl.float32)
    for head in range(heads):
        ptrs = own_ptrs + head * own_step
        head_rows = Side(
            load_rows(ptrs, is_own(rows), width, FORM),
            ptrs,
            other_ptrs + (head // group) * other_step,
            stride,
            width,
            inner,
            outer,
        )
        s = score(head_rows, start, rows, FORM)
        row_top, share = load_sums(sums_ptr + head * tokens, sums_stride, own, rows.end)
        s -= row_top[:, None]
        share = share[:, None]
        above = s - top
        smaller = tl.exp2(-tl.abs(above))  # the one of the two that is not the maximum
        total = tl.where(above > 0, total * smaller + share, total + smaller * share)
        top = tl.maximum(top, s)
    return top, tl.log2(total / heads)


@triton.jit
def map_kernel(
    table_ptr,
    DISTANCE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """One tile of both mean maps: its weighted values, and `by` where it has a place."""
    line, local = find_pair(table_ptr, LINES)
    begin, tokens = load_int(line + fields.BEGIN), tl.load(line + fields.TOKENS)
    columns = tl.cdiv(load_int(line + fields.UPPER), BLOCK_OTHER)
    blocks = tl.cdiv(load_int(line + fields.END) - begin, BLOCK_OWN)
    start = local % columns * BLOCK_OTHER
    batch = (local // (columns * blocks)).to(tl.int64)
    first = begin + local // columns % blocks * BLOCK_OWN
    rows = open_rows(line, first, batch, BLOCK_OWN, HAS_WEIGHTS)
    value = tl.zeros((BLOCK_OWN,), tl.float32)
    if (start < rows.last) & (start + BLOCK_OTHER > rows.first):
        side, field = line + fields.STUDENT, line + fields.STUDENT_SUMS
        top_s, log_s = log_mean(
            line, side, field, batch, start, rows, BLOCK_OWN, BLOCK_OTHER, STUDENT
        )
        side, field = line + fields.TEACHER, line + fields.TEACHER_SUMS
        top_t, log_t = log_mean(
            line, side, field, batch, start, rows, BLOCK_OWN, BLOCK_OTHER, TEACHER
        )
        ratio = (top_s - top_t) + (log_s - log_t)
        values, by = terms(top_s + log_s, top_t + log_t, ratio, DISTANCE)
        weights = other_weights(start, rows, BLOCK_OTHER, HAS_WEIGHTS)
        mask = meets(start, weights, rows, HAS_WEIGHTS)
        value += tl.sum(tl.where(mask, values, 0.0), 1)
        if tl.load(line + fields.MAP) != 0:
            own, other = first + tl.arange(0, BLOCK_OWN), start + tl.arange(0, BLOCK_OTHER)
            row = batch * (rows.end - begin) + own - begin
            ptrs = load_pointer(line + fields.MAP, tl.float32, False) + row[:, None] * tokens
            tl.store(ptrs + other[None, :], by, mask=mask)
    if DISTANCE != "mse":
        value *= LN2
    store_values(line, local, value, rows)


@triton.jit
def center_kernel(
    table_ptr,
    DISTANCE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    STUDENT: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """sum_j P_h by of every row of every head of the student."""
    line, _block, begin, head, batch = place_program(table_ptr, LINES, BLOCK_OWN, True)
    rows = open_rows(line, begin, batch, BLOCK_OWN, HAS_WEIGHTS)
    side = open_side(line + fields.STUDENT, rows, batch, head, BLOCK_OWN, BLOCK_OTHER, STUDENT)
    heads = tl.load(line + fields.STUDENT + fields.HEADS)
    ptr, stride = head_ptr(line, line + fields.STUDENT_SUMS, heads, batch, head)
    own = begin + tl.arange(0, BLOCK_OWN)
    top, share = load_sums(ptr, stride, own, rows.end)
    center = tl.zeros((BLOCK_OWN,), tl.float32)
    for start in range(rows.first, rows.last, BLOCK_OTHER):
        weights = other_weights(start, rows, BLOCK_OTHER, HAS_WEIGHTS)
        below = score(side, start, rows, STUDENT) - top[:, None]
        mask = meets(start, weights, rows, HAS_WEIGHTS)
        by = load_map(line, batch, start, rows, mask, True)
        center += tl.sum(tl.where(mask, weigh(below, by, DISTANCE), 0.0), 1)
    ptr, _stride = head_ptr(line, line + fields.CENTER, heads, batch, head)
    store_numbers(ptr, center * share, 0.0, rows)
