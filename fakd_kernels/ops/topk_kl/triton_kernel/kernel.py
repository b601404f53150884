"""The row kernel: a student's logits against the entries that a teacher stored.

A program takes a token (several, of a small vocabulary). Of its logits it first reads the stored
ones; where a ghost or a label needs the others too, it sweeps them, for their sum and again for
their gradient. Bytes per token, V entries of the vocabulary and a gradient of g bytes: 8 V + V g,
without ghost and labels V g; 12 to 16 k for the k entries.

The ghost is one more outcome of the two distributions, whose student's logit is the log-sum-exp of
all logits that are not stored. To leave the stored ones out of it, their memory becomes -inf once
they are read: a comparison of every logit with every entry would cost more than the sweep, and the
difference of two sums its digits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...._triton import cast, log2, tanh
from ...._triton_logits import (
    LEAST,
    LN_2,
    LOG2_E,
    RowForm,
    Side,
    add_tile,
    cross_entropy,
    known_multiple,
    load_labels,
    load_logits,
    no_stats,
    renew,
)
from ...._triton_rows import store_gradient, store_values

# Arguments that change from call to call: no reason to compile again.
SIZES = ("grad_stride", "student_stride", "tokens", "vocab", "padded", "count")


class TopForm(NamedTuple):
    """What is compiled into the kernel."""

    has_ghost: bool
    wants_grad: bool
    has_labels: bool
    has_weights: bool
    is_capped: bool
    has_bias: bool
    is_aligned: bool  # strides and what may be read of a row are multiples of 16 entries
    is_interpreted: bool
    outcomes: RowForm = RowForm("kl", *[False] * 11)  # of the statistics of stored entries


@triton.jit
def load_entries(side, ptrs, index, is_used, FORM: tl.constexpr):
    """The student's logits at the stored places, -inf where there is none, and their slope."""
    x = tl.load(ptrs + index, mask=is_used, other=-float("inf")).to(tl.float32)
    slope = tl.full(x.shape, 1.0, tl.float32)
    if FORM.has_bias:
        x += tl.load(side.bias_ptr + index, mask=is_used, other=0.0).to(tl.float32)
    if FORM.is_capped:
        bent = tanh(x * side.inverse_softcap)
        slope = 1 - bent * bent
        x = tl.where(is_used, bent * side.softcap, -float("inf"))
    return x, slope


@triton.jit(do_not_specialize=SIZES)
def top_rows_kernel(
    per_token_ptr,
    slots_ptr,
    grad_ptr,
    student_ptr,
    bias_ptr,
    indices_ptr,
    logprobs_ptr,
    labels_ptr,
    weights_ptr,
    coefficients_ptr,
    grad_stride,
    student_stride,
    tokens,
    vocab,
    padded,
    count,
    inverse_temperature,
    softcap,
    inverse_softcap,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Values of both terms, and the gradient, which may replace the student's logits.

    Those are overwritten in any case. `padded` columns of a row may be read and written, of which
    `vocab` count; `count` entries are stored per token. An index outside the vocabulary makes the
    token's distance NaN, as a label does its cross-entropy.
    """
    grad_stride = known_multiple(grad_stride, FORM.is_aligned)
    student_stride = known_multiple(student_stride, FORM.is_aligned)
    padded = known_multiple(padded, FORM.is_aligned)
    program = tl.program_id(0).to(tl.int64)
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < tokens
    w = tl.full((BLOCK_N,), 1.0, tl.float32)
    if FORM.has_weights:
        w = tl.load(weights_ptr + rows, mask=is_row, other=0.0)
    is_kept = is_row & (w != 0)

    student_ptrs = student_ptr + rows[:, None] * student_stride
    grad_ptrs = grad_ptr + rows[:, None] * grad_stride
    first = tl.arange(0, BLOCK_V)[None, :]
    student = Side(student_ptrs + first, bias_ptr, softcap, inverse_softcap, vocab, padded)
    places = tl.arange(0, BLOCK_K)
    is_entry = is_kept[:, None] & (places < count)[None, :]
    offsets = rows[:, None] * count + places[None, :]
    index = tl.load(indices_ptr + offsets, mask=is_entry, other=-1)
    is_used = (index >= 0) & (index < vocab)
    x, slope = load_entries(student, student_ptrs, index, is_used, FORM)
    t = tl.load(logprobs_ptr + offsets, mask=is_used, other=-float("inf"))
    t = tl.where(index >= vocab, float("nan"), t)
    used = tl.sum(is_used.to(tl.int32), 1)

    OUTCOMES: tl.constexpr = FORM.outcomes
    stats = add_tile(no_stats(BLOCK_N), x, t, places, rows, inverse_temperature * LOG2_E, OUTCOMES)
    # Every thread has read its entries before any of them writes to the row.
    tl.debug_barrier()
    if FORM.has_ghost:
        tl.store(student_ptrs + index, tl.full(x.shape, -float("inf"), tl.float32), mask=is_used)
        tl.debug_barrier()

    # Of all logits, or with a ghost of those that are not stored.
    top = tl.full((BLOCK_N,), LEAST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if FORM.has_labels:
        label = load_labels(labels_ptr, rows, is_kept, vocab)
        is_label_entry = is_used & (index == label[:, None])
        label_logit = tl.sum(tl.where(is_label_entry, x, 0.0), 1)
        # Among the logits that are swept there is no label, if it is stored.
        is_stored = tl.max(is_label_entry.to(tl.int32), 1) != 0
        swept_label = tl.where(is_stored, -1, label)
    read = tl.max(is_kept.to(tl.int32), 0) * vocab
    if FORM.has_ghost or FORM.has_labels:
        for begin in range(0, read, BLOCK_V):
            cols = begin + tl.arange(0, BLOCK_V)
            z, _bent = load_logits(
                student, begin, cols, is_kept, FORM.has_bias, FORM.is_capped, FORM.has_ghost
            )
            top, shrink, _below, share = renew(top, z, LOG2_E)
            total = total * shrink + tl.sum(share, 1)
            if FORM.has_labels:
                label_logit += tl.sum(tl.where(cols[None, :] == swept_label[:, None], z, 0.0), 1)
    log_sum = top + log2(total, FORM.is_interpreted) * LN_2

    ghost_s = tl.zeros((BLOCK_N,), tl.float32)
    ghost_t = tl.zeros((BLOCK_N,), tl.float32)
    has_others = used < vocab
    if FORM.has_ghost:
        rest = tl.maximum(1 - tl.sum(tl.exp2(t * LOG2_E), 1), 0.0)
        log_others = tl.where(has_others, log_sum, -float("inf"))
        log_rest = tl.where(has_others, log2(rest, FORM.is_interpreted) * LN_2, -float("inf"))
        stats = add_tile(
            stats, log_others[:, None], log_rest[:, None], places, rows, LOG2_E, OUTCOMES
        )
        ghost_s = tl.exp2((log_others - stats.top_s) * LOG2_E)
        ghost_t = tl.exp2((log_rest - stats.top_t) * LOG2_E)
        log_sum = stats.top_s + log2(stats.sum_s, FORM.is_interpreted) * LN_2
    balance = tl.div_rn(stats.sum_s, stats.sum_t)
    distance = (
        stats.moment / stats.sum_t * inverse_temperature + log2(balance, FORM.is_interpreted) * LN_2
    )
    if not FORM.has_ghost:
        distance = tl.where(tl.max((index >= 0).to(tl.int32), 1) == 0, 0.0, distance)
    ce = tl.zeros((BLOCK_N,), tl.float32)
    if FORM.has_labels:
        ce = cross_entropy(log_sum, label_logit, label)
    store_values(per_token_ptr, slots_ptr, program, rows, distance, ce, w, is_row, is_kept)

    if FORM.wants_grad:
        by_share = w * tl.load(coefficients_ptr) * inverse_temperature / stats.sum_s
        by_label = tl.zeros((BLOCK_N,), tl.float32)
        if FORM.has_labels:
            by_label = w * tl.load(coefficients_ptr + 1)
        # What one of the logits that are swept is multiplied by, less its maximum.
        by_other = by_label
        if FORM.has_ghost:
            by_other = (ghost_s - ghost_t * balance) * by_share + by_label * ghost_s / stats.sum_s
        by_other = tl.where(total == 0, 0.0, by_other / total)
        last = (tl.cdiv(vocab, BLOCK_V) - 1) * BLOCK_V  # where the last tile begins
        for place in range(0, vocab, BLOCK_V):
            begin = last - place  # L2 has the end of the row
            cols = begin + tl.arange(0, BLOCK_V)
            grad = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            if FORM.has_ghost or FORM.has_labels:
                z, bent = load_logits(
                    student, begin, cols, is_kept, FORM.has_bias, FORM.is_capped, FORM.has_ghost
                )
                grad += tl.exp2((z - top[:, None]) * LOG2_E) * by_other[:, None]
                if FORM.has_labels:
                    is_label = cols[None, :] == swept_label[:, None]
                    grad -= tl.where(is_label, by_label[:, None], 0.0)
                if FORM.is_capped:
                    grad *= 1 - bent * bent
            store_gradient(grad_ptrs + first, begin, cols, grad, is_row, is_kept, padded, FORM)
        tl.debug_barrier()
        below_s, below_t = x - stats.top_s[:, None], t - stats.top_t[:, None]
        scale = inverse_temperature * LOG2_E
        grad = tl.exp2(below_s * scale) - tl.exp2(below_t * scale) * balance[:, None]
        grad *= by_share[:, None]
        if FORM.has_labels:
            grad += tl.exp2((x - log_sum[:, None]) * LOG2_E) * by_label[:, None]
            grad -= tl.where(is_label_entry, by_label[:, None], 0.0)
        grad = cast(grad * slope, grad_ptr.dtype.element_ty, FORM.is_interpreted)
        tl.store(grad_ptrs + index, grad, mask=is_used)
