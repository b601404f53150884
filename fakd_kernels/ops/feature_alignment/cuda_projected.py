"""Pairs with a projection on the CUDA engine: products by torch, a row kernel between them.

The direct route, by chunks of rows of many pairs, in buffers that one chunk uses after the other:

    P = X W^T + b  ->  one row kernel: values, dP  ->  dX = dP W, dW += dP^T X

The row kernel, align_projected_rows, is launched once for each dtype of dP among the pairs; db is
the sum over the rows of dP. Every sum has an order of its own: equal bits in every run.

Products have float32 sums, and their operands stay in half precision on a GPU: X and W of one
dtype, and dP, which is rounded to bfloat16 where X and W are bfloat16, as eager autograd rounds it.
float16 has too small a range for dP; its products, and those of unequal dtypes, are in float32, as
torch multiplies it ("tf32" where torch allows it).

Rows of weight 0 are 0 in a copy of X, so that a NaN there does not reach dW; their dP is 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _products as products
from .problem import Pair, Problem

# Of P, dP and copies of X: those of a chunk stay in the L2 of an A100 (40 MiB) or H100 (50 MiB).
CHUNK_BYTES = 32 << 20
_ROWS = 128  # of a tile of a matrix product: rows of a piece are a multiple of it
_ALIGNMENT = 8  # elements: every piece of a buffer begins on 16 bytes


class _Piece(NamedTuple):
    """A range of rows of one pair inside a chunk."""

    index: int  # of the pair
    pair: Pair
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.pair.teacher.shape[1]

    @property
    def size(self) -> int:
        """Elements of P, in a buffer."""
        count = self.shape[0] * self.shape[1]
        return -(-count // _ALIGNMENT) * _ALIGNMENT


def fill(problem: Problem, indices: list[int]) -> None:
    """Fill the sums and every wanted gradient of these pairs, each of which has a projection."""
    pairs = [problem.pairs[index] for index in indices]
    counts = [len(pair.student) for pair in pairs]
    rows = problem.sums.new_empty((sum(counts), 2), dtype=torch.float32)
    values = dict(zip(indices, rows.split(counts), strict=True))
    chunks = list(_chunks(problem, indices))
    buffers = _Buffers(problem, chunks)
    totals = _Totals(problem, pairs)
    for chunk in chunks:
        _fill_chunk(problem, chunk, buffers, totals, values)
    totals.finish()
    sums = [problem.sums[index] for index in indices]
    torch.ops.fakd_ext.sum_values([values[index] for index in indices], sums)


def describe(problem: Problem, indices: list[int]) -> list[str]:
    """What `fill` would do, in words and in order; nothing is computed."""
    pairs = [problem.pairs[index] for index in indices]
    count = sum(1 for _ in _chunks(problem, indices))
    steps = ["P = X W^T by torch, 1 launch of align_projected_rows: values and dP"]
    steps += ["dX = dP W"] * any(pair.grad_student is not None for pair in pairs)
    steps += ["dW += dP^T X"] * any(problem.wants_projection(pair) for pair in pairs)
    steps += ["db += sum of dP"] * any(problem.wants_bias(pair) for pair in pairs)
    return [
        f"rows of {len(pairs)} pairs in chunks, {count} in all: {', '.join(steps)}",
        "sum_row_values: the values of all rows of a pair",
    ]


def _wants_any(problem: Problem, pair: Pair) -> bool:
    wants_weights = problem.wants_projection(pair) or problem.wants_bias(pair)
    return pair.grad_student is not None or wants_weights


def _is_narrow(pair: Pair) -> bool:
    """Whether dP is bfloat16, apart from P."""
    return {pair.student.dtype, pair.projection.dtype} == {torch.bfloat16}


def _row_bytes(problem: Problem, pair: Pair) -> int:
    """Of P, dP and copies of X, for one row."""
    width = pair.student.shape[1]
    is_apart = _is_narrow(pair) and _wants_any(problem, pair)
    copied = 0 if pair.row_weights is None else pair.student.itemsize * width
    if pair.student.dtype != torch.float32 and not _is_narrow(pair):
        copied += 4 * width
    return (6 if is_apart else 4) * pair.teacher.shape[1] + copied


def _chunks(problem: Problem, indices: list[int]) -> Iterator[list[_Piece]]:
    """All rows, in order: as many to a chunk as CHUNK_BYTES hold."""
    chunk: list[_Piece] = []
    room = CHUNK_BYTES
    for index in indices:
        pair = problem.pairs[index]
        count, row_bytes = len(pair.student), max(1, _row_bytes(problem, pair))
        step = max(1, CHUNK_BYTES // (row_bytes * _ROWS)) * _ROWS
        for begin in range(0, count, step):
            piece = _Piece(index, pair, slice(begin, min(count, begin + step)))
            cost = piece.shape[0] * row_bytes
            if chunk and cost > room:
                yield chunk
                chunk, room = [], CHUNK_BYTES
            chunk.append(piece)
            room -= cost
    if chunk:
        yield chunk


class _Buffers:
    """P and dP of the largest chunk."""

    def __init__(self, problem: Problem, chunks: list[list[_Piece]]) -> None:
        self.problem = problem
        sizes = [[self._sizes(piece) for piece in chunk] for chunk in chunks]
        totals = [[sum(column) for column in zip(*chunk, strict=True)] for chunk in sizes]
        projected, narrow = map(max, zip(*totals, strict=True)) if totals else (0, 0)
        self.projected = problem.sums.new_empty(projected, dtype=torch.float32)
        self.narrow = problem.sums.new_empty(narrow, dtype=torch.bfloat16)

    def _sizes(self, piece: _Piece) -> tuple[int, int]:
        """Elements of P, and of dP where it does not replace P."""
        is_apart = _is_narrow(piece.pair) and _wants_any(self.problem, piece.pair)
        return piece.size, piece.size if is_apart else 0

    def of(self, chunk: list[_Piece]) -> Iterator[tuple[_Piece, Tensor, Tensor | None]]:
        """Each piece with its P and dP, [R, Dt]; None where no gradient is wanted."""
        begin = begin_narrow = 0
        for piece in chunk:
            size, narrow_size = self._sizes(piece)
            count = piece.shape[0] * piece.shape[1]
            p = self.projected.narrow(0, begin, count).view(piece.shape)
            grad = p if _wants_any(self.problem, piece.pair) else None
            if narrow_size > 0:
                grad = self.narrow.narrow(0, begin_narrow, count).view(piece.shape)
            yield piece, p, grad
            begin += size
            begin_narrow += narrow_size


class _Projections:
    """Projections as the products of a chunk take them; pairs may share one."""

    def __init__(self) -> None:
        self._widened: dict[int, Tensor] = {}

    def of(self, pair: Pair, other: Tensor) -> Tensor:
        """[Dt, Ds], to be multiplied with another matrix."""
        if products.is_native(pair.projection, other):
            return pair.projection
        if pair.projection_index not in self._widened:
            self._widened[pair.projection_index] = pair.projection.float()
        return self._widened[pair.projection_index]


class _Totals:
    """Gradients of projections, in float32, and of biases, long sums in float64.

    That of a projection adds up in its own buffer if that is float32.
    """

    def __init__(self, problem: Problem, pairs: list[Pair]) -> None:
        self.projections = {
            pair.projection_index: problem.grad_projection(pair)
            for pair in pairs
            if problem.wants_projection(pair)
        }
        self.biases = {
            pair.bias_index: problem.grad_bias(pair) for pair in pairs if problem.wants_bias(pair)
        }
        self._products: dict[int, Tensor] = {}  # those that hold something
        self._sums = {
            index: torch.zeros_like(grad, dtype=torch.float64)
            for index, grad in self.biases.items()
        }

    def add(self, problem: Problem, pair: Pair, grad_p: Tensor, x: Tensor) -> None:
        """dP^T X and the sum over the rows of dP, where they are wanted."""
        if problem.wants_projection(pair):
            index = pair.projection_index
            is_added = index in self._products
            if not is_added:
                grad = self.projections[index]
                is_total = grad.dtype == torch.float32
                self._products[index] = (
                    grad if is_total else torch.empty_like(grad, dtype=torch.float32)
                )
            products.multiply(self._products[index], grad_p.T, x, is_added)
        if problem.wants_bias(pair):
            self._sums[pair.bias_index] += grad_p.sum(0, dtype=torch.float64)

    def finish(self) -> None:
        for index, grad in self.projections.items():
            total = self._products.get(index)
            if total is None:  # of no row
                grad.zero_()
            elif total is not grad:
                grad.copy_(total)
        for index, grad in self.biases.items():
            grad.copy_(self._sums[index])


def _fill_chunk(
    problem: Problem,
    chunk: list[_Piece],
    buffers: _Buffers,
    totals: _Totals,
    values: dict[int, Tensor],
) -> None:
    projections = _Projections()
    parts = list(buffers.of(chunk))
    students = [_student(piece) for piece in chunk]
    for (piece, p, _), x in zip(parts, students, strict=True):
        pair = piece.pair
        if pair.bias is not None:
            p.copy_(pair.bias)
        products.multiply(p, x, projections.of(pair, x).T, is_added=pair.bias is not None)
    row_weights = [_rows_of(piece.pair.row_weights, piece) for piece in chunk]
    torch.ops.fakd_ext.align_projected(
        [p for _, p, _ in parts],
        [piece.pair.teacher[piece.rows] for piece in chunk],
        [w for w in row_weights if w is not None],
        [w is not None for w in row_weights],
        problem.coefficients.contiguous(),
        [piece.index for piece in chunk],
        [grad for *_, grad in parts if grad is not None],
        [grad is not None for *_, grad in parts],
        [values[piece.index][piece.rows] for piece in chunk],
        problem.is_squared,
        problem.eps,
    )
    for (piece, _, grad_p), x in zip(parts, students, strict=True):
        if grad_p is None:
            continue
        grad_x = _rows_of(piece.pair.grad_student, piece)
        if grad_x is not None:
            products.multiply(grad_x, grad_p, projections.of(piece.pair, grad_p))
        totals.add(problem, piece.pair, grad_p, x)


def _rows_of(tensor: Tensor | None, piece: _Piece) -> Tensor | None:
    return None if tensor is None else tensor[piece.rows]


def _student(piece: _Piece) -> Tensor:
    """X [R, Ds]: 0 in rows of weight 0."""
    x, w = piece.pair.student[piece.rows], _rows_of(piece.pair.row_weights, piece)
    return x if w is None else torch.where(w[:, None] == 0, 0, x)
