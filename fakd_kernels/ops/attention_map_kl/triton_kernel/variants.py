"""Kernels with everything that is compiled into them, from what the pairs of a launch are alike in.

A launch and a dry compile (tests/kernels/test_triton_aot_maps.py) get their variants here, so what
is tested without a card is what runs on one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...._engines import interpreted
from ...._triton import TL_DTYPES, Variant, next_power_of_2
from ...._triton_logits import RowForm
from ...._triton_outputs import Tile, choose_tile
from ..problem import Pair, Problem
from .match_kernels import probabilities_kernel, scores_kernel
from .mean_kernels import mean_probabilities_kernel, mean_scores_kernel


def map_tile(tokens: int, are_scores: bool, heads: int) -> Tile:
    """8 entries of each side a thread, one load of 16 bytes of bfloat16; 16 of scores that are
    compared head by head, whose row stays in registers.

    Probabilities need no whole row. Of averaged scores, `heads` of them, a program keeps numbers of
    every head and row: no more than 512 of a kind. Chosen 2026-11 by registers and spills, see
    tests/kernels/test_triton_aot_maps.py; not yet tuned on a card.
    """
    tile = choose_tile(tokens)
    if not interpreted() and tile.columns > 256:
        if not are_scores:
            tile = Tile(1024 // min(tile.columns, 1024), min(tile.columns, 1024), 4, False)
        elif heads > 1:
            columns = tile.columns if tile.columns <= 2048 else 1024
            rows = max(1, 1024 // columns)
            tile = Tile(rows, columns, rows * columns // 256, tokens > columns)
    return tile._replace(tokens=max(1, min(tile.tokens, 512 // heads)))


class Group(NamedTuple):
    """What pairs of one launch have in common."""

    student: torch.dtype
    teacher: torch.dtype
    grad: torch.dtype | None
    tile: Tile
    heads: int  # the larger number, a power of two, where scores are averaged; else 1
    is_aligned: bool
    are_scores: bool
    is_mean: bool

    @staticmethod
    def of(problem: Problem, pair: Pair) -> "Group":
        tokens, is_mean = pair.student.shape[2], pair.teacher_heads is None
        heads = 1
        if is_mean and problem.are_scores:
            heads = next_power_of_2(max(pair.student.shape[1], pair.teacher.shape[1], 2))
        maps = [pair.student, pair.teacher, *([] if pair.grad is None else [pair.grad])]
        is_aligned = tokens % 16 == 0 and all(map(_is_aligned, maps))
        if pair.row_weights is not None:
            is_aligned = is_aligned and pair.row_weights.data_ptr() % 16 == 0
        return Group(
            pair.student.dtype,
            pair.teacher.dtype,
            None if pair.grad is None else pair.grad.dtype,
            map_tile(tokens, problem.are_scores, heads),
            heads,
            is_aligned,
            problem.are_scores,
            is_mean,
        )

    def form(self, distance: str) -> RowForm:
        flags = dict.fromkeys(RowForm._fields, False)
        flags |= {"wants_grad": self.grad is not None, "is_wide": self.tile.is_wide}
        flags |= {"is_aligned": self.is_aligned, "is_interpreted": interpreted()}
        return RowForm(**flags | {"distance": distance})


def _is_aligned(maps: Tensor) -> bool:
    """Whether rows begin on 16 bytes, a multiple of 16 elements apart."""
    rows = zip(maps.shape[:-1], maps.stride()[:-1], strict=True)
    return maps.data_ptr() % 16 == 0 and all(step % 16 == 0 for size, step in rows if size > 1)


def maps_variant(group: Group, distance: str, lines: int) -> Variant:
    """Arguments: the table; of matched heads also their teacher heads; the coefficients; of scores
    also 1 / temperature."""
    signature = {"table_ptr": "*i64", "heads_ptr": "*i64", "coefficients_ptr": "*fp32"}
    if group.is_mean:
        del signature["heads_ptr"]
    if group.are_scores:
        signature["inverse_temperature"] = "fp32"
    constants = {
        "STUDENT": TL_DTYPES[group.student],
        "TEACHER": TL_DTYPES[group.teacher],
        "GRAD": TL_DTYPES[group.grad or torch.float32],
        "FORM": group.form(distance),
        "LINES": next_power_of_2(lines),
        "BLOCK_N": group.tile.tokens,
        "BLOCK_V": group.tile.columns,
    }
    kernel = scores_kernel if group.are_scores else probabilities_kernel
    if group.is_mean:
        kernel = mean_scores_kernel if group.are_scores else mean_probabilities_kernel
        constants |= {"HEADS": group.heads} if group.are_scores else {}
    return Variant(kernel, signature, constants, group.tile.num_warps)
