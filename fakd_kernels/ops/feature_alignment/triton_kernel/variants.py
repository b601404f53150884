"""Kernels with everything that is compiled into them.

A launch and a dry compile (tests/kernels/test_triton_aot.py) get their variants here, so what is
tested without a card is what runs on one.
"""

import torch

from ...._engines import interpreted
from ...._triton import TL_DTYPES, Variant, next_power_of_2
from .row_kernels import align_rows_kernel, reduce_kernel


def align_block(width: int) -> tuple[int, int]:
    """Rows and columns of a tile: 2048 elements, or a whole row of up to 4096."""
    widest = 2048 if interpreted() else 4096  # narrow enough that tests meet a wider row
    columns = max(16, next_power_of_2(width))
    if columns > widest:
        columns = widest // 2
    return max(1, min(4, 2048 // columns)), columns  # more rows, more float64 scalars a thread


def align_variant(
    p: torch.dtype,
    t: torch.dtype,
    grad: torch.dtype,
    width: int,
    is_squared: bool,
    lines: int,
    is_aligned: bool,
) -> Variant:
    rows, columns = align_block(width)
    signature = {
        "partial_ptr": "*fp64",
        "table_ptr": "*i64",
        "coefficients_ptr": "*fp32",
        "eps": "fp32",
    }
    constants = {
        "X_DTYPE": TL_DTYPES[p],
        "T_DTYPE": TL_DTYPES[t],
        "GRAD_DTYPE": TL_DTYPES[grad],
        "LINES": next_power_of_2(lines),
        "BLOCK_N": rows,
        "BLOCK_D": columns,
        "IS_WIDE": width > columns,
        "IS_SQUARED": is_squared,
        "IS_ALIGNED": is_aligned,
        "IS_INTERPRETED": interpreted(),
    }
    return Variant(align_rows_kernel, signature, constants, max(1, rows * columns // 512))


def reduce_variant() -> Variant:
    signature = {"sums_ptr": "*fp32", "partial_ptr": "*fp64", "table_ptr": "*i64"}
    return Variant(reduce_kernel, signature, {"BLOCK": 1024}, 4)
