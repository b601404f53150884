"""Row kernels of feature alignment: whatever is done row by row, between the matrix products.

A program takes a block of rows; one launch serves the rows of many pairs (`_triton.make_table`).
A row kernel leaves the weighted values of its rows in a slot of two float64 numbers, and
`reduce_kernel` adds the slots of each pair in a fixed order: no atomics, so equal bits every run.

Bytes per row, which is all these kernels cost:

    align_rows_kernel   p and t read, dp written: 6 D in bfloat16 without a projection; with one,
                        p is a block of P in L2
    gram_rows_kernel    u and v read, dx written: 8 Ds + Ds * itemsize

The arithmetic, about 12 operations per element, is far below what a card does meanwhile. A tile
of 2048 elements in 4 warps (4096 in 8) holds 16 elements of p and of t in a thread: 99 to 132
registers, 12 to 16 warps and 24 KiB of loads in flight on a multiprocessor. Blocks were chosen
2026-11 by these counts; not yet tuned on a card.
Goal when a card comes: align_rows at 85 % of the copy bandwidth measured there.
"""

import triton
import triton.language as tl

from ...._triton import cast, find_line, load_pointer, load_size
from .row_math import load_weights, not_negative, row_gradient, row_sums, row_terms, store_values

# Fields of the tables' lines, in order. `slot` is where the values of the first program go.
ALIGN_FIELDS = (
    *("first", "pair", "student", "teacher", "weights", "grad", "capacity", "width"),
    *("stride_student", "stride_teacher", "slot", "rows", "count"),
)
GRAM_FIELDS = (
    *("first", "pair", "capacity", "student_width", "teacher_width", "tiles", "weights"),
    *("teacher_sums", "student_sums", "shift", "bias_square", "u", "v", "grad", "scales", "slot"),
)

_ALIGN = tl.constexpr(len(ALIGN_FIELDS))
_GRAM = tl.constexpr(len(GRAM_FIELDS))


@triton.jit
def align_rows_kernel(
    partial_ptr,
    table_ptr,
    coefficients_ptr,
    eps,
    X_DTYPE: tl.constexpr,
    T_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_WIDE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    IS_SQUARED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Value and gradient of BLOCK_N rows of p and t, each read once into registers.

    p is the student itself where there is no projection. HAS_ROWS: p is a block of P, whose place
    i belongs to row rows[i] of t, of which only the device knows the count; dP may replace P.
    Rows wider than BLOCK_D (IS_WIDE) are swept twice; the second read is served by L2.
    """
    program = tl.program_id(0)
    line = table_ptr + find_line(table_ptr, program, _ALIGN, LINES) * _ALIGN
    block = program - tl.load(line)
    pair = tl.load(line + 1)
    student_ptr = load_pointer(line + 2, X_DTYPE, IS_ALIGNED)
    teacher_ptr = load_pointer(line + 3, T_DTYPE, IS_ALIGNED)
    grad_address = tl.load(line + 5)
    width = load_size(line + 7, IS_ALIGNED)
    places = block * BLOCK_N + tl.arange(0, BLOCK_N)  # int64, as `block` is
    if HAS_ROWS:
        mask_rows = places < tl.load(load_pointer(line + 12, tl.int32, False))
        rows_ptr = load_pointer(line + 11, tl.int32, False)
        rows = tl.load(rows_ptr + places, mask=mask_rows, other=0).to(tl.int64)
    else:
        mask_rows = places < tl.load(line + 6)
        rows = places
    w = load_weights(line + 4, rows, mask_rows)
    mask_kept = w != 0
    cols = tl.arange(0, BLOCK_D)
    stride_student = load_size(line + 8, IS_ALIGNED)
    stride_teacher = load_size(line + 9, IS_ALIGNED)
    student_ptrs = student_ptr + places[:, None] * stride_student + cols[None, :]
    teacher_ptrs = teacher_ptr + rows[:, None] * stride_teacher + cols[None, :]
    grad_ptr = load_pointer(line + 5, GRAD_DTYPE, IS_ALIGNED)
    grad_ptrs = grad_ptr + places[:, None] * width + cols[None, :]

    mask = mask_kept[:, None] & (cols < width)[None, :]
    p = tl.load(student_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    t = tl.load(teacher_ptrs, mask=mask, other=0.0).to(tl.float32)
    r1, r2, r3, d2, r1_minus_r3 = row_sums(p, t)
    if IS_WIDE:
        for begin in range(BLOCK_D, width, BLOCK_D):
            mask = mask_kept[:, None] & (cols < width - begin)[None, :]
            p = tl.load(student_ptrs + begin, mask=mask, other=0.0).to(tl.float32)
            t = tl.load(teacher_ptrs + begin, mask=mask, other=0.0).to(tl.float32)
            more = row_sums(p, t)
            r1 += more[0]
            r2 += more[1]
            r3 += more[2]
            d2 += more[3]
            r1_minus_r3 += more[4]

    cosine, euclidean, along_p, along_t, slope = row_terms(
        r1, r2, r3, d2, r1_minus_r3, w, coefficients_ptr + pair * 2, width, eps, IS_SQUARED
    )
    store_values(partial_ptr, tl.load(line + 10) + block, cosine, euclidean)
    if grad_address != 0:
        if IS_WIDE:
            for begin in range(0, width, BLOCK_D):
                mask_cols = (cols < width - begin)[None, :]
                mask = mask_kept[:, None] & mask_cols
                p = tl.load(student_ptrs + begin, mask=mask, other=0.0).to(tl.float32)
                t = tl.load(teacher_ptrs + begin, mask=mask, other=0.0).to(tl.float32)
                grad = row_gradient(p, t, along_p, along_t, slope)
                grad = cast(tl.where(mask_kept[:, None], grad, 0.0), GRAD_DTYPE, IS_INTERPRETED)
                tl.store(grad_ptrs + begin, grad, mask=mask_rows[:, None] & mask_cols)
        else:
            grad = row_gradient(p, t, along_p, along_t, slope)
            grad = cast(tl.where(mask_kept[:, None], grad, 0.0), GRAD_DTYPE, IS_INTERPRETED)
            tl.store(grad_ptrs, grad, mask=mask_rows[:, None] & (cols < width)[None, :])


@triton.jit
def gram_rows_kernel(
    partial_ptr,
    table_ptr,
    coefficients_ptr,
    eps,
    GRAD_DTYPE: tl.constexpr,
    CANCELLED: tl.constexpr,
    CHECKS_GRADIENT: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_SQUARED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Gram route: sums of the product kernels -> values, scales, and dx = a (v + c) + b u.

    scales [3, N]: a = A + S (of x in X^T diag(a) X), b = B - S (of t), and 1 for the rows whose
    sums cancel (`Arithmetic.cancelled`): those have a = b = 0 here, and take the direct route.
    CHECKS_GRADIENT: so do rows whose a (v + c) and b u cancel, as where t is W x plus something
    that W^T does not see; that sweeps u and v once more, from L2.
    """
    program = tl.program_id(0)
    line = table_ptr + find_line(table_ptr, program, _GRAM, LINES) * _GRAM
    block = program - tl.load(line)
    pair = tl.load(line + 1)
    n = tl.load(line + 2)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_rows = rows < n
    w = load_weights(line + 6, rows, mask_rows)
    mask_kept = w != 0

    teacher_sums = load_pointer(line + 7, tl.float32, False) + rows  # |t|^2, t.b, x.u per tile
    student_sums = load_pointer(line + 8, tl.float32, False) + rows  # |x|^2, x.c, x.v per tile
    r3 = tl.load(teacher_sums, mask=mask_kept, other=0.0).to(tl.float64)
    r2 = tl.load(teacher_sums + n, mask=mask_kept, other=0.0).to(tl.float64)
    along_shift = tl.load(student_sums + n, mask=mask_kept, other=0.0).to(tl.float64)
    r1 = tl.zeros((BLOCK_N,), tl.float64)
    for tile in range(2, 2 + tl.load(line + 5)):
        r2 += tl.load(teacher_sums + tile * n, mask=mask_kept, other=0.0)
        r1 += tl.load(student_sums + tile * n, mask=mask_kept, other=0.0)
    bias_square = tl.load(load_pointer(line + 10, tl.float32, False))
    uncancelled = r1 + bias_square  # |W x|^2 + |b|^2
    r1 = not_negative(uncancelled + 2 * along_shift)
    d2 = not_negative(r1 - 2 * r2 + r3)
    is_cancelled = (d2 < (r1 + r3) * CANCELLED) | (r1 < uncancelled * CANCELLED)

    coefficients_ptr += pair * 2
    teacher_width = tl.load(line + 4)
    cosine, euclidean, along_p, along_t, slope = row_terms(
        r1, r2, r3, d2, r1 - r3, w, coefficients_ptr, teacher_width, eps, IS_SQUARED
    )
    a = (along_p + slope).to(tl.float32)
    b = (along_t - slope).to(tl.float32)
    width = load_size(line + 3, IS_ALIGNED)
    cols = tl.arange(0, BLOCK_D)
    offsets = rows[:, None] * width + cols[None, :]
    shift_ptr = load_pointer(line + 9, tl.float32, False)  # c
    u_ptrs = load_pointer(line + 11, tl.float32, IS_ALIGNED) + offsets
    v_ptrs = load_pointer(line + 12, tl.float32, IS_ALIGNED) + offsets
    grad_ptrs = load_pointer(line + 13, GRAD_DTYPE, IS_ALIGNED) + offsets
    is_wanted = tl.load(line + 13) != 0
    if CHECKS_GRADIENT and is_wanted:
        whole = tl.zeros((BLOCK_N,), tl.float32)
        parts = tl.zeros((BLOCK_N,), tl.float32)
        for begin in range(0, width, BLOCK_D):
            mask_cols = cols < width - begin
            mask = mask_kept[:, None] & mask_cols[None, :]
            u = tl.load(u_ptrs + begin, mask=mask, other=0.0) * b[:, None]
            v = tl.load(v_ptrs + begin, mask=mask, other=0.0)
            v += tl.load(shift_ptr + begin + cols, mask=mask_cols, other=0.0)[None, :]
            v *= a[:, None]
            whole += tl.sum((v + u) * (v + u), 1)
            parts += tl.sum(v * v + u * u, 1)
        is_cancelled = is_cancelled | (whole < parts * CANCELLED)
    is_cancelled = is_cancelled & mask_kept
    is_counted = mask_kept & (is_cancelled == 0)

    cosine = tl.where(is_counted, cosine, 0.0)
    euclidean = tl.where(is_counted, euclidean, 0.0)
    store_values(partial_ptr, tl.load(line + 15) + block, cosine, euclidean)
    a = tl.where(is_counted, a, 0.0)
    b = tl.where(is_counted, b, 0.0)
    scales = load_pointer(line + 14, tl.float32, False) + rows
    tl.store(scales, a, mask=mask_rows)
    tl.store(scales + n, b, mask=mask_rows)
    tl.store(scales + 2 * n, is_cancelled.to(tl.float32), mask=mask_rows)

    if is_wanted:
        for begin in range(0, width, BLOCK_D):
            mask_cols = cols < width - begin
            mask = is_counted[:, None] & mask_cols[None, :]
            u = tl.load(u_ptrs + begin, mask=mask, other=0.0)
            v = tl.load(v_ptrs + begin, mask=mask, other=0.0)
            v += tl.load(shift_ptr + begin + cols, mask=mask_cols, other=0.0)[None, :]
            grad = cast(a[:, None] * v + b[:, None] * u, GRAD_DTYPE, IS_INTERPRETED)
            tl.store(grad_ptrs + begin, grad, mask=mask_rows[:, None] & mask_cols[None, :])
