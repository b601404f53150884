"""Kernels with everything that is compiled into them, from what a group of pairs has in common.

A launch and a dry compile (tests/kernels/test_triton_aot.py) get their variants here, so what is
tested without a card is what runs on one.
"""

import torch
import triton.language as tl

from ...._engines import interpreted
from ...._pairs import grad_dtype
from ...._triton import TL_DTYPES, Variant
from . import tiles
from .arithmetic import Arithmetic
from .outer_kernel import outer_kernel
from .product_kernels import product_kernel, statistics_kernel
from .row_kernels import align_rows_kernel, gram_rows_kernel
from .small_kernels import column_sums_kernel, compact_kernel, reduce_kernel

_ROWS_SIGNATURE = {
    "partial_ptr": "*fp64",
    "table_ptr": "*i64",
    "coefficients_ptr": "*fp32",
    "eps": "fp32",
}


def grad_type(student: torch.dtype) -> tl.dtype:
    """Triton's dtype of the gradient of a student."""
    return TL_DTYPES[grad_dtype(torch.empty(0, dtype=student))]


def align_variant(
    p: torch.dtype,
    t: torch.dtype,
    grad: tl.dtype,
    block: tuple[int, int],
    is_wide: bool,
    has_rows: bool,
    is_squared: bool,
    lines: int,
    is_aligned: bool,
) -> Variant:
    constants = {
        "X_DTYPE": TL_DTYPES[p],
        "T_DTYPE": TL_DTYPES[t],
        "GRAD_DTYPE": grad,
        "LINES": lines,
        "BLOCK_N": block[0],
        "BLOCK_D": block[1],
        "IS_WIDE": is_wide,
        "HAS_ROWS": has_rows,
        "IS_SQUARED": is_squared,
        "IS_ALIGNED": is_aligned,
        "IS_INTERPRETED": interpreted(),
    }
    num_warps = max(1, block[0] * block[1] // 512)
    return Variant(align_rows_kernel, _ROWS_SIGNATURE, constants, num_warps)


def gram_rows_variant(
    x: torch.dtype,
    cancelled: float,
    checks_gradient: bool,
    is_squared: bool,
    lines: int,
    is_aligned: bool,
) -> Variant:
    constants = {
        "CANCELLED": cancelled,
        "CHECKS_GRADIENT": checks_gradient,
        "GRAD_DTYPE": grad_type(x),
        "LINES": lines,
        "BLOCK_N": tiles.LONG_TILE[0],
        "BLOCK_D": tiles.LONG_TILE[1],
        "IS_SQUARED": is_squared,
        "IS_ALIGNED": is_aligned,
        "IS_INTERPRETED": interpreted(),
    }
    return Variant(gram_rows_kernel, _ROWS_SIGNATURE, constants, 4)


def compact_variant() -> Variant:
    return Variant(compact_kernel, {"table_ptr": "*i64"}, {"BLOCK": 1024}, 4)


def column_sums_variant(dtype: torch.dtype, lines: int) -> Variant:
    constants = {
        "DTYPE": TL_DTYPES[dtype],
        "LINES": lines,
        "BLOCK_N": 128,
        "BLOCK_D": tiles.COLUMN_BLOCK,
    }
    return Variant(column_sums_kernel, {"table_ptr": "*i64", "segments_ptr": "*i64"}, constants, 4)


def reduce_variant() -> Variant:
    signature = {"sums_ptr": "*fp32", "partial_ptr": "*fp64", "table_ptr": "*i64"}
    return Variant(reduce_kernel, signature, {"BLOCK": 1024}, 4)


def _product_variant(
    kernel, signature, constants, tile, capability, precision, lines, is_aligned
) -> Variant:
    num_stages = tile.num_stages
    is_indirect = constants.get("HAS_SCALE") or constants.get("HAS_ROWS")
    if is_indirect and capability // 10 in (9, 10):
        # The depth of a load that waits for another (a scale, a row number) counts twice. Where
        # operands pass through registers (mma.sync), one buffer less does no harm, and fits them.
        num_stages = 2 * num_stages - 1
    constants = {
        key: TL_DTYPES[value] if isinstance(value, torch.dtype) else value
        for key, value in constants.items()
    }
    constants |= {
        "LINES": lines,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.depth_bytes // (2 if precision == "native" else 4),
        "PRECISION": precision,
        "IS_ALIGNED": is_aligned,
        "IS_INTERPRETED": interpreted(),
    }
    # One program fills a multiprocessor: its registers leave no room for a second.
    return Variant(kernel, signature, constants, tile.num_warps, num_stages, per_processor=1)


_ONE_TABLE = {"table_ptr": "*i64", "tiles": "i32"}
_TWO_TABLES = {"table_ptr": "*i64", "segments_ptr": "*i64", "tiles": "i32"}


def outer_variant(kind: str, dtypes: Arithmetic, capability, lines, is_aligned) -> Variant:
    """kind: "gram" (G) | "inner" (X^T diag(a) X) | "scaled" (T^T diag(b) X) | "direct" (dP^T X)."""
    left, right, precision = {
        "gram": (dtypes.w, dtypes.w, dtypes.raw),
        "inner": (dtypes.x, dtypes.x, dtypes.mixed),
        "scaled": (dtypes.t, dtypes.x, dtypes.mixed),
        "direct": (dtypes.middle, dtypes.x, dtypes.mixed),
    }[kind]
    constants = {
        "LEFT_DTYPE": left,
        "RIGHT_DTYPE": right,
        "OUT_TERMS": dtypes.terms if kind in ("gram", "inner") else 1,
        "HAS_SCALE": kind in ("inner", "scaled"),
        "HAS_ROWS": kind == "direct",
    }
    tile = tiles.choose_tile(capability, precision)
    return _product_variant(
        outer_kernel, _TWO_TABLES, constants, tile, capability, precision, lines, is_aligned
    )


def statistics_variant(
    is_teacher: bool, dtypes: Arithmetic, capability, lines, is_aligned
) -> Variant:
    constants = {
        "A_DTYPE": dtypes.t if is_teacher else dtypes.x,
        "B_DTYPE": dtypes.w if is_teacher else dtypes.gram_dtype,
        "X_DTYPE": dtypes.x,
        "B_TERMS": 1 if is_teacher else dtypes.terms,
    }
    precision = dtypes.raw if is_teacher else dtypes.gram
    tile = tiles.choose_tile(
        capability, dtypes.gram, has_sums=True
    )  # for both, so they have equal tiles
    return _product_variant(
        statistics_kernel, _ONE_TABLE, constants, tile, capability, precision, lines, is_aligned
    )


def product_variant(
    kind: str, dtypes: Arithmetic, capability: int, lines: int, is_aligned: bool
) -> Variant:
    """kind: see `product_kernel`."""
    a, b, out, precision = {
        "project": (dtypes.x, dtypes.w, torch.float32, dtypes.raw),
        "student": (dtypes.middle, dtypes.w, grad_type(dtypes.x), dtypes.mixed),
        "add": (dtypes.w, dtypes.gram_dtype, torch.float32, dtypes.gram),
    }[kind]
    constants = {
        "A_DTYPE": a,
        "B_DTYPE": b,
        "OUT_DTYPE": out,
        "B_TERMS": dtypes.terms if kind == "add" else 1,
        "KIND": kind,
    }
    tile = tiles.choose_tile(capability, precision)
    return _product_variant(
        product_kernel, _ONE_TABLE, constants, tile, capability, precision, lines, is_aligned
    )
