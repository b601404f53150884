"""Values that programs leave in slots become sums: one launch for all pairs of a call."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import Variant, find_line, load_pointer, make_table, next_power_of_2

_FIELDS = tl.constexpr(4)  # first, sums, slots, count: see `reduce_slots`


@triton.jit
def reduce_kernel(table_ptr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """One program per pair and head: its slots, in float64 and in a fixed order."""
    program = tl.program_id(0)
    line = table_ptr + find_line(table_ptr, program, _FIELDS, LINES) * _FIELDS
    head, count = program - tl.load(line), tl.load(line + 3)
    places = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    ptrs = load_pointer(line + 2, tl.float64, False) + head * count + places
    for begin in range(0, count, BLOCK):
        total += tl.load(ptrs + begin, mask=places < count - begin, other=0.0)
    sums_ptr = load_pointer(line + 1, tl.float32, False)
    tl.store(sums_ptr + head, tl.sum(total, 0).to(tl.float32))


def reduce_variant(lines: int) -> Variant:
    constants = {"LINES": next_power_of_2(lines), "BLOCK": 1024}
    return Variant(reduce_kernel, {"table_ptr": "*i64"}, constants, 4)


def reduce_slots(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> None:
    """Fill the sums [H] of pairs from their slots [H * .., float64], those of a head together."""
    lines, first = [], 0
    for sums, slots in pairs:
        lines.append((first, sums, slots, slots.numel() // max(1, len(sums))))
        first += len(sums)
    reduce_variant(len(lines)).launch(first, device, make_table(lines, device))
