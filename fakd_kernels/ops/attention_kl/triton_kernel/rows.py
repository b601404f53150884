"""How a program finds its rows: device functions that read the table and load tiles.

A program keeps a block of own rows and sweeps blocks of the other rows that they meet, see
`fields`. What is read of rows that do not count, be it NaN, does not get past the mask; where rows
are multiplied by a gradient of 0, they are not read.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...._triton import dot, find_line, load_pointer, load_size, tanh
from . import fields


class SideForm(NamedTuple):
    """What is compiled into a kernel of one side."""

    dtype: tl.dtype
    pieces: tuple[tuple[int, int], ...]  # first column and width of each, powers of two
    step: int  # columns of rows that are multiplied at a time, or 0: rows are kept in pieces
    is_whole: bool  # neither pieces nor steps need padding
    is_aligned: bool
    is_capped: bool
    precision: str  # of scores
    is_interpreted: bool


class Side(NamedTuple):
    """Own rows of one head, and how to reach the others."""

    own: tuple  # pieces [BLOCK_OWN, ..], none where rows go in steps
    own_ptrs: tl.tensor  # [BLOCK_OWN, 1]
    other_ptrs: tl.tensor  # [BLOCK_OTHER, 1], of the first rows
    stride: tl.tensor  # between other rows
    width: tl.tensor
    inner: tl.tensor
    outer: tl.tensor


class Rows(NamedTuple):
    """Own rows [begin, end) at most, and the other rows [first, last) that they meet."""

    begin: tl.tensor
    end: tl.tensor
    weights: tl.tensor  # [BLOCK_OWN]
    weights_address: tl.tensor
    first: tl.tensor
    last: tl.tensor
    upper: tl.tensor
    lowest: tl.tensor  # [BLOCK_OWN]: of the other rows that each meets
    highest: tl.tensor


@triton.jit
def load_int(field_ptr):
    return tl.load(field_ptr).to(tl.int32)


@triton.jit
def load_float(field_ptr):
    """A float32 whose bits are stored as an integer."""
    return tl.load(field_ptr).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def find_pair(table_ptr, LINES: tl.constexpr):
    """The line of a program's pair, and which of that pair's programs it is."""
    program = tl.program_id(0)
    line = table_ptr + find_line(table_ptr, program, fields.FIELDS, LINES) * fields.FIELDS
    return line, program - load_int(line)


@triton.jit
def place_program(
    table_ptr, LINES: tl.constexpr, BLOCK_OWN: tl.constexpr, OF_QUERIES: tl.constexpr
):
    """Of a program: its line, its block, the block's first row, its query head, its batch.

    Programs of one head are neighbours, so that they find its other rows in L2. Those that take
    longest if causal come first: the last queries, the first keys.
    """
    line, local = find_pair(table_ptr, LINES)
    begin = load_int(line + fields.BEGIN)
    blocks = tl.cdiv(load_int(line + fields.END) - begin, BLOCK_OWN)
    heads = load_int(line + fields.STUDENT + fields.HEADS)
    block = local % blocks
    if OF_QUERIES:
        block = blocks - 1 - block
    head = local // blocks % heads
    batch = local // (blocks * heads)
    return line, block, begin + block * BLOCK_OWN, head, batch.to(tl.int64)


@triton.jit
def meeting_rows(begin, end, lower, upper, before, after):
    """The first, and one past the last, of the other rows that own rows [begin, end) meet."""
    return max(begin - before, lower), min(end + after, upper)


@triton.jit
def row_weights(address, rows, limit, HAS_WEIGHTS: tl.constexpr):
    """Weights of rows, 1 where a pair has none; 0 from `limit` on."""
    is_row = rows < limit
    if HAS_WEIGHTS:
        weights = tl.load(address.to(tl.pointer_type(tl.float32)) + rows, mask=is_row, other=0.0)
    else:
        weights = is_row.to(tl.float32)
    return weights


@triton.jit
def open_rows(line, begin, batch, BLOCK_OWN: tl.constexpr, HAS_WEIGHTS: tl.constexpr):
    end, upper = load_int(line + fields.END), load_int(line + fields.UPPER)
    before, after = load_int(line + fields.BEFORE), load_int(line + fields.AFTER)
    first, last = meeting_rows(
        begin, begin + BLOCK_OWN, load_int(line + fields.LOWER), upper, before, after
    )
    address = tl.load(line + fields.WEIGHTS) + batch * tl.load(line + fields.TOKENS) * 4
    own = begin + tl.arange(0, BLOCK_OWN)
    weights = row_weights(address, own, end, HAS_WEIGHTS)
    highest = tl.where(weights != 0, tl.minimum(own + after, upper - 1), -1)
    return Rows(begin, end, weights, address, first, last, upper, own - before, highest)


@triton.jit
def is_own(rows):
    return rows.begin + tl.arange(0, rows.weights.shape[0]) < rows.end


@triton.jit
def other_weights(start, rows, BLOCK_OTHER: tl.constexpr, HAS_WEIGHTS: tl.constexpr):
    places = start + tl.arange(0, BLOCK_OTHER)
    return row_weights(rows.weights_address, places, rows.upper, HAS_WEIGHTS)


@triton.jit
def meets(start, weights, rows, HAS_WEIGHTS: tl.constexpr):
    """The mask of a tile: which own rows meet which of the other rows from `start`.

    To be called where the mask is used: held across a product, it takes a register an element.
    Tiles that need none are masked like others, since a branch round it would keep the compiler
    from handing a tile of gradients to the next product in registers.
    """
    places = tl.arange(0, weights.shape[0])[None, :]
    mask = (places >= (rows.lowest - start)[:, None]) & (places <= (rows.highest - start)[:, None])
    if HAS_WEIGHTS:
        mask = mask & (weights != 0)[None, :]
    return mask


@triton.jit
def row_ptrs(tensor, batch, head, begin, BLOCK: tl.constexpr, FORM: tl.constexpr):
    """Pointers to rows from `begin` of one head, [BLOCK, 1], and the stride between rows."""
    pointer = load_pointer(tensor, FORM.dtype, FORM.is_aligned)
    pointer += batch * load_size(tensor + 1, FORM.is_aligned)
    pointer += head * load_size(tensor + 2, FORM.is_aligned)
    stride = load_size(tensor + 3, FORM.is_aligned)
    return pointer + begin * stride + tl.arange(0, BLOCK)[:, None] * stride, stride


@triton.jit
def piece_columns(mask, column, width, INDEX: tl.constexpr, FORM: tl.constexpr):
    """Columns of a piece, from `column` on, and `mask` of rows with the columns that exist."""
    WIDTH: tl.constexpr = FORM.pieces[INDEX][1]
    cols = column + FORM.pieces[INDEX][0] + tl.arange(0, WIDTH)[None, :]
    if INDEX == len(FORM.pieces) - 1 and not FORM.is_whole:
        mask = mask & (cols < width)
    return cols, mask


@triton.jit
def load_piece(ptrs, is_read, column, width, INDEX: tl.constexpr, FORM: tl.constexpr):
    """One piece of rows, 0 where a row is not read and past the width of the head."""
    cols, mask = piece_columns(is_read[:, None], column, width, INDEX, FORM)
    return tl.load(ptrs + cols, mask=mask, other=0.0)


@triton.jit
def load_rows(ptrs, is_read, width, FORM: tl.constexpr):
    """The pieces of rows that are kept whole."""
    tiles = ()
    if FORM.step == 0:
        for i in tl.static_range(len(FORM.pieces)):
            tiles += (load_piece(ptrs, is_read, 0, width, i, FORM),)
    return tiles


@triton.jit
def open_side(
    side,
    rows,
    batch,
    head,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    FORM: tl.constexpr,
):
    """One side of query head `head`, with its own rows loaded."""
    width = load_int(side + fields.WIDTH)
    own_head = head // load_int(side + fields.OWN_GROUP)
    own_ptrs, _stride = row_ptrs(side + fields.OWN, batch, own_head, rows.begin, BLOCK_OWN, FORM)
    own = load_rows(own_ptrs, is_own(rows), width, FORM)
    other_head = head // load_int(side + fields.OTHER_GROUP)
    other_ptrs, stride = row_ptrs(side + fields.OTHER, batch, other_head, 0, BLOCK_OTHER, FORM)
    inner, outer = load_float(side + fields.INNER), load_float(side + fields.OUTER)
    return Side(own, own_ptrs, other_ptrs, stride, width, inner, outer)


@triton.jit
def score_tiles(side, others, other_ptrs, is_other, rows, FORM: tl.constexpr):
    """Scores of own rows and others, and the tanh in them (with a softcap only).

    In steps, a loop over the width reads both again: whole rows of float32, which tf32x3 splits in
    two, would not leave room in registers.
    """
    s = tl.zeros((side.own_ptrs.shape[0], other_ptrs.shape[0]), tl.float32)
    if FORM.step == 0:
        for i in tl.static_range(len(FORM.pieces)):
            s = dot(side.own[i], others[i].T, s, tl.constexpr(FORM.precision), FORM.is_interpreted)
    else:
        is_read = is_own(rows)
        for begin in range(0, side.width, FORM.step):
            cols = begin + tl.arange(0, FORM.step)[None, :]
            is_column = cols < (begin + FORM.step if FORM.is_whole else side.width)
            own = tl.load(side.own_ptrs + cols, mask=is_read[:, None] & is_column, other=0.0)
            other = tl.load(other_ptrs + cols, mask=is_other[:, None] & is_column, other=0.0)
            s = dot(own, other.T, s, tl.constexpr(FORM.precision), FORM.is_interpreted)
    s *= side.inner
    bent = s
    if FORM.is_capped:
        bent = tanh(s)
        s = bent * side.outer
    return s, bent


@triton.jit
def score(side, start, rows, FORM: tl.constexpr):
    """Scores with the other rows from `start`, where those are not needed afterwards."""
    is_other = start + tl.arange(0, side.other_ptrs.shape[0]) < rows.upper
    other_ptrs = side.other_ptrs + start * side.stride
    others = load_rows(other_ptrs, is_other, side.width, FORM)
    s, _bent = score_tiles(side, others, other_ptrs, is_other, rows, FORM)
    return s
