"""Launches of the row kernels of outputs, and what is compiled into them.

A launch and a dry compile (tests/kernels/test_triton_aot_outputs.py) get their variants here, so
what is tested without a card is what runs on one. Imports Triton.
"""

import contextlib
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from . import _engines
from ._outputs import Terms
from ._triton import Variant, next_power_of_2
from ._triton_logits import RowForm
from ._triton_rows import SIZES, reduce_kernel, rows_kernel

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_ANY = torch.float32  # dtype of what a form does not read


class Tile(NamedTuple):
    """Tokens and entries that a program holds at once."""

    tokens: int
    columns: int
    num_warps: int
    is_wide: bool  # a row is more than a tile


def choose_tile(vocab: int) -> Tile:
    """Whole rows of up to 4096 entries, 16 entries of each side a thread.

    Of small vocabularies 4: a thread keeps the sums of every row that it has a part of.
    """
    columns = max(8, next_power_of_2(vocab))
    if _engines.interpreted():  # narrow enough that small tests sweep rows
        return Tile(4, 64, 4, True) if columns > 64 else Tile(2048 // columns, columns, 4, False)
    if columns <= 256:
        return Tile(512 // columns, columns, 4, False)
    if columns <= 4096:
        tokens = max(1, 2048 // columns)
        return Tile(tokens, columns, tokens * columns // 512, False)
    return Tile(1, 4096, 8, True)


class Logits(NamedTuple):
    """One side of a block, as it lies in memory."""

    rows: Tensor  # [R, V], any row stride
    bias: Tensor | None = None
    softcap: float | None = None


def count_programs(tokens: int, vocab: int) -> int:
    return -(-tokens // choose_tile(vocab).tokens)


def rows_variant(
    form: RowForm,
    vocab: int,
    student: torch.dtype,
    teacher: torch.dtype,
    grad: torch.dtype = _ANY,
    student_bias: torch.dtype = _ANY,
    teacher_bias: torch.dtype = _ANY,
) -> Variant:
    tile = choose_tile(vocab)
    numbers = (
        *("inverse_temperature", "student_softcap", "inverse_student_softcap"),
        *("teacher_softcap", "inverse_teacher_softcap", "teacher_share", "student_share"),
    )
    signature = {
        "per_token_ptr": "*fp32",
        "slots_ptr": "*fp64",
        "grad_ptr": POINTERS[grad],
        "student_ptr": POINTERS[student],
        "teacher_ptr": POINTERS[teacher],
        "student_bias_ptr": POINTERS[student_bias],
        "teacher_bias_ptr": POINTERS[teacher_bias],
        "labels_ptr": "*i64",
        "weights_ptr": "*fp32",
        "coefficients_ptr": "*fp32",
        **dict.fromkeys(SIZES, "i32"),
        **dict.fromkeys(numbers, "fp32"),
    }
    constants = {"FORM": form, "BLOCK_N": tile.tokens, "BLOCK_V": tile.columns}
    return Variant(rows_kernel, signature, constants, tile.num_warps)


def reduce_variant() -> Variant:
    signature = {"sums_ptr": "*fp32", "slots_ptr": "*fp64", "count": "i32"}
    return Variant(reduce_kernel, signature, {"BLOCK": 1024}, 4)


class Slots:
    """Values of the programs of a call's launches, in the order of the tokens."""

    def __init__(self, programs: int, sums: Tensor) -> None:
        self.sums = sums
        self.values = torch.empty(programs, 2, dtype=torch.float64, device=sums.device)
        self.taken = 0

    def take(self, programs: int) -> Tensor:
        self.taken += programs
        return self.values[self.taken - programs : self.taken]

    def reduce(self) -> None:
        """Fill the sums of the call."""
        count = len(self.values)
        reduce_variant().launch(min(count, 1), self.sums.device, self.sums, self.values, count)


def launch_rows(
    student: Logits,
    teacher: Logits,
    grad: Tensor | None,
    terms: Terms,
    rows: slice,
    per_token: Tensor,
    slots: Slots,
    *,
    padded: int | None = None,
) -> None:
    """Values, and the gradient into `grad` [R, V], of the tokens `rows` of a call.

    Args:
        student: with what is left to add to its logits, or to bend.
        teacher: likewise.
        grad: may be the student's own rows; None: values only.
        terms: of the call, as are `per_token` [N, 2] and `slots`.
        rows: which tokens of the call these are.
        padded: columns that may be read and written, where that is more than V.
    """
    tokens, vocab = student.rows.shape
    coefficients = terms.coefficients.contiguous()
    written = student.rows if grad is None else grad
    form = RowForm(
        distance=terms.distance,
        wants_grad=grad is not None,
        has_labels=terms.labels is not None,
        has_weights=terms.row_weights is not None,
        is_warm=terms.labels is not None and terms.temperature != 1,
        is_student_capped=student.softcap is not None,
        is_teacher_capped=teacher.softcap is not None,
        has_student_bias=student.bias is not None,
        has_teacher_bias=teacher.bias is not None,
        is_wide=choose_tile(vocab).is_wide,
        is_aligned=(padded or vocab) % 16 == 0
        and has_aligned_rows(student.rows, teacher.rows, written),
        is_interpreted=_engines.interpreted(),
    )
    # Coefficients stand for what is not there and hence not read.
    biases = [coefficients if side.bias is None else side.bias for side in (student, teacher)]
    matrices = written, student.rows, teacher.rows
    grad_dtype, *dtypes = (tensor.dtype for tensor in (*matrices, *biases))
    programs = count_programs(tokens, vocab)
    rows_variant(form, vocab, *dtypes[:2], grad_dtype, *dtypes[2:]).launch(
        programs,
        coefficients.device,
        per_token[rows],
        slots.take(programs),
        *matrices,
        *biases,
        *of_rows(terms, rows),
        coefficients,
        *(matrix.stride(0) for matrix in matrices),
        tokens,
        vocab,
        padded or vocab,
        1 / terms.temperature,
        *cap_numbers(student.softcap),
        *cap_numbers(teacher.softcap),
        *mixture_of(terms.jsd_beta),
    )


def has_aligned_rows(*matrices: Tensor) -> bool:
    """Whether rows begin on 16 bytes, and 16 elements apart."""
    return all(m.data_ptr() % 16 == 0 and m.stride(0) % 16 == 0 for m in matrices)


def of_rows(terms: Terms, rows: slice) -> list[Tensor]:
    """Labels and weights of these tokens; what is not there, and hence not read, is a stand-in."""
    return [
        terms.coefficients if values is None else values[rows]
        for values in (terms.labels, terms.row_weights)
    ]


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def mixture_of(beta: float) -> tuple[float, float]:
    """The shares of teacher and student in the mixture of "jsd", beta and 1 - beta.

    As float32 numbers they add up to exactly 1, and the smaller is rounded once, as in
    csrc/common/mixture.h.
    """
    smaller = _float32(min(beta, 1 - beta))
    larger = _float32(1 - smaller)
    return (smaller, larger) if beta < 0.5 else (larger, smaller)


def _float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def cap_numbers(softcap: float | None) -> tuple[float, float]:
    return (softcap, 1 / softcap) if softcap is not None else (0.0, 0.0)
