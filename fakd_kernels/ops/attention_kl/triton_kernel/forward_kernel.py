"""The value of every query row, and what the gradient kernels need of it.

A program takes a block of queries of one head and sweeps its keys: 2 T^2 (Ks + Kt) FLOPs a head
(half, if causal), twice that for "jsd" and "mse", whose distances need both sums first. It reads
q once and, from L2, k for every block of queries; it writes 20 bytes per row (24 with a center).
"""

import triton
import triton.language as tl

from . import fields
from .kept import head_ptr, store_numbers, store_sums, store_values
from .rows import (
    load_int,
    meets,
    open_rows,
    open_side,
    other_weights,
    place_program,
    score,
)
from .tile_math import LN2, MASKED, renew, terms, weigh


@triton.jit
def forward_kernel(
    table_ptr,
    heads_ptr,
    DISTANCE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """Weighted values; the sums and the center of each row, where they have a place.

    With below = score - maximum and Z = sum of exp(below), one sweep gives the divergences:

        KL(T || S) = sum_j P^T_j (below^T_j - below^S_j) - log Z^T + log Z^S

    whose moment, the sum, is kept while both maxima move. Scores that differ by a constant between
    the sides cost it no digits, since the maxima differ by that constant too.
    """
    line, block, begin, head, batch = place_program(table_ptr, LINES, BLOCK_OWN, True)
    rows = open_rows(line, begin, batch, BLOCK_OWN, HAS_WEIGHTS)
    side = line + fields.STUDENT
    student = open_side(side, rows, batch, head, BLOCK_OWN, BLOCK_OTHER, STUDENT)
    teacher_head = tl.load(heads_ptr + tl.load(line + fields.TEACHER_HEADS) + head)
    side = line + fields.TEACHER
    teacher = open_side(side, rows, batch, teacher_head, BLOCK_OWN, BLOCK_OTHER, TEACHER)
    top_s = tl.full((BLOCK_OWN,), MASKED, tl.float32)
    top_t = tl.full((BLOCK_OWN,), MASKED, tl.float32)
    sum_s = tl.zeros((BLOCK_OWN,), tl.float32)
    sum_t = tl.zeros((BLOCK_OWN,), tl.float32)
    moment = tl.zeros((BLOCK_OWN,), tl.float32)
    for start in range(rows.first, rows.last, BLOCK_OTHER):
        weights = other_weights(start, rows, BLOCK_OTHER, HAS_WEIGHTS)
        s, t = score(student, start, rows, STUDENT), score(teacher, start, rows, TEACHER)
        mask = meets(start, weights, rows, HAS_WEIGHTS)
        s, t = tl.where(mask, s, MASKED), tl.where(mask, t, MASKED)
        apart, old_s, old_t = top_t - top_s, sum_s, sum_t
        top_s, sum_s, shrink_s, share_s, below_s = renew(top_s, sum_s, s)
        top_t, sum_t, shrink_t, share_t, below_t = renew(top_t, sum_t, t)
        apart -= top_t - top_s
        if DISTANCE == "kl":
            moment = (moment + apart * old_t) * shrink_t + tl.sum(share_t * (below_t - below_s), 1)
        elif DISTANCE == "reverse_kl":
            moment = (moment - apart * old_s) * shrink_s + tl.sum(share_s * (below_s - below_t), 1)
    value = tl.zeros((BLOCK_OWN,), tl.float32)
    center = tl.zeros((BLOCK_OWN,), tl.float32)
    # Closer than a difference of logarithms where the sides are close; exactly 1 and 0 if equal.
    ratio = tl.div_rn(sum_s, sum_t)
    log_ratio = tl.log2(ratio)
    if DISTANCE == "kl":
        value = moment / sum_t + log_ratio
    elif DISTANCE == "reverse_kl":
        value = moment / sum_s - log_ratio
        center = value
    else:
        log_s, log_t = tl.log2(sum_s)[:, None], tl.log2(sum_t)[:, None]
        for start in range(rows.first, rows.last, BLOCK_OTHER):
            weights = other_weights(start, rows, BLOCK_OTHER, HAS_WEIGHTS)
            s = score(student, start, rows, STUDENT) - top_s[:, None]
            t = score(teacher, start, rows, TEACHER) - top_t[:, None]
            values, by = terms(s - log_s, t - log_t, s - t - log_ratio[:, None], DISTANCE)
            mask = meets(start, weights, rows, HAS_WEIGHTS)
            value += tl.sum(tl.where(mask, values, 0.0), 1)
            center += tl.sum(tl.where(mask, weigh(s, by, DISTANCE), 0.0), 1)
        center /= sum_s
    if DISTANCE != "mse":
        value *= LN2
    # Slots lie in the order head, batch, block: those of one head are neighbours.
    blocks = tl.cdiv(rows.end - load_int(line + fields.BEGIN), BLOCK_OWN)
    slot = (head * tl.load(line + fields.BATCHES) + batch) * blocks + block
    store_values(line, slot, value, rows)
    if tl.load(line + fields.STUDENT_SUMS) != 0:
        heads = tl.load(line + fields.STUDENT + fields.HEADS)
        store_sums(line, line + fields.STUDENT_SUMS, heads, batch, head, top_s, 1 / sum_s, rows)
        store_sums(line, line + fields.TEACHER_SUMS, heads, batch, head, top_t, 1 / sum_t, rows)
        balance = ratio if DISTANCE == "kl" or DISTANCE == "mse" else log_ratio
        ptr, _stride = head_ptr(line, line + fields.BALANCE, heads, batch, head)
        store_numbers(ptr, balance, 0.0, rows)
        if DISTANCE != "kl":
            ptr, _stride = head_ptr(line, line + fields.CENTER, heads, batch, head)
            store_numbers(ptr, center, 0.0, rows)
