"""What a call of `topk_kl` is given: checked, flattened and turned into coefficients."""

import torch
from torch import Tensor

from ... import _output_checks, _outputs, _pairs, _validate
from ..._outputs import Rows


def lower(
    student_hidden,
    student_head,
    teacher_indices,
    teacher_logprobs,
    student_bias,
    labels,
    mask,
    temperature,
    kl_weight,
    ce_weight,
    ignore_index,
    scale_by_temperature_squared,
    student_softcap,
    ghost,
    normalizer,
    block_bytes,
    engine,
) -> tuple[tuple, Rows]:
    """The checked arguments of the registered op, and what its logs are made with."""
    _output_checks.check_projection("student", student_hidden, student_head, student_bias)
    _output_checks.least_vocab(student_head.shape[0])
    leading = student_hidden.shape[:-1]
    _check_teacher(teacher_indices, teacher_logprobs, leading, student_hidden.device)
    if teacher_indices.shape[-1] > student_head.shape[0]:
        raise ValueError(
            f"teacher_indices must hold at most V = {student_head.shape[0]} entries per token: got "
            f"{teacher_indices.shape[-1]}; the teacher's tokenizer must be the student's."
        )
    student = [_pairs.autocast(t) for t in (student_hidden, student_head, student_bias)]
    work = _pairs.work_dtype([*_pairs.present(student), teacher_logprobs])
    rows = _outputs.lower_rows(
        leading,
        student_hidden,
        work,
        labels=labels,
        mask=mask,
        ignore_index=ignore_index,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        normalizer=normalizer,
    )
    _output_checks.check_flag("ghost", ghost)
    if ghost and temperature != 1:
        raise ValueError(
            f"temperature must be 1 with ghost=True: got {temperature}; stored probabilities at "
            "another temperature say nothing of the rest."
        )
    student = _outputs.lower_projection(*student)
    lowered = (
        *student,
        teacher_indices.flatten(0, -2).long().contiguous(),
        teacher_logprobs.detach().flatten(0, -2).to(work).contiguous(),
        rows.labels,
        rows.row_weights,
        rows.coefficients,
        _outputs.wanted(*student),
        float(temperature),
        _outputs.lower_softcap("student_softcap", student_softcap),
        ghost,
        _outputs.lower_block_bytes(block_bytes),
        _outputs.engine_name(engine),
    )
    return lowered, rows


def _check_teacher(
    indices: Tensor, logprobs: Tensor, leading: torch.Size, device: torch.device
) -> None:
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"teacher_indices must be int64 or int32: got {indices.dtype}; pass those of "
            "torch.topk."
        )
    _validate.check_float("teacher_logprobs", logprobs)
    for name, tensor in (("teacher_indices", indices), ("teacher_logprobs", logprobs)):
        _validate.check_rank(name, tensor, (2, 3), "[B, T, k] or [N, k]")
        _output_checks.check_same_tokens(name, tensor, leading, device)
    if indices.shape != logprobs.shape or indices.shape[-1] < 1:
        raise ValueError(
            "teacher_indices and teacher_logprobs must both hold k >= 1 entries per token: got "
            f"{indices.shape[-1]} and {logprobs.shape[-1]}; pass both results of torch.topk."
        )
