"""What a call of `linear_kl` is given: checked, flattened and turned into coefficients."""

from ... import _output_checks, _outputs, _pairs
from ..._outputs import Rows


def lower(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    student_bias,
    teacher_bias,
    labels,
    mask,
    temperature,
    distance,
    jsd_beta,
    kl_weight,
    ce_weight,
    ignore_index,
    scale_by_temperature_squared,
    student_softcap,
    teacher_softcap,
    vocab,
    normalizer,
    block_bytes,
    engine,
) -> tuple[tuple, Rows]:
    """The checked arguments of the registered op, and what its logs are made with."""
    _output_checks.check_projection("student", student_hidden, student_head, student_bias)
    _output_checks.check_projection("teacher", teacher_hidden, teacher_head, teacher_bias)
    leading = student_hidden.shape[:-1]
    _output_checks.check_same_tokens(
        "teacher_hidden", teacher_hidden, leading, student_hidden.device
    )
    _output_checks.check_distance(distance, jsd_beta)
    compared = _output_checks.compared_vocab(student_head.shape[0], teacher_head.shape[0], vocab)
    student = [_pairs.autocast(t) for t in (student_hidden, student_head, student_bias)]
    teacher = [
        _pairs.autocast(t if t is None else t.detach())
        for t in (teacher_hidden, teacher_head, teacher_bias)
    ]
    rows = _outputs.lower_rows(
        leading,
        student_hidden,
        _pairs.work_dtype(_pairs.present(student, teacher)),
        labels=labels,
        mask=mask,
        ignore_index=ignore_index,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        normalizer=normalizer,
    )
    student, teacher = _outputs.lower_projection(*student), _outputs.lower_projection(*teacher)
    lowered = (
        *student,
        *teacher,
        rows.labels,
        rows.row_weights,
        rows.coefficients,
        _outputs.wanted(*student),
        compared,
        float(temperature),
        _outputs.lower_softcap("student_softcap", student_softcap),
        _outputs.lower_softcap("teacher_softcap", teacher_softcap),
        distance,
        float(jsd_beta),
        _outputs.lower_block_bytes(block_bytes),
        _outputs.engine_name(engine),
    )
    return lowered, rows
