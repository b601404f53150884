"""The row kernel of `logit_kl` and `linear_kl`: distance, cross-entropy and gradient of tokens.

A program takes a token (several, of a small vocabulary), and both sides' logits. Bytes, all that
it costs, with V entries of s and t bytes and a gradient of g:

    up to 4096 entries   V (s + t + g): logits are read once, into registers
    more                 V (s + t) for the sums, again for the gradient ("jsd": for its values too),
                         and V g written. The second sweep begins where the first ended, so that L2
                         serves as much of it as it holds of all rows in flight.

Values alone take the first sweep ("jsd": two). About 20 instructions and 2 exponentials an entry
and sweep ("jsd": 45 and 3). While it reads an entry of both sides in float32 an H100 has time for
70 and 9, in bfloat16 for half as many: "jsd" may not keep up there. A program leaves its weighted
values in a slot of two float64 numbers, which `reduce_kernel` adds in a fixed order: no atomics,
so equal bits every run. Tokens of weight 0 are not read; their gradient is 0.

A tile of 4096 entries in 8 warps has 16 of each side in a thread: 64 to 128 registers, 16 to 32
warps on a multiprocessor. Chosen 2026-11 by registers and spills, see
tests/kernels/test_triton_aot_outputs.py; not yet tuned on a card.
"""

import triton
import triton.language as tl

from ._triton import cast
from ._triton_logits import (
    LN_2,
    LOG2_E,
    Gains,
    Mixture,
    Side,
    add_tile,
    cross_entropy,
    distance_of,
    known_multiple,
    load_labels,
    load_sides,
    middle_terms,
    no_stats,
    tile_gradient,
)

# Arguments that change from call to call: no reason to compile again.
SIZES = ("grad_stride", "student_stride", "teacher_stride", "tokens", "vocab", "padded")


@triton.jit
def store_gradient(ptrs, begin, cols, grad, is_row, is_kept, padded, FORM: tl.constexpr):
    grad = tl.where(is_kept[:, None], grad, 0.0)
    grad = cast(grad, ptrs.dtype.element_ty, FORM.is_interpreted)
    tl.store(ptrs + begin, grad, mask=is_row[:, None] & (cols < padded)[None, :])


@triton.jit
def store_values(per_token_ptr, slots_ptr, program, rows, distance, ce, w, is_row, is_kept):
    """Values of tokens, 0 of those that do not count, and the weighted sums of the program."""
    distance = tl.where(is_kept, distance, 0.0)
    ce = tl.where(is_kept, ce, 0.0)
    tl.store(per_token_ptr + rows * 2, distance, mask=is_row)
    tl.store(per_token_ptr + rows * 2 + 1, ce, mask=is_row)
    w = w.to(tl.float64)
    tl.store(slots_ptr + program * 2, tl.sum(w * distance, 0))
    tl.store(slots_ptr + program * 2 + 1, tl.sum(w * ce, 0))


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    per_token_ptr,
    slots_ptr,
    grad_ptr,
    student_ptr,
    teacher_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    labels_ptr,
    weights_ptr,
    coefficients_ptr,
    grad_stride,
    student_stride,
    teacher_stride,
    tokens,
    vocab,
    padded,
    inverse_temperature,
    student_softcap,
    inverse_student_softcap,
    teacher_softcap,
    inverse_teacher_softcap,
    teacher_share,
    student_share,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Values of both terms, and the gradient, which may replace the student's logits.

    With z = exp(logit - maximum) and Z its sum, P = z / Z, for "kl"

        KL(T || S) = sum_j z^T_j (below^T_j - below^S_j) / Z^T + log(Z^S / Z^T)
        d / d s    = (z^S - z^T Z^S / Z^T) / Z^S

    `padded` columns of a row may be read and written, of which `vocab` count.
    """
    grad_stride = known_multiple(grad_stride, FORM.is_aligned)
    student_stride = known_multiple(student_stride, FORM.is_aligned)
    teacher_stride = known_multiple(teacher_stride, FORM.is_aligned)
    padded = known_multiple(padded, FORM.is_aligned)
    program = tl.program_id(0).to(tl.int64)
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < tokens
    w = tl.full((BLOCK_N,), 1.0, tl.float32)
    if FORM.has_weights:
        w = tl.load(weights_ptr + rows, mask=is_row, other=0.0)
    is_kept = is_row & (w != 0)
    label = tl.zeros((BLOCK_N,), tl.int32)
    if FORM.has_labels:
        label = load_labels(labels_ptr, rows, is_kept, vocab)

    first = tl.arange(0, BLOCK_V)[None, :]
    student_ptrs = student_ptr + rows[:, None] * student_stride + first
    teacher_ptrs = teacher_ptr + rows[:, None] * teacher_stride + first
    grad_ptrs = grad_ptr + rows[:, None] * grad_stride + first
    student = Side(
        student_ptrs, student_bias_ptr, student_softcap, inverse_student_softcap, vocab, padded
    )
    teacher = Side(
        teacher_ptrs, teacher_bias_ptr, teacher_softcap, inverse_teacher_softcap, vocab, padded
    )
    scale = inverse_temperature * LOG2_E
    mixture = Mixture(teacher_share, student_share)
    stats = no_stats(BLOCK_N)
    # Rows that are all away need no sweep, only a gradient of 0.
    read = tl.max(is_kept.to(tl.int32), 0) * vocab
    if FORM.is_wide:
        for begin in range(0, read, BLOCK_V):
            cols, s, t, bent = load_sides(student, teacher, begin, is_kept, BLOCK_V, FORM)
            stats = add_tile(stats, s, t, cols, label, scale, FORM)
    else:
        cols, s, t, bent = load_sides(student, teacher, 0, is_kept, BLOCK_V, FORM)
        stats = add_tile(stats, s, t, cols, label, scale, FORM)

    distance, center, balance, by_share = distance_of(stats, inverse_temperature, FORM)
    last = (tl.cdiv(vocab, BLOCK_V) - 1) * BLOCK_V  # where the last tile begins
    if FORM.distance == "jsd":
        of_teacher = tl.zeros((BLOCK_N,), tl.float32)
        if FORM.is_wide:
            for back in range(0, read, BLOCK_V):
                _cols, s, t, bent = load_sides(
                    student, teacher, last - back, is_kept, BLOCK_V, FORM
                )
                more_t, more_s, _share, _by = middle_terms(stats, s, t, balance, scale, mixture)
                of_teacher += more_t
                center += more_s
        else:
            of_teacher, center, _share, _by = middle_terms(stats, s, t, balance, scale, mixture)
        center /= stats.sum_s
        distance = (of_teacher / stats.sum_t + center) * LN_2
    ce = tl.zeros((BLOCK_N,), tl.float32)
    sum_ce = stats.sum_ce if FORM.is_warm else stats.sum_s
    if FORM.has_labels:
        ce = cross_entropy(tl.log2(sum_ce) * LN_2, stats.label_logit - stats.top_s, label)
    store_values(per_token_ptr, slots_ptr, program, rows, distance, ce, w, is_row, is_kept)

    if FORM.wants_grad:
        by_label = w * tl.load(coefficients_ptr + 1)
        by_share *= w * tl.load(coefficients_ptr)
        gains = Gains(by_share, by_label / sum_ce, by_label)
        if FORM.is_wide:
            for place in range(0, vocab, BLOCK_V):
                begin = place if FORM.distance == "jsd" else last - place
                cols, s, t, bent = load_sides(student, teacher, begin, is_kept, BLOCK_V, FORM)
                grad = tile_gradient(
                    stats, s, t, bent, cols, label, balance, center, gains, scale, mixture, FORM
                )
                store_gradient(grad_ptrs, begin, cols, grad, is_row, is_kept, padded, FORM)
        else:
            grad = tile_gradient(
                stats, s, t, bent, cols, label, balance, center, gains, scale, mixture, FORM
            )
            store_gradient(grad_ptrs, 0, cols, grad, is_row, is_kept, padded, FORM)


@triton.jit(do_not_specialize=["count"])
def reduce_kernel(sums_ptr, slots_ptr, count, BLOCK: tl.constexpr):
    """One program: the sums of all slots, in float64 and in a fixed order."""
    places = tl.arange(0, BLOCK)
    distance = tl.zeros((BLOCK,), tl.float64)
    ce = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, count, BLOCK):
        mask = places < count - begin
        ptrs = slots_ptr + (begin + places) * 2
        distance += tl.load(ptrs, mask=mask, other=0.0)
        ce += tl.load(ptrs + 1, mask=mask, other=0.0)
    tl.store(sums_ptr, tl.sum(distance, 0).to(tl.float32))
    tl.store(sums_ptr + 1, tl.sum(ce, 0).to(tl.float32))
