"""Pairs with a projection on a GPU: products by torch, an engine's row kernel between them.

The direct route, by chunks of rows of many pairs, in buffers that one chunk uses after the other:

    P = X W^T + b  ->  one row kernel: values, dP  ->  dX = dP W, dW += dP^T X

db is the sum over the rows of dP. Every sum has an order of its own: equal bits in every run.

Products are the vendor library's because nothing measured was faster: on an H100, products in
Triton with the row arithmetic in their epilogues took 11.7 ms where cuBLAS takes 5.9 (16 pairs of
4096 rows, 2048 to 4096 wide, bfloat16), and the gram route with its fewer FLOPs 0.60 ms where the
direct one takes 0.25 (6 pairs of 4096 rows, 256 to 1024 wide).

Products have float32 sums, and their operands stay in half precision on a GPU: X and W of one
dtype, and dP, which is rounded to bfloat16 where X and W are bfloat16, as eager autograd rounds it.
float16 has too small a range for dP; its products, and those of unequal dtypes, are in float32, as
torch multiplies it ("tf32" where torch allows it).

Rows of weight 0 are 0 in a copy of X, so that a NaN there does not reach dW; their dP is 0.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _products as products
from .problem import Pair, Problem

# Of P, dP and copies of X of a chunk.
CHUNK_BYTES = 96 << 20  # 4096 rows of 4096 columns: of an H100's 7.2 to 12.3 ms 7.5
ROWS = 128  # of a tile of a matrix product: rows of a piece are a multiple of it
_ALIGNMENT = 8  # elements: every piece of a buffer begins on 16 bytes


# Why a GPU's engines refuse a route that was asked for by name.
NO_GRAM = (
    "it takes the direct route alone: which rows cancel on the gram route only the card knows, and "
    "there the direct one is faster"
)


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


class Part(NamedTuple):
    """What a row kernel is given of a pair: rows of P, and where their dP goes."""

    index: int  # of the pair
    pair: Pair
    rows: slice  # begins at a multiple of ROWS
    projected: Tensor  # [R, Dt] float32
    grad: Tensor | None  # [R, Dt]: P itself or bfloat16; None where no gradient is wanted


def refusal(problem: Problem) -> str | None:
    """Why a GPU's engine cannot serve these pairs, None where it can."""
    is_gram = any(pair.route == "gram" for pair in problem.pairs)
    return NO_GRAM if is_gram and problem.is_route_forced else None


def split(problem: Problem) -> tuple[list[int], list[int]]:
    """The pairs without and with a projection."""
    same = [i for i, pair in enumerate(problem.pairs) if pair.projection is None]
    return same, [i for i, pair in enumerate(problem.pairs) if pair.projection is not None]


def fill(problem: Problem, indices: list[int], launch_rows: Callable[[list[Part]], None]) -> None:
    """Fill every wanted gradient of these pairs; `launch_rows` keeps the values of each chunk."""
    chunks = list(_chunks(problem, indices))
    buffers = _Buffers(problem, chunks)
    totals = _Totals(problem, [problem.pairs[index] for index in indices], chunks)
    for chunk in chunks:
        _fill_chunk(problem, chunk, buffers, totals, launch_rows)
    totals.finish()


def describe(problem: Problem, indices: list[int], kernel: str) -> str:
    """What `fill` would do, in words and in order; nothing is computed."""
    pairs = [problem.pairs[index] for index in indices]
    count = sum(1 for _ in _chunks(problem, indices))
    steps = [f"P = X W^T by torch, {kernel}: values and dP"]
    steps += ["dX = dP W"] * any(pair.grad_student is not None for pair in pairs)
    steps += ["dW += dP^T X"] * any(problem.wants_projection(pair) for pair in pairs)
    steps += ["db += sum of dP"] * any(problem.wants_bias(pair) for pair in pairs)
    return f"rows of {len(pairs)} pairs in chunks, {count} in all: {', '.join(steps)}"


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
        step = max(1, CHUNK_BYTES // (row_bytes * ROWS)) * ROWS
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

    def parts(self, chunk: list[_Piece]) -> list[Part]:
        """Each piece with its P and dP."""
        parts = []
        begin = begin_narrow = 0
        for piece in chunk:
            size, narrow_size = self._sizes(piece)
            count = piece.shape[0] * piece.shape[1]
            p = self.projected.narrow(0, begin, count).view(piece.shape)
            grad = p if _wants_any(self.problem, piece.pair) else None
            if narrow_size > 0:
                grad = self.narrow.narrow(0, begin_narrow, count).view(piece.shape)
            parts.append(Part(*piece, p, grad))
            begin += size
            begin_narrow += narrow_size
        return parts


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

    That of a projection adds up in its own buffer if that is float32, or if all of its rows are in
    one part.
    """

    def __init__(self, problem: Problem, pairs: list[Pair], chunks: list[list[_Piece]]) -> None:
        self._parts = Counter(piece.pair.projection_index for chunk in chunks for piece in chunk)
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
                is_total = grad.dtype == torch.float32 or self._parts[index] == 1
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
    launch_rows: Callable[[list[Part]], None],
) -> None:
    projections = _Projections()
    parts = buffers.parts(chunk)
    students = [_student(part.pair, part.rows) for part in parts]
    for part, x in zip(parts, students, strict=True):
        bias, p = part.pair.bias, part.projected
        if bias is not None:
            p.copy_(bias)
        products.multiply(p, x, projections.of(part.pair, x).T, is_added=bias is not None)
    launch_rows(parts)
    for part, x in zip(parts, students, strict=True):
        if part.grad is None:
            continue
        if part.pair.grad_student is not None:
            grad_x = part.pair.grad_student[part.rows]
            products.multiply(grad_x, part.grad, projections.of(part.pair, part.grad))
        totals.add(problem, part.pair, part.grad, x)


def _student(pair: Pair, rows: slice) -> Tensor:
    """X [R, Ds]: 0 in rows of weight 0."""
    x, w = pair.student[rows], pair.row_weights
    return x if w is None else torch.where(w[rows, None] == 0, 0, x)
