"""Kernels beside the large ones: list rows, sum columns, sum the values of each pair."""

import triton
import triton.language as tl

from ...._triton import find_line, load_pointer
from .row_math import load_weights

# Fields of the tables' lines, in order.
COMPACT_FIELDS = ("first", "keep", "begin", "capacity", "rows", "count")
COLUMN_FIELDS = ("first", "out", "width", "is_added", "segment", "segments")
COLUMN_SEGMENT_FIELDS = ("matrix", "stride", "capacity", "scale", "count")

_COMPACT = tl.constexpr(len(COMPACT_FIELDS))
_COLUMN = tl.constexpr(len(COLUMN_FIELDS))
_COLUMN_SEGMENT = tl.constexpr(len(COLUMN_SEGMENT_FIELDS))


@triton.jit
def compact_kernel(table_ptr, BLOCK: tl.constexpr):
    """One program per chunk: list the rows whose `keep` is not 0, in order, and count them."""
    line = table_ptr + tl.program_id(0).to(tl.int64) * _COMPACT
    begin, capacity = tl.load(line + 2), tl.load(line + 3)
    rows_ptr = load_pointer(line + 4, tl.int32, False)
    count = tl.zeros((), tl.int32)
    for start in range(0, capacity, BLOCK):
        places = start + tl.arange(0, BLOCK)
        rows = begin + places
        keep = (load_weights(line + 1, rows, places < capacity) != 0).to(tl.int32)
        place = count + tl.cumsum(keep, 0) - keep
        tl.store(rows_ptr + place, rows.to(tl.int32), mask=keep != 0)
        count += tl.sum(keep, 0)
    tl.store(load_pointer(line + 5, tl.int32, False), count)


@triton.jit
def column_sums_kernel(
    table_ptr,
    segments_ptr,
    DTYPE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (+)= sum over segments and rows of scale_row * matrix[row], for biases.

    Rows of scale 0 are not read. A program owns BLOCK_D columns and walks all rows.
    """
    program = tl.program_id(0)
    line = table_ptr + find_line(table_ptr, program, _COLUMN, LINES) * _COLUMN
    cols = (program - tl.load(line)) * BLOCK_D + tl.arange(0, BLOCK_D)
    out_ptrs = load_pointer(line + 1, tl.float32, False) + cols
    mask_cols = cols < tl.load(line + 2)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first_segment = tl.load(line + 4)
    for index in range(first_segment, first_segment + tl.load(line + 5)):
        segment = segments_ptr + index * _COLUMN_SEGMENT
        matrix_ptr = load_pointer(segment, DTYPE, False)
        stride = tl.load(segment + 1)
        count = tl.load(segment + 2)
        if tl.load(segment + 4) != 0:
            count = tl.load(load_pointer(segment + 4, tl.int32, False)).to(tl.int64)
        for begin in range(0, count, BLOCK_N):
            rows = begin + tl.arange(0, BLOCK_N).to(tl.int64)
            scale = load_weights(segment + 3, rows, rows < count)
            mask = (scale != 0)[:, None] & mask_cols[None, :]
            matrix_ptrs = matrix_ptr + rows[:, None] * stride + cols[None, :]
            total += scale[:, None] * tl.load(matrix_ptrs, mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(total.to(tl.float64), 0).to(tl.float32)  # bias gradients are long coherent sums
    if tl.load(line + 3) != 0:
        result += tl.load(out_ptrs, mask=mask_cols, other=0.0)
    tl.store(out_ptrs, result, mask=mask_cols)


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
