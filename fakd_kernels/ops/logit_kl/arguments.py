"""What a call of `logit_kl` is given: checked, flattened and turned into coefficients."""

from ... import _output_checks, _outputs, _pairs, _validate
from ..._outputs import Rows


def lower(
    student_logits,
    teacher_logits,
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
    engine,
) -> tuple[tuple, Rows]:
    """The checked arguments of the registered op, and what its logs are made with."""
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        _validate.check_float(name, logits)
        _validate.check_rank(name, logits, (2, 3), "[B, T, V] or [N, V]")
    leading = student_logits.shape[:-1]
    _output_checks.check_same_tokens(
        "teacher_logits", teacher_logits, leading, student_logits.device
    )
    _output_checks.check_distance(distance, jsd_beta)
    rows = _outputs.lower_rows(
        leading,
        student_logits,
        _pairs.work_dtype([student_logits, teacher_logits]),
        labels=labels,
        mask=mask,
        ignore_index=ignore_index,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        normalizer=normalizer,
    )
    lowered = (
        _pairs.flat(student_logits),
        _pairs.flat(teacher_logits.detach()),
        rows.labels,
        rows.row_weights,
        rows.coefficients,
        _outputs.wanted(student_logits)[0],
        _output_checks.compared_vocab(student_logits.shape[-1], teacher_logits.shape[-1], vocab),
        float(temperature),
        _outputs.lower_softcap("student_softcap", student_softcap),
        _outputs.lower_softcap("teacher_softcap", teacher_softcap),
        distance,
        float(jsd_beta),
        _outputs.engine_name(engine),
    )
    return lowered, rows
