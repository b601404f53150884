"""One launch that scales every gradient of a call in place, by a factor that stays on the device.

Equivalent to

    for tensor in tensors:
        tensor.copy_(tensor.float() * factor)

A factor of exactly 1, the usual one when a loss is the whole loss, costs one empty launch: every
program reads the factor first and ends. Else it moves 2 x itemsize bytes per element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._engines import interpreted
from ._triton import (
    Variant,
    cast,
    find_line,
    load_pointer,
    make_table,
    next_power_of_2,
)

_BLOCK = 4096  # elements that a program takes at a time: 32 for each thread of 4 warps
_PROGRAMS = 4096  # at most, which walk over the blocks: more would take long to find nothing to do
_FIELDS = tl.constexpr(4)  # first, tensor, elements, is_bfloat16


@triton.jit
def _scale_block(
    field_ptr, offsets, mask, factor, DTYPE: tl.constexpr, IS_INTERPRETED: tl.constexpr
):
    ptrs = load_pointer(field_ptr, DTYPE, True) + offsets  # torch allocates on 16 bytes or more
    scaled = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) * factor
    tl.store(ptrs, cast(scaled, DTYPE, IS_INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def scale_kernel(
    table_ptr,
    factor_ptr,
    blocks,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            line = table_ptr + find_line(table_ptr, block, _FIELDS, LINES) * _FIELDS
            offsets = (block - tl.load(line)) * BLOCK + tl.arange(0, BLOCK)  # int64
            mask = offsets < tl.load(line + 2)
            if tl.load(line + 3) != 0:
                _scale_block(line + 1, offsets, mask, factor, tl.bfloat16, IS_INTERPRETED)
            else:
                _scale_block(line + 1, offsets, mask, factor, tl.float32, IS_INTERPRETED)


def scale_variant(lines: int) -> Variant:
    return Variant(
        scale_kernel,
        {"table_ptr": "*i64", "factor_ptr": "*fp32", "blocks": "i32"},
        {"LINES": lines, "BLOCK": _BLOCK, "IS_INTERPRETED": interpreted()},
        num_warps=4,
    )


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply contiguous float32 and bfloat16 tensors of one device by `factor`, [] float32."""
    lines, first = [], 0
    for tensor in tensors:
        lines.append((first, tensor, tensor.numel(), tensor.dtype == torch.bfloat16))
        first += triton.cdiv(tensor.numel(), _BLOCK)
    if first:
        variant = scale_variant(next_power_of_2(len(lines)))
        table = make_table(lines, factor.device)
        variant.launch(min(first, _PROGRAMS), factor.device, table, factor, first)
