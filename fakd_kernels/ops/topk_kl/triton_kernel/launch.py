"""Launches of the row kernel, and what is compiled into it.

A launch and a dry compile (tests/kernels/test_triton_aot_outputs.py) get their variants here, so
what is tested without a card is what runs on one. Imports Triton.
"""

import torch
from torch import Tensor

from .... import _engines
from ...._output_products import padded
from ...._triton import Variant, next_power_of_2
from ...._triton_outputs import POINTERS, Slots, cap_numbers, choose_tile, has_aligned_rows, of_rows
from ..problem import Problem
from .kernel import SIZES, TopForm, top_rows_kernel


def _block_sizes(vocab: int, entries: int) -> dict[str, int]:
    """Rows of a tile by its wider side, logits or entries."""
    tile, block = choose_tile(vocab), max(8, next_power_of_2(entries))
    tokens = max(1, min(tile.tokens, tile.tokens * tile.columns // block))
    return {"BLOCK_N": tokens, "BLOCK_V": tile.columns, "BLOCK_K": block}


def count_programs(tokens: int, vocab: int, entries: int) -> int:
    return -(-tokens // _block_sizes(vocab, entries)["BLOCK_N"])


def rows_variant(
    form: TopForm,
    vocab: int,
    entries: int,
    grad: torch.dtype = torch.float32,
    bias: torch.dtype = torch.float32,
) -> Variant:
    numbers = ("inverse_temperature", "softcap", "inverse_softcap")
    signature = {
        "per_token_ptr": "*fp32",
        "slots_ptr": "*fp64",
        "grad_ptr": POINTERS[grad],
        "student_ptr": "*fp32",
        "bias_ptr": POINTERS[bias],
        "indices_ptr": "*i64",
        "logprobs_ptr": "*fp32",
        "labels_ptr": "*i64",
        "weights_ptr": "*fp32",
        "coefficients_ptr": "*fp32",
        **dict.fromkeys(SIZES, "i32"),
        **dict.fromkeys(numbers, "fp32"),
    }
    constants = {"FORM": form, **_block_sizes(vocab, entries)}
    # As many warps as entries need, where they are more than logits: 16 a thread.
    entry_warps = constants["BLOCK_N"] * constants["BLOCK_K"] // 512
    num_warps = max(choose_tile(vocab).num_warps, min(8, entry_warps))
    return Variant(top_rows_kernel, signature, constants, num_warps)


def launch_rows(
    problem: Problem, student: Tensor, grad: Tensor | None, rows: slice, slots: Slots
) -> None:
    """Values, and the gradient into `grad` [R, V], of the tokens `rows`, whose logits lie in a
    block of `padded` columns, [R, V], and are overwritten."""
    terms, (tokens, vocab) = problem.terms, student.shape
    coefficients, entries = terms.coefficients.contiguous(), problem.indices.shape[1]
    written = student if grad is None else grad
    form = TopForm(
        has_ghost=problem.has_ghost,
        wants_grad=grad is not None,
        has_labels=terms.labels is not None,
        has_weights=terms.row_weights is not None,
        is_capped=terms.student_softcap is not None,
        has_bias=problem.bias is not None,
        is_aligned=has_aligned_rows(student, written),
        is_interpreted=_engines.interpreted(),
    )
    bias = coefficients if problem.bias is None else problem.bias
    programs = count_programs(tokens, vocab, entries)
    rows_variant(form, vocab, entries, written.dtype, bias.dtype).launch(
        programs,
        coefficients.device,
        problem.per_token[rows],
        slots.take(programs),
        written,
        student,
        bias,
        problem.indices[rows],
        problem.logprobs[rows],
        *of_rows(terms, rows),
        coefficients,
        written.stride(0),
        student.stride(0),
        tokens,
        vocab,
        padded(vocab),
        entries,
        1 / terms.temperature,
        *cap_numbers(terms.student_softcap),
    )
