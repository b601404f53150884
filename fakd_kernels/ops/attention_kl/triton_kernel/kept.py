"""What kernels leave for each other: values in slots, numbers of rows, maps of averaged heads."""

import triton
import triton.language as tl

from ...._triton import load_pointer
from . import fields
from .rows import load_int


@triton.jit
def load_map(line, batch, start, rows, mask, OF_QUERIES: tl.constexpr):
    """The tile of what heads="mean" left for the gradient, 0 where rows do not meet."""
    own = rows.begin + tl.arange(0, mask.shape[0])[:, None]
    other = start + tl.arange(0, mask.shape[1])[None, :]
    if OF_QUERIES:
        first, limit, query, key = load_int(line + fields.BEGIN), rows.end, own, other
    else:
        first, limit, query, key = load_int(line + fields.LOWER), rows.upper, other, own
    ptr = load_pointer(line + fields.MAP, tl.float32, False)
    query = batch * (limit - first) + query - first
    return tl.load(ptr + query * tl.load(line + fields.TOKENS) + key, mask=mask, other=0.0)


@triton.jit
def store_values(line, slot, values, rows):
    """The weighted sum of a block of rows into its slot, in float64."""
    values = tl.where(rows.weights != 0, values * rows.weights, 0.0).to(tl.float64)
    tl.store(load_pointer(line + fields.SLOTS, tl.float64, False) + slot, tl.sum(values, 0))


@triton.jit
def head_ptr(line, field_ptr, heads, batch, head):
    """To what is kept of the rows of one head, [.., B, H, T], and the stride of the first axis."""
    tokens = tl.load(line + fields.TOKENS)
    pointer = load_pointer(field_ptr, tl.float32, False)
    return pointer + (batch * heads + head) * tokens, tl.load(
        line + fields.BATCHES
    ) * heads * tokens


@triton.jit
def store_numbers(ptr, numbers, other, rows):
    """A number of each row, `other` of those that do not count."""
    own = rows.begin + tl.arange(0, rows.weights.shape[0])
    tl.store(ptr + own, tl.where(rows.weights != 0, numbers, other), mask=own < rows.end)


@triton.jit
def store_sums(line, field_ptr, heads, batch, head, top, share, rows):
    """The maximum of each row, and one over the sum of its exponentials below it.

    They are kept apart: rounded to one number, the logarithm of the whole sum would cost
    probabilities as many digits as scores have before the point.
    """
    ptr, stride = head_ptr(line, field_ptr, heads, batch, head)
    store_numbers(ptr, top, 0.0, rows)
    store_numbers(ptr + stride, share, 1.0, rows)


@triton.jit
def load_sums(ptr, stride, rows, end):
    top = tl.load(ptr + rows, mask=rows < end, other=0.0)
    return top, tl.load(ptr + stride + rows, mask=rows < end, other=1.0)
