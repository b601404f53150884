"""Products over rows, L^T diag(s) R: see `product_kernels` for the family they belong to."""

import triton
import triton.language as tl

from ...._triton import cast, dot, find_line, load_pointer, load_size
from .product_kernels import tile_place

# Fields of the tables' lines, in order.
OUTER_FIELDS = ("first", "out", "rows", "columns", "is_added", "segment", "segments")
OUTER_SEGMENT_FIELDS = (
    *("left", "right", "depth", "stride_left", "stride_right", "scale", "rows", "count"),
)

_OUTER = tl.constexpr(len(OUTER_FIELDS))
_OUTER_SEGMENT = tl.constexpr(len(OUTER_SEGMENT_FIELDS))


@triton.jit(do_not_specialize=["tiles"])
def outer_kernel(
    table_ptr,
    segments_ptr,
    tiles,
    LEFT_DTYPE: tl.constexpr,
    RIGHT_DTYPE: tl.constexpr,
    OUT_TERMS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """out (+)= sum over segments of L^T diag(scale) R, [rows, columns].

    The segments of a job are the pairs that share a projection, added in their order.
    HAS_SCALE: rows of scale 0 are not read. HAS_ROWS: row k of R is rows[k], and the depth is a
    count on the device. OUT_TERMS = 2 stores bfloat16 and the bfloat16 of what that lost.
    """
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        line = table_ptr + find_line(table_ptr, tile, _OUTER, LINES) * _OUTER
        size_m, size_n = load_size(line + 2, IS_ALIGNED), load_size(line + 3, IS_ALIGNED)
        tile_m, tile_n = tile_place(tile - tl.load(line), size_m, size_n, BLOCK_M, BLOCK_N)
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < size_m, offs_n < size_n
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first_segment = tl.load(line + 5)
        for index in range(first_segment, first_segment + tl.load(line + 6)):
            segment = segments_ptr + index * _OUTER_SEGMENT
            left_ptr = load_pointer(segment, LEFT_DTYPE, IS_ALIGNED) + offs_m[None, :]
            right_ptr = load_pointer(segment + 1, RIGHT_DTYPE, IS_ALIGNED) + offs_n[None, :]
            stride_left = load_size(segment + 3, IS_ALIGNED)
            stride_right = load_size(segment + 4, IS_ALIGNED)
            depth = tl.load(segment + 2)
            if HAS_ROWS:
                depth = tl.load(load_pointer(segment + 7, tl.int32, False)).to(tl.int64)
            for begin in range(0, depth, BLOCK_K):
                places = begin + tl.arange(0, BLOCK_K).to(tl.int64)
                mask_k = places < depth
                rows = places
                if HAS_ROWS:
                    rows_ptr = load_pointer(segment + 6, tl.int32, False)
                    rows = tl.load(rows_ptr + places, mask=mask_k, other=0).to(tl.int64)
                if HAS_SCALE:
                    scale_ptr = load_pointer(segment + 5, tl.float32, False)
                    scale = tl.load(scale_ptr + places, mask=mask_k, other=0.0)
                    mask_k = scale != 0
                left = tl.load(
                    left_ptr + places[:, None] * stride_left,
                    mask=mask_k[:, None] & mask_m[None, :],
                    other=0.0,
                )  # [BLOCK_K, BLOCK_M]
                right = tl.load(
                    right_ptr + rows[:, None] * stride_right,
                    mask=mask_k[:, None] & mask_n[None, :],
                    other=0.0,
                )  # [BLOCK_K, BLOCK_N]
                if HAS_SCALE:
                    right = right.to(tl.float32) * scale[:, None]
                    if PRECISION == "native":
                        right = cast(right, RIGHT_DTYPE, IS_INTERPRETED)
                acc = dot(left.T, right, acc, PRECISION, IS_INTERPRETED)
        offsets = offs_m[:, None] * size_n + offs_n[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        if OUT_TERMS == 2:
            out_ptrs = load_pointer(line + 1, tl.bfloat16, IS_ALIGNED) + offsets
            high = cast(acc, tl.bfloat16, IS_INTERPRETED)
            low = cast(acc - high.to(tl.float32), tl.bfloat16, IS_INTERPRETED)
            tl.store(out_ptrs, high, mask=mask)
            tl.store(out_ptrs + size_m * size_n, low, mask=mask)
        else:
            out_ptrs = load_pointer(line + 1, tl.float32, IS_ALIGNED) + offsets
            if tl.load(line + 4) != 0:
                acc += tl.load(out_ptrs, mask=mask, other=0.0)
            tl.store(out_ptrs, acc, mask=mask)
