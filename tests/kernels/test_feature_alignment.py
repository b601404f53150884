"""feature_alignment on the reference and C++ engines: numbers, against the float64 formula."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from fakd_kernels import feature_alignment
from fakd_kernels.ops.feature_alignment import feature_alignment_reference
from tests.support.cases import CASES, CASES_BY_ID, FeatureCase, make_inputs
from tests.support.checks import check_feature_alignment

ENGINES = ("reference", "cpu")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# student, teacher, projection
DTYPES = {
    "f32": (F32, F32, F32),
    "bf16": (BF16, BF16, BF16),
    "f16": (F16, F16, F16),
    "bf16-f32": (BF16, F32, F32),
    "f32-f16": (F32, F16, F32),
}
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def case_ids(case: FeatureCase) -> str:
    return case.id


@pytest.mark.parametrize("case", CASES, ids=case_ids)
@pytest.mark.parametrize(
    ("engine", "dtypes"),
    [(engine, dtypes) for engine in ENGINES for dtypes in DTYPES],
)
def test_value_and_gradients(case, engine, dtypes):
    inputs = make_inputs(case, *DTYPES[dtypes])
    routes = ("auto",) if case.projection == "none" else ("direct", "gram")
    for euclidean in ("squared", "distance"):
        for route in routes:
            check_feature_alignment(inputs, engine=engine, euclidean=euclidean, route=route)


def test_formula_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    loss, cosine, euclidean = feature_alignment_reference(
        [student], [teacher], [None], [None], [None], pair_weights=[1.0]
    )
    assert cosine.tolist() == pytest.approx([1 - 8 / (5 * 2)])
    assert euclidean.tolist() == pytest.approx([(9 + 4) / 2])
    assert loss.item() == pytest.approx(0.2 + 6.5)


@pytest.mark.parametrize("euclidean", ["squared", "distance"])
def test_gradcheck_of_the_reference_engine(euclidean):
    case = FeatureCase("", "", ((5, 3, 4), (6, 4, 4)), bias=True, mask="float")
    inputs = make_inputs(case).double()
    leaves = list(inputs.leaves.values())

    def loss(*_):
        return inputs.call(engine="reference", euclidean=euclidean).loss

    assert torch.autograd.gradcheck(loss, leaves)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shapes(data):
    width = st.integers(1, 70)
    pairs = tuple(
        data.draw(st.tuples(st.integers(8, 90), width, width))
        for _ in range(data.draw(st.integers(1, 4)))
    )
    case = FeatureCase(
        "",
        "",
        pairs,
        bias=data.draw(st.booleans()),
        mask=data.draw(st.sampled_from(["none", "bool"])),
    )
    inputs = make_inputs(case, seed=data.draw(st.integers(0, 10)))
    result = inputs.call(engine="cpu", route=data.draw(st.sampled_from(["direct", "gram"])))
    truth = inputs.double().call_reference()[0]
    assert result.loss.item() == pytest.approx(truth.item(), rel=2e-5)


@pytest.mark.parametrize("route", ["direct", "gram"])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_rows_cut_between_threads(route, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        case = FeatureCase("", "", ((1500, 24, 40), (700, 40, 48)), bias=True, mask="bool")
        check_feature_alignment(make_inputs(case), engine="cpu", route=route)
    finally:
        torch.set_num_threads(before)


def test_weights_too_large_to_sum_per_thread():
    """Then pairs go one after the other, and the products use the cores."""
    inputs = make_inputs(FeatureCase("", "", ((256, 4160, 4096),)))
    got, want = inputs.call(engine="cpu"), inputs.call(engine="reference")
    leaves = list(inputs.leaves.values())
    for a, b in zip(
        torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, leaves), strict=True
    ):
        assert torch.linalg.vector_norm(a - b) <= 1e-5 * torch.linalg.vector_norm(b)


def test_offsets_past_32_bits():
    """Rows of a view that lie 2^31 elements apart; the memory between is never touched."""
    torch.use_deterministic_algorithms(False)
    far = torch.empty(2**31 + 64, dtype=BF16)
    student = far.as_strided((2, 48), (2**31, 1))
    values = torch.randn(2, 48)
    student.copy_(values)
    teacher = torch.randn(2, 48)
    got = feature_alignment(student, teacher, engine="cpu")
    want = feature_alignment(student.clone(), teacher, engine="cpu")
    assert got.loss == want.loss
    assert got.loss > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("route", ["direct", "gram"])
@pytest.mark.parametrize("trained", ["student", "projection", "bias"])
def test_only_what_is_trained_gets_a_gradient(engine, route, trained):
    case = FeatureCase("", "", ((40, 24, 56),), bias=True)
    inputs = make_inputs(case)
    for name, leaf in inputs.leaves.items():
        leaf.requires_grad_(name.startswith(trained))
    check_feature_alignment(inputs, engine=engine, route=route)
    result = inputs.call(engine=engine, route=route)
    result.loss.backward()
    for name, leaf in inputs.leaves.items():
        assert (leaf.grad is not None) == name.startswith(trained)


def test_no_gradient_buffers_under_no_grad(monkeypatch):
    from fakd_kernels.ops.feature_alignment import dispatch

    seen = []
    fill = dispatch.FILL["cpu"]
    monkeypatch.setitem(dispatch.FILL, "cpu", lambda problem: (seen.append(problem), fill(problem)))
    inputs = make_inputs(CASES_BY_ID["ragged"])
    with torch.no_grad():
        evaluated = inputs.call(engine="cpu").loss
    trained = inputs.call(engine="cpu").loss
    assert not evaluated.requires_grad
    assert evaluated == trained.detach()
    assert all(pair.grad_student is None for pair in seen[0].pairs)
    assert seen[0].grad_projections == [None] * 3
    assert all(pair.grad_student is not None for pair in seen[1].pairs)


def test_teacher_never_gets_a_gradient():
    student = torch.randn(6, 8, requires_grad=True)
    teacher = torch.randn(6, 8, requires_grad=True)
    feature_alignment(student, teacher).loss.backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("engine", ENGINES)
def test_learned_weights_receive_their_gradient(engine):
    inputs = make_inputs(CASES_BY_ID["ragged"])
    weights = [torch.tensor(value, requires_grad=True) for value in (0.3, 1.7)]
    result = inputs.call(engine=engine, cosine_weight=weights[0], euclidean_weight=weights[1])
    result.loss.backward()
    assert weights[0].grad.item() == pytest.approx(result.cosine.mean().item(), rel=1e-6)
    assert weights[1].grad.item() == pytest.approx(result.euclidean.mean().item(), rel=1e-6)


def test_shared_projection_gets_the_sum():
    student = torch.randn(2, 9, 6)
    teacher = torch.randn(2, 9, 10)
    weight = torch.randn(10, 6, requires_grad=True)
    both = feature_alignment(list(student), list(teacher), [weight, weight]).loss
    apart = [feature_alignment(s, t, weight).loss for s, t in zip(student, teacher, strict=True)]
    (got,) = torch.autograd.grad(both, weight)
    (want,) = torch.autograd.grad(sum(apart) / 2, weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("projected", [False, True])
def test_masked_rows_are_not_read(engine, projected):
    student, teacher = torch.randn(3, 7, 16), torch.randn(3, 7, 16)
    weight = torch.randn(16, 16, requires_grad=True) if projected else None
    mask = torch.rand(3, 7) > 0.5
    hostile = torch.where(mask[..., None], student, torch.nan).requires_grad_()
    clean = torch.where(mask[..., None], student, 0).requires_grad_()
    wild = torch.where(mask[..., None], teacher, torch.inf)
    leaves = [weight] if projected else []
    got = feature_alignment(hostile, wild, weight, mask=mask, engine=engine)
    want = feature_alignment(clean, teacher, weight, mask=mask, engine=engine)
    assert got.loss == want.loss
    for a, b in zip(
        torch.autograd.grad(got.loss, [hostile, *leaves]),
        torch.autograd.grad(want.loss, [clean, *leaves]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_reach_the_loss(engine, projected, value):
    student, teacher = torch.randn(7, 16), torch.randn(7, 24 if projected else 16)
    student[3, 5] = value
    weight = torch.randn(24, 16) if projected else None
    result = feature_alignment(student.requires_grad_(), teacher, weight, engine=engine)
    assert not torch.isfinite(result.loss)
    result.loss.backward()
    assert not torch.isfinite(student.grad[3]).any()
    assert torch.isfinite(student.grad[2]).all() or projected


@pytest.mark.parametrize("engine", ENGINES)
def test_cosine_of_rows_whose_squares_overflow(engine):
    student, teacher = torch.randn(5, 32) * 1e25, torch.randn(5, 32)
    got = feature_alignment(student, teacher, euclidean_weight=0.0, engine=engine)
    want = 1 - F.cosine_similarity(student.double(), teacher.double()).mean()
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_float16_gradients_survive_until_the_loss_scale_reaches_them():
    student = torch.randn(512, 64, dtype=F16, requires_grad=True)
    teacher = torch.randn(512, 64, dtype=F16)
    result = feature_alignment(student, teacher, normalizer=2.0**22)
    (small,) = torch.autograd.grad(result.loss, student, retain_graph=True)
    (scaled,) = torch.autograd.grad(result.loss * 2.0**16, student)
    truth = student.detach().double().requires_grad_()
    p, t = truth, teacher.double()
    loss = ((1 - F.cosine_similarity(p, t)) + (p - t).square().mean(-1)).sum() / 2.0**22
    (want,) = torch.autograd.grad(loss * 2.0**16, truth)
    assert torch.linalg.vector_norm(scaled - want) < 1e-3 * torch.linalg.vector_norm(want)
    assert torch.linalg.vector_norm(small * 2.0**16 - want) > 0.5 * torch.linalg.vector_norm(want)


def test_autocast_casts_what_linear_would():
    student = torch.randn(40, 24, requires_grad=True)
    teacher = torch.randn(40, 56)
    weight = torch.randn(56, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=BF16):
        got = feature_alignment([student, teacher], [teacher, teacher], [weight, None]).loss
    cast = student.to(BF16), weight.to(BF16)
    want = feature_alignment([cast[0], teacher], [teacher, teacher], [cast[1], None]).loss
    assert got == want
    leaves = [student, weight]
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        assert a.dtype == F32
        assert torch.equal(a, b)


def test_backward_twice_over_a_retained_graph():
    student = torch.randn(9, 8, requires_grad=True)
    result = feature_alignment(student, torch.randn(9, 8))
    (result.loss * 3).backward(retain_graph=True)
    once = student.grad.clone()
    (result.loss * 3).backward(retain_graph=True)
    torch.testing.assert_close(student.grad, 2 * once)
    (alone,) = torch.autograd.grad(result.loss * 3, student)
    assert torch.equal(alone, once)


def test_second_derivatives_are_refused():
    student = torch.randn(9, 8, requires_grad=True)
    loss = feature_alignment(student, torch.randn(9, 8)).loss
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        grad.sum().backward()


def test_result_is_a_detached_pytree():
    inputs = make_inputs(CASES_BY_ID["ragged"])
    result = inputs.call()
    assert result.loss.requires_grad
    assert not result.cosine.requires_grad
    assert not result.euclidean.requires_grad
    leaves, spec = pytree.tree_flatten(result)
    assert len(leaves) == 3
    assert pytree.tree_unflatten(leaves, spec).loss is result.loss


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("route", ["direct", "gram"])
def test_results_are_bitwise_repeatable(engine, route):
    inputs = make_inputs(FeatureCase("", "", ((600, 48, 96), (300, 24, 64)), mask="float"))
    leaves = list(inputs.leaves.values())
    runs = []
    for _ in range(3):
        loss = inputs.call(engine=engine, route=route).loss
        runs.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_gradient_accumulation_with_a_common_normalizer():
    student, teacher = torch.randn(2, 12, 8), torch.randn(2, 12, 8)
    mask = torch.rand(2, 12) > 0.4
    whole = student.clone().requires_grad_()
    feature_alignment(whole, teacher, mask=mask).loss.backward()
    halves = student.clone().requires_grad_()
    count = mask.sum().float()
    for half in range(2):
        feature_alignment(
            halves[half], teacher[half], mask=mask[half], normalizer=count
        ).loss.backward()
    torch.testing.assert_close(halves.grad, whole.grad)
