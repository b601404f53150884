"""Gradients of queries and of keys: one kernel, which recomputes tiles of scores.

dQ = ds K and dK = ds^T Q are the same sum, over the other rows that a block of own rows meets. For
dK the tile is computed transposed, own keys by other queries, so that ds enters its product as it
is. A program makes dK of one query head; `group_kernel` adds those that share keys, which a loop
over them in here would pay for with the registers of a larger tile. No atomics: equal bits every
run.

With below = score - maximum of the row and Z its sum of exponentials, for "kl"

    ds = (exp(below^S) - exp(below^T) Z^S / Z^T) / Z^S

where the last division is that of a whole row of dQ. Equal sides give exactly 0.

FLOPs a head for each of dQ and dK: 2 T^2 (2 Ks + Kt), half if causal. Bytes: own rows and the
gradient once, other rows for every block of own rows, from L2. Rows in steps (float32) cost the
scores again for every piece of the gradient.
"""

import triton
import triton.language as tl

from ...._triton import cast, dot, load_pointer, load_size
from . import fields
from .kept import head_ptr, load_map, load_sums
from .rows import (
    load_float,
    load_int,
    load_piece,
    load_rows,
    meets,
    open_rows,
    open_side,
    other_weights,
    piece_columns,
    place_program,
    score,
    score_tiles,
)
from .tile_math import score_gradient, weigh


@triton.jit
def across(numbers, OF_QUERIES: tl.constexpr):
    """A number of each query, laid across a tile."""
    if OF_QUERIES:
        return numbers[:, None]
    else:
        return numbers[None, :]


@triton.jit
def gradient_kernel(
    table_ptr,
    heads_ptr,
    coefficients_ptr,
    DISTANCE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    IS_MEAN: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """IS_MEAN: the derivative by the mean map is read, instead of the teacher."""
    line, _block, begin, head, batch = place_program(table_ptr, LINES, BLOCK_OWN, OF_QUERIES)
    rows = open_rows(line, begin, batch, BLOCK_OWN, HAS_WEIGHTS)
    side = line + fields.STUDENT
    heads = tl.load(side + fields.HEADS)
    student = open_side(side, rows, batch, head, BLOCK_OWN, BLOCK_OTHER, STUDENT)
    student_sums, stride = head_ptr(line, line + fields.STUDENT_SUMS, heads, batch, head)
    teacher_sums, _stride = head_ptr(line, line + fields.TEACHER_SUMS, heads, batch, head)
    balance_ptr, _stride = head_ptr(line, line + fields.BALANCE, heads, batch, head)
    center_ptr, _stride = head_ptr(line, line + fields.CENTER, heads, batch, head)
    HAS_CENTER: tl.constexpr = IS_MEAN or DISTANCE != "kl"
    if not IS_MEAN:
        teacher_head = tl.load(heads_ptr + tl.load(line + fields.TEACHER_HEADS) + head)
        teacher_side = line + fields.TEACHER
        teacher = open_side(
            teacher_side, rows, batch, teacher_head, BLOCK_OWN, BLOCK_OTHER, TEACHER
        )
    column = load_int(line + fields.COLUMN)
    acc = ()
    for i in tl.static_range(len(STUDENT.pieces)):
        acc += (tl.zeros((BLOCK_OWN, tl.constexpr(STUDENT.pieces[i][1])), tl.float32),)
    own = begin + tl.arange(0, BLOCK_OWN)
    if OF_QUERIES:
        top_s, share = load_sums(student_sums, stride, own, rows.end)
        center = share
        if HAS_CENTER:
            center = tl.load(center_ptr + own, mask=own < rows.end, other=0.0)
        if not IS_MEAN:
            top_t = tl.load(teacher_sums + own, mask=own < rows.end, other=0.0)
            balance = tl.load(balance_ptr + own, mask=own < rows.end, other=0.0)
    for start in range(rows.first, rows.last, BLOCK_OTHER):
        queries = start + tl.arange(0, BLOCK_OTHER)
        weights = other_weights(start, rows, BLOCK_OTHER, HAS_WEIGHTS)
        # Rows that do not count are not read: here they are multiplied by a gradient of 0.
        other_ptrs = student.other_ptrs + start * student.stride
        others = load_rows(other_ptrs, weights != 0, student.width, STUDENT)
        s, bent = score_tiles(student, others, other_ptrs, weights != 0, rows, STUDENT)
        if not OF_QUERIES:
            top_s, share = load_sums(student_sums, stride, queries, rows.upper)
            center = share
            if HAS_CENTER:
                center = tl.load(center_ptr + queries, mask=queries < rows.upper, other=0.0)
        s -= across(top_s, OF_QUERIES)
        # The gradient times the sum of its row, by which it is divided afterwards.
        if IS_MEAN:
            mask = meets(start, weights, rows, HAS_WEIGHTS)
            by = load_map(line, batch, start, rows, mask, OF_QUERIES)
            grad = weigh(s, by, DISTANCE) - tl.exp2(s) * across(center, OF_QUERIES)
        else:
            t = score(teacher, start, rows, TEACHER)
            if not OF_QUERIES:
                top_t = tl.load(teacher_sums + queries, mask=queries < rows.upper, other=0.0)
                balance = tl.load(balance_ptr + queries, mask=queries < rows.upper, other=0.0)
            t -= across(top_t, OF_QUERIES)
            grad = score_gradient(
                s,
                t,
                across(share, OF_QUERIES),
                across(balance, OF_QUERIES),
                across(center, OF_QUERIES),
                DISTANCE,
            )
        if not OF_QUERIES:
            grad *= across(weights * share if HAS_WEIGHTS else share, False)
        if STUDENT.is_capped:
            grad *= 1 - bent * bent
        grad = tl.where(meets(start, weights, rows, HAS_WEIGHTS), grad, 0.0)
        if PRECISION == "native":
            grad = cast(grad, STUDENT.dtype, STUDENT.is_interpreted)
        more = ()
        for i in tl.static_range(len(STUDENT.pieces)):
            if STUDENT.step == 0:
                other = others[i]
            else:
                other = load_piece(other_ptrs, weights != 0, column, student.width, i, STUDENT)
            more += (dot(grad, other, acc[i], PRECISION, STUDENT.is_interpreted),)
        acc = more

    factor = tl.load(coefficients_ptr + tl.load(line + fields.PAIR))
    factor *= load_float(line + fields.FACTOR)
    if OF_QUERIES:
        factor = (rows.weights * share * factor)[:, None]
    width = load_size(side + fields.WIDTH, STUDENT.is_aligned)
    grad_ptr = load_pointer(line + fields.GRAD, GRAD_DTYPE, STUDENT.is_aligned)
    place = (batch * heads + head) * tl.load(line + fields.TOKENS)
    grad_ptrs = grad_ptr + (place + own)[:, None] * width
    for i in tl.static_range(len(STUDENT.pieces)):
        cols, mask = piece_columns((own < rows.end)[:, None], column, width, i, STUDENT)
        grad = cast(acc[i] * factor, GRAD_DTYPE, STUDENT.is_interpreted)
        tl.store(grad_ptrs + cols, grad, mask=mask)
