"""What pairs with a projection share: `Shared` by all of a call, `Group` by those of equal dtypes.

Both routes take a `Group` and add their steps to it.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .... import _triton
from ..problem import Pair
from . import tiles, variants
from .arithmetic import Arithmetic
from .steps import Member, Steps


class Shared:
    """Biases in float32, and where gradients accumulate: pairs may share either."""

    def __init__(self, steps: Steps, members: list[Member]) -> None:
        self.steps = steps
        self.written: set[tuple[str, int]] = set()  # totals that hold something already
        problem, pairs = steps.problem, [member.pair for member in members]
        self.grads = {
            (kind, index): grad
            for kind, grads in (
                ("projection", problem.grad_projections),
                ("bias", problem.grad_biases),
            )
            for index, grad in enumerate(grads)
            if grad is not None
        }
        self.totals = {  # in its own buffer if that is float32
            place: grad if grad.dtype == torch.float32 else steps.empty(*grad.shape)
            for place, grad in self.grads.items()
        }
        biases = {pair.bias_index: pair.bias for pair in pairs if pair.bias is not None}
        self.biases = {index: steps.empty(*bias.shape) for index, bias in biases.items()}
        self.zeros = steps.empty(max(max(p.student.shape[1], p.teacher.shape[1]) for p in pairs))
        steps.add("a bias of zeros for pairs without one", self.zeros.zero_)
        for index, bias in biases.items():
            steps.add("bias in float32", partial(self.biases[index].copy_, bias))

    def bias(self, pair: Pair) -> Tensor:
        return self.zeros if pair.bias is None else self.biases[pair.bias_index]

    def claim(self, kind: str, index: int) -> bool:
        """Whether this total holds something already; from now on it does."""
        is_added = (kind, index) in self.written
        self.written.add((kind, index))
        return is_added

    def add_results(self) -> None:
        """Totals that are not gradients themselves become gradients."""
        for (kind, index), total in self.totals.items():
            grad = self.grads[kind, index]
            if total is not grad:
                self.steps.add(f"gradient of a {kind} in its own dtype", partial(grad.copy_, total))


class Key(NamedTuple):
    """What pairs of one launch have in common."""

    student: torch.dtype
    teacher: torch.dtype
    projection: torch.dtype
    is_aligned: bool

    @staticmethod
    def of(pair: Pair) -> "Key":
        tensors = (pair.student, pair.teacher, pair.projection)
        return Key(*(tensor.dtype for tensor in tensors), all(map(_triton.is_aligned, tensors)))


class Group:
    """Pairs of one key, and their launches: each serves all of them."""

    def __init__(self, steps: Steps, shared: Shared, key: Key) -> None:
        self.steps = steps
        self.shared = shared
        self.problem = steps.problem
        self.is_aligned = key.is_aligned
        self.capability = _triton.capability(steps.card)
        is_tf32 = _triton.is_tf32_allowed()
        self.dtypes = Arithmetic.of(
            key.student, key.teacher, key.projection, is_tf32_allowed=is_tf32
        )

    def launch_product(
        self,
        words: str,
        make: Callable[..., _triton.Variant],
        what: object,
        lines: list,
        *segments: list,
    ) -> None:
        """`make(what, ...)` on `lines`: (rows, columns, fields after the first)."""
        if not lines:
            return
        size = _triton.next_power_of_2(len(lines))
        variant = make(what, self.dtypes, self.capability, size, self.is_aligned)
        table, count = [], 0
        for height, width, fields in lines:
            table.append((count, *fields))
            count += tiles.count_blocks(height, variant.constants["BLOCK_M"]) * tiles.count_blocks(
                width, variant.constants["BLOCK_N"]
            )
        self.steps.launch(words, variant, count, table, *segments, count)

    def launch_outer(self, words: str, kind: str, jobs: list) -> None:
        """`jobs`: (out, is_added, segments), `out` of the shape [rows, columns] last."""
        lines, segments = [], []
        for out, is_added, own in jobs:
            height, width = out.shape[-2:]
            fields = (out, height, width, is_added, len(segments), len(own))
            lines.append((height, width, fields))
            segments += own
        self.launch_product(words, variants.outer_variant, kind, lines, segments)

    def launch_column_sums(self, words: str, dtype: torch.dtype, jobs: list) -> None:
        """`jobs`: (out, is_added, segments)."""
        lines, segments, first = [], [], 0
        for out, is_added, own in jobs:
            width = out.shape[0]
            lines.append((first, out, width, is_added, len(segments), len(own)))
            segments += own
            first += tiles.count_blocks(width, tiles.COLUMN_BLOCK)
        if lines:
            variant = variants.column_sums_variant(dtype, _triton.next_power_of_2(len(lines)))
            self.steps.launch(words, variant, first, lines, segments)
