"""The kernel that adds up gradients of query heads, in a fixed order: equal bits every run."""

import triton
import triton.language as tl

from ...._triton import cast, find_line, load_pointer

# Fields of a table's line, in order.
GROUP_FIELDS = ("first", "parts", "out", "size", "group", "is_added")

_GROUP = tl.constexpr(len(GROUP_FIELDS))


@triton.jit
def group_kernel(
    table_ptr,
    PART_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """dK of a key head (+)= sum of the parts of its query heads: [.., group, size] to [.., size].

    Bytes: every part once, the result once. Of size blocks, the last may be cut.
    """
    program = tl.program_id(0)
    line = table_ptr + find_line(table_ptr, program, _GROUP, LINES) * _GROUP
    size, group = tl.load(line + 3), tl.load(line + 4)
    blocks = tl.cdiv(size, BLOCK)
    local = program - tl.load(line)
    head = local // blocks
    places = (local % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    part_ptrs = load_pointer(line + 1, PART_DTYPE, False) + head * group * size + places
    out_ptrs = load_pointer(line + 2, OUT_DTYPE, False) + head * size + places
    total = tl.zeros((BLOCK,), tl.float32)
    if tl.load(line + 5) != 0:
        total += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    for member in range(group):
        total += tl.load(part_ptrs + member * size, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, cast(total, OUT_DTYPE, IS_INTERPRETED), mask=mask)
