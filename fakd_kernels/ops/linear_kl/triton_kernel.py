"""The Triton engine: `_triton_rows.rows_kernel` between products, see `blocks`.

Triton is imported on first use, so that the package imports without it.
"""

from ... import _output_products as products
from .blocks import blocks_between_products, rows_of_blocks
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums, the values of every token and every wanted gradient."""
    from ... import _triton_outputs as outputs

    terms, student, teacher = problem.terms, problem.student, problem.teacher
    vocab, blocks = len(student.head), rows_of_blocks(problem)
    with outputs.on_device(student.hidden.device):
        programs = [outputs.count_programs(rows.stop - rows.start, vocab) for rows in blocks]
        slots = outputs.Slots(sum(programs), problem.sums)
        for block in blocks_between_products(problem, blocks):
            outputs.launch_rows(
                outputs.Logits(block.student, student.bias, terms.student_softcap),
                outputs.Logits(block.teacher, teacher.bias, terms.teacher_softcap),
                block.grad,
                terms,
                block.rows,
                problem.per_token,
                slots,
                padded=products.padded(vocab),
            )
        slots.reduce()
