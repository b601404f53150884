"""Matrix products of feature alignment, with the row arithmetic in their epilogues.

Each kernel is persistent and grouped: `programs` programs walk the output tiles of all jobs of a
launch in turn, so many small pairs share a launch and a large pair fills the card by itself.

    outer_kernel        L^T diag(s) R    G = W^T W;  X^T diag(a) X;  T^T diag(b) X;  dP^T X
    statistics_kernel   A B, x.(A B)     U = T W with x.u, |t|^2, t.b;  V = X G with x.v
    product_kernel      A B              P = X W^T + b;  dX = dP W;  dW += W (X^T diag(a) X)

FLOPs per row: direct 6 Ds Dt; gram 4 Ds Dt + 4 Ds^2, the last term twice where G is split.
Tiles of 128 x 128 accumulate in 64 float32 registers of each of 256 threads. Per step of depth 64
a bfloat16 tile moves 32 KiB from L2 to shared memory for 2 MFLOP, 64 FLOP per byte.
Goal when a card comes: 75 % of the bfloat16 rate that a plain cuBLAS product reaches there.
"""

import triton
import triton.language as tl

from ...._triton import cast, dot, find_line, load_pointer, load_size
from .row_math import load_weights

# Fields of the tables' lines, in order.
STATISTICS_FIELDS = (
    *("first", "a", "b", "x", "out", "statistics", "weights", "vector"),
    *("rows", "columns", "depth", "stride_a", "stride_x"),
)
PRODUCT_FIELDS = (
    *("first", "a", "b", "out", "bias", "capacity", "columns", "depth", "stride_a"),
    *("rows", "count"),
)

_STATISTICS = tl.constexpr(len(STATISTICS_FIELDS))
_PRODUCT = tl.constexpr(len(PRODUCT_FIELDS))
_BAND = tl.constexpr(8)  # tile rows walked together, so that they share columns in L2


@triton.jit
def tile_place(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column of a tile, in bands of _BAND tile rows."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    band = tile // (tiles_n * _BAND)
    height = tl.minimum(tiles_m - band * _BAND, _BAND)
    within = tile - band * tiles_n * _BAND
    return band * _BAND + within % height, within // height


@triton.jit
def multiply(
    a_ptrs,
    mask_a,
    b_ptrs,
    stride_b_step,
    mask_b,
    depth,
    term_b,
    vector_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_B_TRANSPOSED: tl.constexpr,
    B_TERMS: tl.constexpr,
    WITH_ROW_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """The loop over depth: A B, and, WITH_ROW_SUMS, |a|^2 and a.vector of the rows of A.

    B is the sum of B_TERMS matrices, `term_b` elements apart, and the terms take turns; each reads
    A again, since two tiles of B at once cost more registers than there are.
    IS_B_TRANSPOSED: the tile of B is loaded as [BLOCK_N, BLOCK_K].
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    along = tl.zeros((BLOCK_M,), tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    for step in range(tl.cdiv(depth, BLOCK_K) * B_TERMS):
        block = step // B_TERMS
        begin = block * BLOCK_K
        mask_k = offs_k < depth - begin
        a = tl.load(a_ptrs + begin, mask=mask_a[:, None] & mask_k[None, :], other=0.0)
        b_term = b_ptrs + block * stride_b_step + step % B_TERMS * term_b
        if IS_B_TRANSPOSED:
            b = tl.load(b_term, mask=mask_b[:, None] & mask_k[None, :], other=0.0).T
        else:
            b = tl.load(b_term, mask=mask_k[:, None] & mask_b[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION, IS_INTERPRETED)
        if WITH_ROW_SUMS:
            wide = a.to(tl.float32)
            share = wide * (1 / B_TERMS)  # A passes once for each term
            squares += tl.sum(wide * share, 1)
            vector = tl.load(vector_ptr + begin + offs_k, mask=mask_k, other=0.0)
            along += tl.sum(share * vector[None, :], 1)
    return acc, squares, along


@triton.jit(do_not_specialize=["tiles"])
def statistics_kernel(
    table_ptr,
    tiles,
    A_DTYPE: tl.constexpr,
    B_DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    B_TERMS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Gram route: out = A B, its partial dots with x, and sums of the rows of A.

    U = T W with x.u, |t|^2 and t.b; V = X G with x.v, |x|^2 and x.c (`vector` is b, or c = W^T b).
    Planes of `statistics` [2 + column tiles, N]: |a|^2, a.vector, and x.out of each column tile.
    The first two are summed from the tiles of A as they pass, by the first column tile alone.
    `out` is stored where it is not 0, which is where the student wants a gradient. Rows of
    weight 0 are not read.
    """
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        line = table_ptr + find_line(table_ptr, tile, _STATISTICS, LINES) * _STATISTICS
        n = tl.load(line + 8)
        columns = load_size(line + 9, IS_ALIGNED)
        depth = load_size(line + 10, IS_ALIGNED)
        tile_m, tile_n = tile_place(tile - tl.load(line), n, columns, BLOCK_M, BLOCK_N)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        mask_cols = cols < columns
        mask_kept = load_weights(line + 6, rows, rows < n) != 0
        stride_a = load_size(line + 11, IS_ALIGNED)
        a_ptr = load_pointer(line + 1, A_DTYPE, IS_ALIGNED)
        b_ptr = load_pointer(line + 2, B_DTYPE, IS_ALIGNED)
        a_ptrs = a_ptr + rows[:, None] * stride_a + offs_k[None, :]
        b_ptrs = b_ptr + offs_k[:, None] * columns + cols[None, :]
        vector_ptr = load_pointer(line + 7, tl.float32, False)
        planes = load_pointer(line + 5, tl.float32, False) + rows
        if tile_n == 0:
            acc, squares, along = multiply(
                a_ptrs,
                mask_kept,
                b_ptrs,
                columns * BLOCK_K,
                mask_cols,
                depth,
                depth * columns,
                vector_ptr,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                False,
                B_TERMS,
                True,
                PRECISION,
                IS_INTERPRETED,
            )
            tl.store(planes, squares, mask=mask_kept)
            tl.store(planes + n, along, mask=mask_kept)
        else:
            acc, squares, along = multiply(
                a_ptrs,
                mask_kept,
                b_ptrs,
                columns * BLOCK_K,
                mask_cols,
                depth,
                depth * columns,
                vector_ptr,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                False,
                B_TERMS,
                False,
                PRECISION,
                IS_INTERPRETED,
            )
        mask = mask_kept[:, None] & mask_cols[None, :]
        if tl.load(line + 4) != 0:
            out_ptr = load_pointer(line + 4, tl.float32, IS_ALIGNED)
            tl.store(out_ptr + rows[:, None] * columns + cols[None, :], acc, mask=mask)
        x_ptr = load_pointer(line + 3, X_DTYPE, IS_ALIGNED)
        stride_x = load_size(line + 12, IS_ALIGNED)
        x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0)
        tl.store(planes + (2 + tile_n) * n, tl.sum(x.to(tl.float32) * acc, 1), mask=mask_kept)


@triton.jit(do_not_specialize=["tiles"])
def product_kernel(
    table_ptr,
    tiles,
    A_DTYPE: tl.constexpr,
    B_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    B_TERMS: tl.constexpr,
    KIND: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """A plain product with one of three epilogues, and rows listed or not.

    KIND "project": out[i] = A[rows[i]] B^T + bias, P = X W^T + b.
    KIND "student": out[rows[i]] = A[i] B, dX = dP W.
    KIND "add": out += A B, dW += W (X^T diag(a) X).
    Only the device knows the count of listed rows; a tile past it ends at once. B and out are
    contiguous.
    """
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        line = table_ptr + find_line(table_ptr, tile, _PRODUCT, LINES) * _PRODUCT
        capacity = tl.load(line + 5)
        columns = load_size(line + 6, IS_ALIGNED)
        depth = load_size(line + 7, IS_ALIGNED)
        tile_m, tile_n = tile_place(tile - tl.load(line), capacity, columns, BLOCK_M, BLOCK_N)
        count = capacity
        if KIND != "add":
            count = tl.load(load_pointer(line + 10, tl.int32, False)).to(tl.int64)
        if tile_m * BLOCK_M < count:
            places = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
            cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            offs_k = tl.arange(0, BLOCK_K)
            mask_rows, mask_cols = places < count, cols < columns
            rows = places
            if KIND != "add":
                rows_ptr = load_pointer(line + 9, tl.int32, False)
                rows = tl.load(rows_ptr + places, mask=mask_rows, other=0).to(tl.int64)
            a_rows = rows if KIND == "project" else places
            out_rows = rows if KIND == "student" else places
            a_ptr = load_pointer(line + 1, A_DTYPE, IS_ALIGNED)
            b_ptr = load_pointer(line + 2, B_DTYPE, IS_ALIGNED)
            stride_a = load_size(line + 8, IS_ALIGNED)
            if KIND == "project":
                b_ptrs = b_ptr + cols[:, None] * depth + offs_k[None, :]
                stride_b_step = tl.full((), BLOCK_K, tl.int64)
            else:
                b_ptrs = b_ptr + offs_k[:, None] * columns + cols[None, :]
                stride_b_step = columns * BLOCK_K
            acc, _, _ = multiply(
                a_ptr + a_rows[:, None] * stride_a + offs_k[None, :],
                mask_rows,
                b_ptrs,
                stride_b_step,
                mask_cols,
                depth,
                depth * columns,
                a_ptr,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                KIND == "project",
                B_TERMS,
                False,
                PRECISION,
                IS_INTERPRETED,
            )
            out_ptr = load_pointer(line + 3, OUT_DTYPE, IS_ALIGNED)
            out_ptrs = out_ptr + out_rows[:, None] * columns + cols[None, :]
            mask = mask_rows[:, None] & mask_cols[None, :]
            if KIND == "project":
                bias_ptr = load_pointer(line + 4, tl.float32, False)
                acc += tl.load(bias_ptr + cols, mask=mask_cols, other=0.0)[None, :]
            if KIND == "add":
                acc += tl.load(out_ptrs, mask=mask, other=0.0)
            tl.store(out_ptrs, cast(acc, OUT_DTYPE, IS_INTERPRETED), mask=mask)
