"""The Triton engine: one launch for all tokens, and one that adds their values up.

The kernel is `_triton_rows.rows_kernel`. Triton is imported on first use, so that the package
imports without it.
"""

from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums, the values of every token and the gradient, if wanted."""
    from ... import _triton_outputs as outputs

    terms, (tokens, vocab) = problem.terms, problem.student.shape
    with outputs.on_device(terms.coefficients.device):
        slots = outputs.Slots(outputs.count_programs(tokens, vocab), problem.sums)
        outputs.launch_rows(
            outputs.Logits(problem.student, None, terms.student_softcap),
            outputs.Logits(problem.teacher, None, terms.teacher_softcap),
            problem.grad,
            terms,
            slice(0, tokens),
            problem.per_token,
            slots,
        )
        slots.reduce()
