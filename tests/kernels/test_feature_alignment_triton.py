"""The Triton engine of feature_alignment in Triton's interpreter, on a CPU, against the oracle.

Run as `TRITON_INTERPRET=1 pytest tests/kernels/test_feature_alignment_triton.py`: Triton reads the
variable when it is first imported, so the whole process must have it.
"""

import math
import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1 in the environment of the process", allow_module_level=True
    )
pytest.importorskip("triton")

import fakd_kernels
from fakd_kernels import _triton
from fakd_kernels._scale import scale_
from fakd_kernels.ops.feature_alignment import dispatch, triton_kernel
from fakd_kernels.ops.feature_alignment.triton_kernel import direct
from tests.support.cases import CASES, CASES_BY_ID, FeatureCase, make_inputs
from tests.support.checks import check_feature_alignment

DTYPES = {
    "fp32": (torch.float32,) * 3,
    "bf16": (torch.bfloat16,) * 3,
    "fp16": (torch.float16,) * 3,
    "mixed": (torch.bfloat16, torch.float32, torch.float32),
}


def check(inputs, euclidean, route):
    check_feature_alignment(inputs, engine="triton", euclidean=euclidean, route=route)


def run(inputs, route):
    """Loss and gradients."""
    loss = inputs.call(route=route, engine="triton").loss
    return loss, *torch.autograd.grad(loss, list(inputs.leaves.values()))


def routes(case):
    return ("auto",) if case.projection == "none" else ("direct", "gram")


def rows():
    """Every case in fp32 and bf16; in the other dtypes those about numbers rather than shapes."""
    for case in CASES:
        is_about_numbers = case.fill != "randn" or case.id in ("aligned", "bias", "float-mask")
        for index, dtypes in enumerate(DTYPES):
            if dtypes in ("fp32", "bf16") or is_about_numbers:
                yield pytest.param(case, dtypes, index % 2, id=f"{case.id}-{dtypes}")


@pytest.mark.parametrize(("case", "dtypes", "first"), list(rows()))
def test_value_and_gradients(case, dtypes, first):
    """The routes take the two distances in turn, so over the dtypes each meets both."""
    for index, route in enumerate(routes(case), first):
        euclidean = ("squared", "distance")[index % 2]
        check(make_inputs(case, *DTYPES[dtypes]), euclidean, route)


@pytest.mark.parametrize("route", ["direct", "gram"])
@pytest.mark.parametrize("frozen", ["student", "projection", "bias"])
def test_frozen_parts(frozen, route):
    inputs = make_inputs(CASES_BY_ID["shared"], torch.bfloat16)
    for tensor in getattr(inputs, frozen):
        tensor.requires_grad_(False)
    check(inputs, "squared", route)


@pytest.mark.parametrize("route", ["direct", "gram"])
def test_only_the_bias_learns(route):
    inputs = make_inputs(CASES_BY_ID["bias"])
    for tensor in (*inputs.student, *inputs.projection):
        tensor.requires_grad_(False)
    check(inputs, "distance", route)


@pytest.mark.parametrize("route", ["direct", "gram"])
@pytest.mark.parametrize("case", ["bias", "near-3", "same-width", "bool-mask"])
def test_values_alone_without_gradients(case, route):
    inputs = make_inputs(CASES_BY_ID[case], torch.bfloat16)
    learned = inputs.call(route=route, engine="triton")
    with torch.no_grad(), _triton.record_launches() as launches:
        result = inputs.call(route=route, engine="triton")
    assert torch.equal(result.loss, learned.loss)
    names = [name for name, _ in launches]
    inner = 1 if route == "gram" and case not in ("same-width",) else 0  # W^T W serves the values
    assert names.count("outer_kernel") == inner


def test_a_mixed_fallback_counts_every_row_once():
    """Half of the rows are aligned: they leave the gram route, the others stay."""
    inputs = make_inputs(CASES_BY_ID["near-2"])
    with torch.no_grad():
        inputs.teacher[0][::2] = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
    for euclidean in ("squared", "distance"):
        check(inputs, euclidean, "gram")


def test_bias_that_cancels_the_projection():
    """p = W x + b is small although W x is not: the gram sums cancel, and r1 shows it."""
    inputs = make_inputs(FeatureCase("", "", ((40, 16, 64),), bias=True))
    with torch.no_grad():
        x = inputs.student[0]
        x.copy_(x[:1] + 1e-2 * x)
        inputs.bias[0].copy_(-(inputs.projection[0] @ x[0]))
    check(inputs, "squared", "gram")


def test_learned_weights():
    inputs = make_inputs(CASES_BY_ID["ragged"])
    weights = [torch.tensor(value, requires_grad=True) for value in (0.7, 1.3)]
    options = dict(cosine_weight=weights[0], euclidean_weight=weights[1])
    got = torch.autograd.grad(inputs.call(**options, engine="triton").loss, weights)
    expected = torch.autograd.grad(inputs.call_reference(**options)[0], weights)
    torch.testing.assert_close(got, expected)


def test_rows_of_weight_zero_are_not_read():
    for case in ("bool-mask", "float-mask-same"):
        for route in ("direct", "gram"):
            inputs = make_inputs(CASES_BY_ID[case])
            masked = inputs.mask[0] == 0
            expected = run(inputs, route)
            with torch.no_grad():
                inputs.student[0][masked] = float("nan")
                inputs.teacher[0][masked] = float("inf")
            got = run(inputs, route)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, on NaN
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_in_a_counted_row_reaches_the_loss(where):
    for case, route in (("same-width", "auto"), ("bias", "direct"), ("bias", "gram")):
        inputs = make_inputs(CASES_BY_ID[case])
        with torch.no_grad():
            getattr(inputs, where)[0][3, 2] = float("nan")
        assert math.isnan(inputs.call(route=route, engine="triton").loss.detach())


def test_equal_bits_every_run():
    inputs = make_inputs(CASES_BY_ID["shared"], torch.bfloat16)
    for route in ("direct", "gram"):
        first, second = (run(inputs, route) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_one_launch_for_all_pairs_without_a_projection():
    case = FeatureCase("", "", ((19, 48, 48), (64, 64, 64), (0, 48, 48), (3, 64, 64)), "none")
    inputs = make_inputs(case, torch.bfloat16)
    with _triton.record_launches() as launches:
        inputs.call(engine="triton")
    assert [name for name, _ in launches] == ["align_rows_kernel", "reduce_kernel"]


@pytest.mark.parametrize("route", ["direct", "gram"])
def test_launches_do_not_grow_with_the_number_of_pairs(route):
    counts = []
    for pairs in (1, 5):
        inputs = make_inputs(FeatureCase("", "", ((20, 16, 48),) * pairs))
        with _triton.record_launches() as launches:
            inputs.call(route=route, engine="triton")
        counts.append(len(launches))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("route", ["direct", "gram"])
def test_many_chunks_give_the_same_numbers(route, monkeypatch):
    """Chunks of 128 rows, several per pair; gradients of the projection accumulate over them."""
    monkeypatch.setattr(direct, "CHUNK_BYTES", 1)
    case = FeatureCase("", "", ((300, 24, 40), (150, 24, 40)), "shared", True, "bool", "near-2")
    inputs = make_inputs(case)
    with _triton.record_launches() as launches:
        check(inputs, "squared", route)
    assert [name for name, _ in launches].count("compact_kernel") == 5


def test_chunks_are_packed_up_to_the_budget(monkeypatch):
    monkeypatch.setattr(direct, "CHUNK_BYTES", 6 * 256 * 128)
    inputs = make_inputs(FeatureCase("", "", ((300, 16, 256), (70, 16, 256), (50, 16, 128))))
    with torch.no_grad(), _triton.record_launches() as launches:
        inputs.call(route="direct", engine="triton")
    # Pieces of 128, 128, 44 + 70 rows; then 50 rows, half as wide, find no room beside these.
    assert [name for name, _ in launches].count("compact_kernel") == 4


def test_describe_computes_nothing(monkeypatch):
    seen = []

    def fill(problem):
        with _triton.record_launches() as launches:
            seen.extend(triton_kernel.describe(problem))
        assert launches == []
        triton_kernel.fill(problem)

    monkeypatch.setitem(dispatch.FILL, "triton", fill)
    make_inputs(CASES_BY_ID["ragged"]).call(route="gram", engine="triton")
    assert any("3 pairs, U = T W" in line for line in seen)


@pytest.mark.parametrize("route", ["direct", "gram"])
def test_explain_lists_the_launches(route):
    inputs = make_inputs(CASES_BY_ID["ragged"])
    with _triton.record_launches() as launches:
        words = fakd_kernels.explain(
            "feature_alignment",
            inputs.student,
            inputs.teacher,
            inputs.projection,
            route=route,
            engine="triton",
        )
        assert launches == []
        inputs.call(route=route, engine="triton")
    lines = words.splitlines()
    assert lines[0] == "feature_alignment: served by the triton engine."
    assert all(line.startswith("  ") for line in lines[1:])
    listed = [line.split(": 1 launch of ")[1] for line in lines if ": 1 launch of " in line]
    assert listed == [name for name, _ in launches]


@pytest.mark.parametrize("factor", [1.0, -0.375])
def test_scale_in_one_launch(factor):
    sizes = (1, 4096, 4097, 0, 9001)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(size, generator=generator).to(dtype)
        for size in sizes
        for dtype in (torch.float32, torch.bfloat16)
    ]
    expected = [(tensor.float() * factor).to(tensor.dtype) for tensor in tensors]
    with _triton.record_launches() as launches:
        scale_(tensors, torch.tensor(factor))
    assert [name for name, _ in launches] == ["scale_kernel"]
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)


@pytest.mark.parametrize("route", ["direct", "gram"])
def test_neighbours_of_a_gradient_are_not_touched(route, monkeypatch):
    """The gradient buffer lies between sentinels, as a slice of a larger tensor."""
    inputs = make_inputs(FeatureCase("", "", ((13, 24, 40),)))
    margin = 64
    whole = torch.full((13 * 24 + 2 * margin,), 7.0)

    def fill(problem):
        (pair,) = problem.pairs
        inside = whole[margin:-margin].view(13, 24)
        triton_kernel.fill(replace(problem, pairs=[replace(pair, grad_student=inside)]))

    monkeypatch.setitem(dispatch.FILL, "triton", fill)
    inputs.call(route=route, engine="triton")
    assert (whole[:margin] == 7).all()
    assert (whole[-margin:] == 7).all()
    assert (whole[margin:-margin] != 7).all()
