"""The direct route, for its own pairs and for the rows of gram pairs whose sums cancel.

Rows go through a block of P in chunks of pieces; the buffers of the largest chunk are used by one
chunk after the other.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .... import _triton
from . import tiles, variants
from .group import Group
from .steps import Member

CHUNK_BYTES = 32 << 20  # of P and dP: they stay in the L2 of an A100 (40 MiB) or H100 (50 MiB)
_CHUNK_STEP = 128  # rows of a piece are a multiple of this, whole tiles


class _Piece(NamedTuple):
    """A range of rows of one pair inside a chunk; rows where `keep` is 0 are left out."""

    member: Member
    begin: int
    capacity: int
    slot: int
    keep: Tensor | None  # [N] float32


def add_steps(group: Group, kept: list[tuple[Member, Tensor | None]]) -> None:
    """Values and gradients of the rows of each member where its tensor, [N], is not 0."""
    chunks: list[list[_Piece]] = []
    room = 0
    for piece in (piece for member, keep in kept for piece in _pieces(group, member, keep)):
        cost = _piece_bytes(piece)
        if not chunks or cost > room:
            chunks.append([])
            room = CHUNK_BYTES
        chunks[-1].append(piece)
        room -= cost
    if not chunks:
        return
    buffers = _ChunkBuffers(group, chunks)
    for number, chunk in enumerate(chunks):
        _add_chunk(group, f"chunk {number + 1} of {len(chunks)}", chunk, buffers)


def count_slots(rows: int, teacher_width: int) -> int:
    """Slots for the values of a pair's pieces."""
    step, block = _piece_rows(teacher_width), tiles.align_block(teacher_width)[0]
    return sum(tiles.count_blocks(min(step, rows - begin), block) for begin in range(0, rows, step))


def _piece_rows(teacher_width: int) -> int:
    """Rows of a whole piece: P in float32 and dP in half the size fill a chunk."""
    return max(1, CHUNK_BYTES // (6 * max(1, teacher_width) * _CHUNK_STEP)) * _CHUNK_STEP


def _piece_bytes(piece: _Piece) -> int:
    return 6 * piece.member.pair.teacher.shape[1] * piece.capacity


def _pieces(group: Group, member: Member, keep: Tensor | None) -> Iterator[_Piece]:
    n, width = member.pair.teacher.shape
    slot = group.steps.slots[member.index]
    if member.pair.route == "gram":
        slot += tiles.gram_blocks(n)
    step, block = _piece_rows(width), tiles.align_block(width)[0]
    for begin in range(0, max(n, 1), step):  # one at least, so that dW is written
        capacity = min(step, n - begin)
        yield _Piece(member, begin, capacity, slot, keep)
        slot += tiles.count_blocks(capacity, block)


class _ChunkBuffers:
    """P, dP, row lists and counts of the largest chunk."""

    def __init__(self, group: Group, chunks: list[list[_Piece]]) -> None:
        self.is_in_place = group.dtypes.middle == torch.float32
        sizes = [[sum(column) for column in zip(*map(self.sizes, c), strict=True)] for c in chunks]
        p, grad_p, listed, count = (max(column) for column in zip(*sizes, strict=True))
        empty = group.steps.empty
        self.buffers = (
            empty(p),
            empty(grad_p, dtype=group.dtypes.middle),
            empty(listed, dtype=torch.int32),
            empty(count, dtype=torch.int32),
        )

    def sizes(self, piece: _Piece) -> tuple[int, ...]:
        """Elements of P, of dP where it does not replace P, and of the row list; one count."""
        p = piece.capacity * piece.member.pair.teacher.shape[1]
        return p, 0 if self.is_in_place else p, piece.capacity, 1

    def of(self, chunk: list[_Piece]) -> Iterator[tuple[_Piece, list[Tensor]]]:
        """Each piece with its views of P, dP, row list and count."""
        offsets = [0] * len(self.buffers)
        for piece in chunk:
            views = []
            for place, size in enumerate(self.sizes(piece)):
                views.append(self.buffers[place].narrow(0, offsets[place], size))
                offsets[place] += size
            if self.is_in_place:
                views[1] = views[0]
            yield piece, views


def _add_chunk(group: Group, words: str, chunk: list[_Piece], buffers: _ChunkBuffers) -> None:
    problem, shared = group.problem, group.shared
    compact, project, student = [], [], []
    aligned: dict[tuple[int, int, bool], list] = {}
    projections: dict[int, list] = {}
    biases: dict[int, list] = {}
    for piece, (p, grad_p, listed, count) in buffers.of(chunk):
        pair, capacity = piece.member.pair, piece.capacity
        (height, width), x, t = pair.projection.shape, pair.student, pair.teacher
        w, bias, grad_x = pair.projection, shared.bias(pair), pair.grad_student
        compact.append((len(compact), piece.keep, piece.begin, capacity, listed, count))
        fields = (x, w, p, bias, capacity, height, width, x.stride(0), listed, count)
        project.append((capacity, height, fields))
        wants = grad_x is not None
        if wants:
            fields = (grad_p, w, grad_x, None, capacity, width, height, height, listed, count)
            student.append((capacity, width, fields))
        if problem.wants_projection(pair):
            segment = (grad_p, x, capacity, height, x.stride(0), None, listed, count)
            projections.setdefault(pair.projection_index, []).append(segment)
            wants = True
        if problem.wants_bias(pair):
            segment = (grad_p, height, capacity, None, count)
            biases.setdefault(pair.bias_index, []).append(segment)
            wants = True
        fields = (piece.member.index, p, t, pair.row_weights, grad_p if wants else None)
        fields += (capacity, height, height, t.stride(0), piece.slot, listed, count)
        block = tiles.align_block(height)
        aligned.setdefault((*block, height > block[1]), []).append((capacity, fields))

    variant = variants.compact_variant()
    group.steps.launch(f"{words}, list rows", variant, len(chunk), compact)
    make = variants.product_variant
    group.launch_product(f"{words}, P = X W^T", make, "project", project)
    for (block_rows, block_columns, is_wide), lines in aligned.items():
        block = block_rows, block_columns
        _launch_align(group, f"{words}, values and dP", block, is_wide, lines)
    group.launch_product(f"{words}, dX = dP W", make, "student", student)
    jobs = [
        (shared.totals["projection", index], shared.claim("projection", index), segments)
        for index, segments in projections.items()
    ]
    group.launch_outer(f"{words}, dW += dP^T X", "direct", jobs)
    jobs = [
        (shared.totals["bias", index], shared.claim("bias", index), segments)
        for index, segments in biases.items()
    ]
    group.launch_column_sums(f"{words}, db += sum of dP", group.dtypes.middle, jobs)


def _launch_align(
    group: Group, words: str, block: tuple[int, int], is_wide: bool, lines: list
) -> None:
    """`lines`: (rows, fields after the first)."""
    table, first = [], 0
    for capacity, fields in lines:
        table.append((first, *fields))
        first += tiles.count_blocks(capacity, block[0])
    variant = variants.align_variant(
        torch.float32,
        group.dtypes.t,
        _triton.TL_DTYPES[group.dtypes.middle],
        block,
        is_wide,
        True,
        group.problem.is_squared,
        _triton.next_power_of_2(len(lines)),
        group.is_aligned,
    )
    group.steps.launch_rows(words, variant, first, table)
