"""Kernels with everything that is compiled into them, from what a group of pairs has in common.

A launch and a dry compile (tests/kernels/test_triton_aot_attention.py) get their variants here, so
what is tested without a card is what runs on one.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...._engines import interpreted
from ...._pairs import grad_dtype
from ...._triton import TL_DTYPES, Variant, next_power_of_2
from ..problem import Pair, Side
from . import tiles
from .forward_kernel import forward_kernel
from .gradient_kernel import gradient_kernel
from .mean_kernels import center_kernel, map_kernel, sums_kernel
from .rows import SideForm
from .small_kernels import group_kernel

FULL = "tf32x3"  # of float32 products
GROUP_BLOCK = 1024  # elements of a program of `group_kernel`


class Form(NamedTuple):
    """What pairs of one launch have in common."""

    student: SideForm
    teacher: SideForm
    has_weights: bool
    grad: tl.dtype
    grad_precision: str

    @staticmethod
    def of(pair: Pair, is_tf32_allowed: bool) -> "Form":
        grads = [grad for grad in (pair.grad_q, pair.grad_k) if grad is not None]
        return Form(
            side_form(pair.student, is_tf32_allowed, *grads),
            side_form(pair.teacher, is_tf32_allowed),
            pair.row_weights is not None,
            *gradient_arithmetic(pair.student.q.dtype, is_tf32_allowed),
        )


def gradient_arithmetic(student: torch.dtype, is_tf32_allowed: bool) -> tuple[tl.dtype, str]:
    """The dtype of gradients, and the precision of ds K and ds^T Q.

    ds is rounded to bfloat16 as eager autograd rounds it. float16 has too small a range, so both
    operands become tf32, whose 10 bits hold float16 exactly. float32 goes to tensor cores as
    tf32x3, full float32 accuracy ("tf32" where torch allows it).
    """
    grad = TL_DTYPES[grad_dtype(torch.empty(0, dtype=student))]
    if student == torch.bfloat16:
        return grad, "native"
    return grad, "tf32" if is_tf32_allowed or student == torch.float16 else FULL


def side_form(side: Side, is_tf32_allowed: bool, *grads: Tensor) -> SideForm:
    width, tensors = side.q.shape[-1], (side.q, side.k, *grads)
    precision = "native"
    if side.q.dtype == torch.float32:
        precision = "tf32" if is_tf32_allowed else FULL
    pieces, step = tiles.split_width(width, precision)
    return SideForm(
        TL_DTYPES[side.q.dtype],
        pieces,
        step,
        sum(pieces[-1]) == width if step == 0 else width % pieces[0][1] == 0,
        all(map(_is_aligned, tensors)),
        side.softcap is not None,
        precision,
        interpreted(),
    )


def _is_aligned(tensor: Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time, in blocks of 16 elements."""
    width, *rows = tensor.shape[-1], *zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    steps = [width, *(stride for size, stride in rows if size > 1)]
    return tensor.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps)


def _is_float(*forms: SideForm) -> bool:
    return any(form.precision != "native" for form in forms)


def _variant(
    kernel,
    signature: dict[str, str],
    constants: dict[str, object],
    kind: str,
    sides: tuple[SideForm, ...],
    capability: int,
    lines: int,
    is_float: bool = False,
) -> Variant:
    """Of a kernel whose program keeps a tile; `is_float` where its gradient is, if no side is."""
    tile = tiles.choose_tile(
        kind,
        capability,
        max(sum(side.pieces[-1]) for side in sides),
        is_float or _is_float(*sides),
        constants.get("DISTANCE", "kl") != "kl" or any(side.is_capped for side in sides),
        all(side.is_aligned for side in sides),
    )
    constants |= {"LINES": next_power_of_2(lines), "BLOCK_OWN": tile.own, "BLOCK_OTHER": tile.other}
    return Variant(kernel, signature, constants, tile.num_warps, tile.num_stages)


def forward_variant(form: Form, distance: str, capability: int, lines: int) -> Variant:
    signature = {"table_ptr": "*i64", "heads_ptr": "*i64"}
    constants = {
        "DISTANCE": distance,
        "HAS_WEIGHTS": form.has_weights,
        "STUDENT": form.student,
        "TEACHER": form.teacher,
    }
    sides = form.student, form.teacher
    return _variant(forward_kernel, signature, constants, "forward", sides, capability, lines)


def gradient_variant(
    form: Form, distance: str, of_queries: bool, is_mean: bool, capability: int, lines: int
) -> Variant:
    signature = {"table_ptr": "*i64", "heads_ptr": "*i64", "coefficients_ptr": "*fp32"}
    constants = {
        "DISTANCE": distance,
        "HAS_WEIGHTS": form.has_weights,
        "OF_QUERIES": of_queries,
        "IS_MEAN": is_mean,
        "GRAD_DTYPE": form.grad,
        "PRECISION": form.grad_precision,
        "STUDENT": form.student,
        "TEACHER": form.teacher,
    }
    sides = (form.student,) if is_mean else (form.student, form.teacher)
    is_float = form.grad_precision != "native"
    return _variant(
        gradient_kernel, signature, constants, "gradient", sides, capability, lines, is_float
    )


def sums_variant(form: SideForm, has_weights: bool, capability: int, lines: int) -> Variant:
    constants = {"HAS_WEIGHTS": has_weights, "FORM": form}
    return _variant(
        sums_kernel, {"table_ptr": "*i64"}, constants, "forward", (form,), capability, lines
    )


def map_variant(form: Form, distance: str, capability: int, lines: int) -> Variant:
    constants = {
        "DISTANCE": distance,
        "HAS_WEIGHTS": form.has_weights,
        "STUDENT": form.student,
        "TEACHER": form.teacher,
    }
    sides = form.student, form.teacher
    return _variant(map_kernel, {"table_ptr": "*i64"}, constants, "map", sides, capability, lines)


def center_variant(form: Form, distance: str, capability: int, lines: int) -> Variant:
    constants = {
        "DISTANCE": distance,
        "HAS_WEIGHTS": form.has_weights,
        "STUDENT": form.student,
    }
    sides = (form.student,)
    return _variant(
        center_kernel, {"table_ptr": "*i64"}, constants, "forward", sides, capability, lines
    )


def group_variant(parts: tl.dtype, out: tl.dtype, lines: int) -> Variant:
    constants = {
        "PART_DTYPE": parts,
        "OUT_DTYPE": out,
        "LINES": next_power_of_2(lines),
        "BLOCK": GROUP_BLOCK,
        "IS_INTERPRETED": interpreted(),
    }
    return Variant(group_kernel, {"table_ptr": "*i64"}, constants, 4)
