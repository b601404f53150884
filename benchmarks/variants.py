"""The variants of every Triton kernel that the launchers would choose for real sizes.

By the functions that the launchers themselves call; a dry compile needs no card and no tensors.
"""

import itertools
from collections.abc import Iterator

import torch

from fakd_kernels import _triton_outputs as outputs
from fakd_kernels._triton import Variant
from fakd_kernels._triton_logits import RowForm
from fakd_kernels.ops.attention_kl.problem import Pair, Side
from fakd_kernels.ops.attention_kl.triton_kernel import variants as attention
from fakd_kernels.ops.attention_kl.triton_kernel.variants import Form
from fakd_kernels.ops.attention_map_kl import problem as maps
from fakd_kernels.ops.attention_map_kl.triton_kernel.variants import Group, maps_variant
from fakd_kernels.ops.feature_alignment.triton_kernel import variants as features
from fakd_kernels.ops.topk_kl.triton_kernel import launch as top
from fakd_kernels.ops.topk_kl.triton_kernel.kernel import TopForm

LINES = 16  # layer pairs of a launch
Named = Iterator[tuple[str, Variant]]


def row_variants(dtypes: tuple, widths: tuple, is_squared: bool, is_aligned: bool) -> Named:
    """The row kernel of feature_alignment, on students and on rows of P in float32."""
    x, t, w = dtypes
    whole = torch.float32
    grad_x = whole if x == torch.float16 else x
    grad_p = torch.bfloat16 if {x, w} == {torch.bfloat16} else whole
    for width in widths:
        options = width, is_squared, LINES, is_aligned
        yield f"align-{width}", features.align_variant(x, t, grad_x, *options)
        yield f"rows-{width}", features.align_variant(whole, t, grad_p, *options)


def attention_form(
    dtypes: tuple, widths: tuple[int, int], has_weights: bool = False, softcap=None
) -> Form:
    student, teacher = (
        Side(*[torch.empty(1, 2, 128, width, dtype=dtype)] * 2, 1.0, softcap)
        for dtype, width in zip(dtypes, widths, strict=True)
    )
    weights = torch.ones(1, 128) if has_weights else None
    pair = Pair(student, teacher, weights, True, None, [0, 1], None, None, torch.zeros(2))
    return Form.of(pair, is_tf32_allowed=False)


def match_variants(form: Form, distance: str, capability: int) -> Named:
    """The kernels of attention_kl where heads are matched."""
    yield "forward", attention.forward_variant(form, distance, capability, LINES)
    for name in ("dQ", "dK"):
        options = name == "dQ", False, capability, LINES
        yield name, attention.gradient_variant(form, distance, *options)


def mean_variants(form: Form, distance: str, capability: int) -> Named:
    """Those where heads are averaged."""
    sides = {form.teacher: "teacher's sums", form.student: "student's sums"}  # one where alike
    for side, name in sides.items():
        yield name, attention.sums_variant(side, form.has_weights, capability, LINES)
    yield "map", attention.map_variant(form, distance, capability, LINES)
    yield "center", attention.center_variant(form, distance, capability, LINES)
    for name in ("dQ", "dK"):
        options = name == "dQ", True, capability, LINES
        yield name, attention.gradient_variant(form, distance, *options)


def map_variant(
    inputs: str,
    heads: str,
    distance: str,
    tokens: int,
    dtypes: tuple,
    count: int = 12,
    has_grad: bool = True,
) -> Variant:
    """The kernel of attention_map_kl, of `count` heads; dtypes of student, teacher and gradient."""
    shape = 1, count, tokens, tokens
    student, teacher, grad = (torch.empty(shape, dtype=d, device="meta") for d in dtypes)
    teacher_heads = None if heads == "mean" else list(range(count))
    sums = torch.zeros(1 if heads == "mean" else count)
    pair = maps.Pair(
        student, teacher, None, True, None, teacher_heads, grad if has_grad else None, sums
    )
    problem = maps.Problem([pair], torch.ones(1), sums, inputs == "scores", 1.0, distance)
    return maps_variant(Group.of(problem, pair), distance, LINES)


def row_form(distance: str, vocab: int, is_full: bool, **changes) -> RowForm:
    """Rows of logits with everything a caller may ask for, or with nothing but a gradient."""
    flags = dict.fromkeys(RowForm._fields[2:], is_full)
    flags |= {"is_wide": outputs.choose_tile(vocab).is_wide, "is_aligned": True}
    flags |= {"is_interpreted": False, "wants_grad": True}
    return RowForm(distance=distance, **flags | changes)


def of_every_op(capability: int) -> Iterator[tuple[str, str, Variant]]:
    """Op, kernel and variant, in bfloat16, of sizes that large models have."""
    half, whole = torch.bfloat16, torch.float32
    dtypes = (half,) * 3
    for name, variant in row_variants(dtypes, (768, 4096), True, True):
        yield "feature_alignment", name, variant
    form = attention_form((half, half), (64, 128))
    for name, variant in match_variants(form, "kl", capability):
        yield "attention_kl", name, variant
    for name, variant in mean_variants(form, "kl", capability):
        yield "attention_kl", f"{name}, averaged heads", variant
    for inputs, heads in itertools.product(maps.INPUTS, ("match", "mean")):
        variant = map_variant(inputs, heads, "kl", 1024, dtypes)
        yield "attention_map_kl", inputs + ", averaged heads" * (heads == "mean"), variant
    rows = row_form("kl", 128256, is_full=False)
    yield "logit_kl", "rows", outputs.rows_variant(rows, 128256, *[half] * 5)
    of_linear = outputs.rows_variant(rows, 128256, whole, whole, half, half, half)
    yield "linear_kl", "rows between products", of_linear
    stored = TopForm(True, True, *[False] * 4, True, False)
    yield "topk_kl", "rows, ghost", top.rows_variant(stored, 128256, 64, half, half)
