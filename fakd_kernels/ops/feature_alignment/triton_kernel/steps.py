"""The steps of a call as they are laid out: buffers, launches, and where values go."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .... import _triton
from ..problem import Pair, Problem


@dataclass(frozen=True)
class Step:
    """One thing done on the device, and what it is in words."""

    words: str
    run: Callable[[], object]


class Member(NamedTuple):
    """A pair, and its place in the problem."""

    index: int
    pair: Pair


class Steps:
    """The steps so far; `slots` are the first slot of each pair's values, and the end."""

    def __init__(self, problem: Problem, device: torch.device, slots: list[int]) -> None:
        self.problem = problem
        self.device = device  # of the buffers: "meta" in a plan that is only described
        self.card = problem.sums.device
        self.steps: list[Step] = []
        self.slots = slots
        self.partial = self.empty(slots[-1], 2, dtype=torch.float64)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def add(self, words: str, run: Callable[[], object]) -> None:
        self.steps.append(Step(words, run))

    def launch(self, words: str, variant: _triton.Variant, count: int, *arguments) -> None:
        """One launch of `count` programs, or tiles of a persistent kernel; lists become tables."""

        def run() -> None:
            tables = [
                _triton.make_table(argument, self.card) if isinstance(argument, list) else argument
                for argument in arguments
            ]
            variant.launch(count, self.card, *tables)

        self.add(f"{words}: 1 launch of {variant.kernel.__name__}", run)

    def launch_rows(self, words: str, variant: _triton.Variant, count: int, lines: list) -> None:
        """Likewise, of a kernel that leaves values in slots."""
        coefficients, eps = self.problem.coefficients, self.problem.eps
        self.launch(words, variant, count, self.partial, lines, coefficients, eps)


def name_pairs(members: list) -> str:
    return "1 pair" if len(members) == 1 else f"{len(members)} pairs"
