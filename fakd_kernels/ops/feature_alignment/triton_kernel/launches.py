"""The launches of a call: rows of many pairs in each, and where their values go."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .... import _triton
from ...._pairs import grad_dtype
from .. import projected
from ..problem import Problem
from . import variants


class _Rows(NamedTuple):
    """Rows of a pair, with or without a projection."""

    index: int  # of the pair
    begin: int  # the first of these rows in the pair, a multiple of a tile's
    p: Tensor  # [R, D]
    t: Tensor
    weights: Tensor | None  # [R]
    grad: Tensor | None  # [R, D]

    @property
    def grad_dtype(self) -> torch.dtype:
        return grad_dtype(self.p) if self.grad is None else self.grad.dtype

    @property
    def key(self) -> tuple:
        """What the rows of one launch have in common, as `variants.align_variant` takes it."""
        block = variants.align_block(self.p.shape[1])
        is_aligned = _triton.is_aligned(self.p) and _triton.is_aligned(self.t)
        is_wide = self.p.shape[1] > block[1]
        return self.p.dtype, self.t.dtype, self.grad_dtype, *block, is_wide, is_aligned


class Launches:
    """What a call launches, and the slots of its values: one for each tile of rows of a pair."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.coefficients = problem.coefficients.contiguous()
        counts = [_count_tiles(*pair.teacher.shape) for pair in problem.pairs]
        self.slots = list(itertools.accumulate(counts, initial=0))
        self.partial = torch.empty(
            (self.slots[-1], 2), dtype=torch.float64, device=problem.sums.device
        )

    def launch_same(self, indices: list[int]) -> None:
        """Pairs without a projection."""
        self._launch(same_rows(self.problem, indices))

    def launch_parts(self, parts: list[projected.Part]) -> None:
        """A chunk of pairs with one."""
        self._launch(
            [
                _Rows(
                    part.index,
                    part.rows.start,
                    part.projected,
                    part.pair.teacher[part.rows],
                    None if part.pair.row_weights is None else part.pair.row_weights[part.rows],
                    part.grad,
                )
                for part in parts
            ]
        )

    def reduce(self) -> None:
        """Fill the sums of every pair."""
        device = self.partial.device
        lines = [(first, end - first) for first, end in itertools.pairwise(self.slots)]
        arguments = self.problem.sums, self.partial, _triton.make_table(lines, device)
        variants.reduce_variant().launch(len(lines), device, *arguments)

    def _launch(self, rows: list[_Rows]) -> None:
        device = self.partial.device
        for group in grouped(rows):
            lines, first = [], 0
            for own in group:
                count, width = own.p.shape
                slot = self.slots[own.index] + _count_tiles(own.begin, width)
                fields = (first, own.index, own.p, own.t, own.weights, own.grad, count, width)
                lines.append((*fields, own.p.stride(0), own.t.stride(0), slot))
                first += _count_tiles(count, width)
            p, t, grad, *_, is_aligned = group[0].key
            variant = variants.align_variant(
                p, t, grad, width, self.problem.is_squared, len(lines), is_aligned
            )
            table = _triton.make_table(lines, device)
            arguments = self.partial, table, self.coefficients, self.problem.eps
            variant.launch(first, device, *arguments)


def same_rows(problem: Problem, indices: list[int]) -> list[_Rows]:
    """All rows of these pairs, which have no projection."""
    pairs = [(index, problem.pairs[index]) for index in indices]
    return [_Rows(i, 0, p.student, p.teacher, p.row_weights, p.grad_student) for i, p in pairs]


def grouped(rows: list[_Rows]) -> list[list[_Rows]]:
    """One group for each launch."""
    groups: dict[tuple, list[_Rows]] = {}
    for own in rows:
        groups.setdefault(own.key, []).append(own)
    return list(groups.values())


def _count_tiles(rows: int, width: int) -> int:
    return -(-rows // variants.align_block(width)[0])
