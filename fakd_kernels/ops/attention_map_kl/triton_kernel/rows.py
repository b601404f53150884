"""How a program finds its rows: device functions that read the table and load tiles of maps.

A program takes a block of query rows of one batch entry, of one head unless heads are averaged, and
sweeps their keys. Rows of weight 0 are not read; what is read of keys that do not count, be it NaN,
does not get past the mask.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...._triton import cast, find_line, load_pointer, load_size, widen
from ...._triton_logits import known_multiple
from . import fields

EXCLUDED = tl.constexpr(-1e30)  # what a score of -inf counts as: differences must exist


class Rows(NamedTuple):
    """A block of query rows, and the keys that they meet."""

    line: tl.tensor
    batch: tl.tensor
    head: tl.tensor  # of the student; 0 where heads are averaged
    slot: tl.tensor
    places: tl.tensor  # [BLOCK_N]: of rows in their map
    is_row: tl.tensor
    is_kept: tl.tensor  # rows that count
    weights: tl.tensor
    keys_address: tl.tensor  # of the weights of the batch entry's tokens, 0 where there are none
    tokens: tl.tensor
    lowest: tl.tensor  # [BLOCK_N]: of the keys that each meets
    highest: tl.tensor
    first: tl.tensor  # keys [first, last) are all that the block reads
    last: tl.tensor


class Maps(NamedTuple):
    """Rows of one side in memory."""

    ptrs: tl.tensor  # [BLOCK_N, 1], of head 0 or of the head that is compared
    head_stride: tl.tensor


@triton.jit
def load_int(field_ptr):
    return tl.load(field_ptr).to(tl.int32)


@triton.jit
def load_weights(address, places, mask, FORM: tl.constexpr):
    """Weights of tokens, 1 where a pair has none; 0 off the mask."""
    pointer = address.to(tl.pointer_type(tl.float32))
    if FORM.is_aligned:
        pointer = tl.multiple_of(pointer, 16)
    weights = tl.load(pointer + places, mask=mask & (address != 0), other=1.0)
    return tl.where(mask, weights, 0.0)


@triton.jit
def open_rows(
    table_ptr,
    LINES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_MEAN: tl.constexpr,
    FORM: tl.constexpr,
):
    """Of causal maps the last rows come first: they take longest."""
    program = tl.program_id(0)
    line = table_ptr + find_line(table_ptr, program, fields.FIELDS, LINES) * fields.FIELDS
    local = program - load_int(line)
    tokens = known_multiple(load_int(line + fields.TOKENS), FORM.is_aligned)
    blocks = tl.cdiv(tokens, BLOCK_N)
    compared = 1 if IS_MEAN else load_int(line + fields.HEADS)
    block = blocks - 1 - local % blocks
    head = (local // blocks % compared).to(tl.int64)
    batch = (local // (blocks * compared)).to(tl.int64)
    slot = (head * tl.load(line + fields.BATCHES) + batch) * blocks + block
    begin = block * BLOCK_N
    places = begin + tl.arange(0, BLOCK_N)
    is_row = places < tokens
    address = tl.load(line + fields.WEIGHTS)
    address += tl.where(address != 0, batch * tokens * 4, 0)
    weights = load_weights(address, places, is_row, FORM)
    behind, ahead = load_int(line + fields.BEHIND), load_int(line + fields.AHEAD)
    first = max(begin - behind, 0) // 16 * 16
    last = min(begin + BLOCK_N + ahead, tokens)
    if FORM.is_aligned:
        last = tl.cdiv(last, 16) * 16
    return Rows(
        line,
        batch,
        head,
        slot,
        places,
        is_row,
        is_row & (weights != 0),
        weights,
        address,
        tokens,
        places - behind,
        tl.minimum(places + ahead, tokens - 1),
        first,
        # Rows that are all away need no sweep, only a gradient of 0.
        tl.where(tl.max(weights, 0) > 0, last, first),
    )


@triton.jit
def open_maps(rows, FIELD: tl.constexpr, head, DTYPE: tl.constexpr, FORM: tl.constexpr):
    """Rows of a side, in head `head`."""
    field = rows.line + FIELD
    head_stride = load_size(field + 2, FORM.is_aligned)
    pointer = load_pointer(field, DTYPE, FORM.is_aligned)
    pointer += rows.batch * load_size(field + 1, FORM.is_aligned) + head * head_stride
    ptrs = pointer + rows.places[:, None] * load_size(field + 3, FORM.is_aligned)
    return Maps(ptrs, head_stride)


@triton.jit
def allowed_keys(rows, cols, FORM: tl.constexpr):
    """[BLOCK_N, BLOCK_V]: which keys count for which rows; none for rows that do not."""
    is_key = load_weights(rows.keys_address, cols, cols < rows.tokens, FORM) != 0
    allowed = (cols[None, :] >= rows.lowest[:, None]) & (cols[None, :] <= rows.highest[:, None])
    return allowed & is_key[None, :] & rows.is_kept[:, None]


@triton.jit
def load_probabilities(ptrs, rows, cols, FORM: tl.constexpr):
    """A tile of a map in float32, in loads of 16 bytes where rows are aligned: no mask by key."""
    is_read = (cols >= rows.first) & (cols < rows.last)
    x = tl.load(ptrs + cols[None, :], mask=rows.is_kept[:, None] & is_read[None, :], other=0.0)
    return widen(x, FORM.is_interpreted)


@triton.jit
def load_scores(ptrs, rows, cols, allowed, FORM: tl.constexpr):
    """Likewise, -inf where nothing counts."""
    x = load_probabilities(ptrs, rows, cols, FORM)
    x = tl.where(x < EXCLUDED, EXCLUDED, x)
    return tl.where(allowed, x, -float("inf"))


@triton.jit
def store_gradient(ptrs, rows, cols, grad, allowed, FORM: tl.constexpr):
    """The gradient of a tile, 0 where nothing counts."""
    grad = tl.where(allowed, grad, 0.0)
    mask = rows.is_row[:, None] & (cols < rows.tokens)[None, :]
    tl.store(
        ptrs + cols[None, :], cast(grad, ptrs.dtype.element_ty, FORM.is_interpreted), mask=mask
    )


@triton.jit
def store_value(rows, value):
    """The weighted sum of a block of rows into its slot, in float64."""
    value = tl.where(rows.is_kept, value * rows.weights, 0.0).to(tl.float64)
    ptr = load_pointer(rows.line + fields.SLOTS, tl.float64, False)
    tl.store(ptr + rows.slot, tl.sum(value, 0))


@triton.jit
def load_gain(rows, coefficients_ptr):
    """What the gradients of rows are multiplied by."""
    return rows.weights * tl.load(coefficients_ptr + tl.load(rows.line + fields.PAIR))
