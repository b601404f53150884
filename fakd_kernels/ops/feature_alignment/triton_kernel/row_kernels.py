"""Row kernels of feature alignment: value and gradient of rows of p and t in one pass.

A program takes a block of rows; one launch serves the rows of many pairs (`_triton.make_table`).
It leaves the weighted values of its rows in a slot of two float64 numbers, and `reduce_kernel` adds
the slots of each pair in a fixed order: no atomics, so equal bits every run.

Bytes per row, which is all these kernels cost: p and t read and dp written, 6 D in bfloat16 without
a projection; with one, p is a block of P in float32. The arithmetic, about 12 operations per
element, is far below what a card does meanwhile. A tile of 2048 elements in 4 warps (4096 in 8)
holds 16 elements of p and of t in a thread: 99 to 132 registers, 12 to 16 warps and 24 KiB of loads
in flight on a multiprocessor.
"""

import triton
import triton.language as tl

from ...._triton import cast, find_line, load_pointer, load_size
from .row_math import load_weights, row_gradient, row_sums, row_terms, store_values

# Fields of the tables' lines, in order. `slot` is where the values of the first program go.
ALIGN_FIELDS = (
    *("first", "pair", "student", "teacher", "weights", "grad", "capacity", "width"),
    *("stride_student", "stride_teacher", "slot"),
)
_ALIGN = tl.constexpr(len(ALIGN_FIELDS))


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
    IS_SQUARED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Value and gradient of BLOCK_N rows of p and t, each read once into registers.

    p is the student itself where there is no projection, else a block of P, which dP may replace.
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
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)  # int64, as `block` is
    mask_rows = rows < tl.load(line + 6)
    w = load_weights(line + 4, rows, mask_rows)
    mask_kept = w != 0
    cols = tl.arange(0, BLOCK_D)
    stride_student = load_size(line + 8, IS_ALIGNED)
    stride_teacher = load_size(line + 9, IS_ALIGNED)
    student_ptrs = student_ptr + rows[:, None] * stride_student + cols[None, :]
    teacher_ptrs = teacher_ptr + rows[:, None] * stride_teacher + cols[None, :]
    grad_ptr = load_pointer(line + 5, GRAD_DTYPE, IS_ALIGNED)
    grad_ptrs = grad_ptr + rows[:, None] * width + cols[None, :]

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
def reduce_kernel(sums_ptr, partial_ptr, table_ptr, BLOCK: tl.constexpr):
    """One program per pair: add its slots, in float64 and in a fixed order."""
    pair = tl.program_id(0)
    slot, slots = tl.load(table_ptr + pair * 2), tl.load(table_ptr + pair * 2 + 1)
    places = tl.arange(0, BLOCK)
    cosine = tl.zeros((BLOCK,), tl.float64)
    euclidean = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, slots, BLOCK):
        mask = places < slots - begin
        ptrs = partial_ptr + (slot + begin + places) * 2
        cosine += tl.load(ptrs, mask=mask, other=0.0)
        euclidean += tl.load(ptrs + 1, mask=mask, other=0.0)
    tl.store(sums_ptr + pair * 2, tl.sum(cosine, 0).to(tl.float32))
    tl.store(sums_ptr + pair * 2 + 1, tl.sum(euclidean, 0).to(tl.float32))
