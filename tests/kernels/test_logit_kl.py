"""logit_kl on the reference and C++ engines, against the float64 formula."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fakd_kernels import explain, linear_kl, logit_kl
from fakd_kernels.ops.logit_kl.arguments import lower
from tests.support.output_cases import (
    DENSE_CASES,
    DISTANCES,
    DTYPES,
    OutputCase,
    make_linear,
    make_logits,
)
from tests.support.output_checks import (
    ENGINES,
    check,
    check_entries_of_probability_0,
    check_learned_weights,
    results,
)

CASES = {case.id: case for case in DENSE_CASES}
ALL = DISTANCES["f32"]
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.mark.parametrize("case", DENSE_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize(
    ("engine", "dtypes"), [(engine, dtypes) for engine in ENGINES for dtypes in DTYPES]
)
def test_value_and_gradients(case, engine, dtypes):
    inputs = make_logits(case, dtypes)
    for distance in DISTANCES[dtypes]:
        check(inputs, engine, distance=distance)


@pytest.mark.parametrize("vocab", [3, 8, 16, 17])
@pytest.mark.parametrize("case", DENSE_CASES, ids=lambda case: case.id)
def test_rows_of_few_classes(case, vocab):
    """The C++ engine takes these several at a time."""
    sizes = (vocab, vocab - 1) if "prefix" in case.id else (vocab, vocab)
    narrow = dataclasses.replace(case, id=f"{case.id}-{vocab}", vocab=sizes)
    for dtypes in DTYPES:
        check(make_logits(narrow, dtypes), "cpu", distance="kl")


def test_formula_by_hand():
    student, teacher = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([[1.0, 1], [0, 0.5]])
    s, t = student.softmax(-1), teacher.softmax(-1)
    middle = 0.3 * t + 0.7 * s
    want = {
        "kl": (t * (t / s).log()).sum(-1),
        "reverse_kl": (s * (s / t).log()).sum(-1),
        "jsd": (0.3 * t * (t / middle).log() + 0.7 * s * (s / middle).log()).sum(-1),
    }
    for distance in ALL:
        got = logit_kl(student, teacher, distance=distance, jsd_beta=0.3)
        torch.testing.assert_close(got.per_token, want[distance])
        torch.testing.assert_close(got.loss, want[distance].mean())


@pytest.mark.parametrize("engine", ENGINES)
def test_replaces_what_the_docstring_says(engine):
    inputs = make_logits(CASES["labels"])
    student, teacher = (
        inputs.tensors[f"{side}_logits"].flatten(0, 1) for side in ("student", "teacher")
    )
    labels = inputs.tensors["labels"].flatten()
    rows = labels != -100
    ce = F.cross_entropy(student, labels)
    kl = F.kl_div(
        (student / 3).log_softmax(-1)[rows], (teacher / 3).softmax(-1)[rows], reduction="batchmean"
    )
    got = inputs.call(engine=engine, temperature=3.0, kl_weight=0.4, ce_weight=0.6)
    want = 0.4 * 3**2 * kl + 0.6 * ce
    torch.testing.assert_close(got.loss, want)
    leaf = inputs.tensors["student_logits"]
    for a, b in zip(
        torch.autograd.grad(got.loss, leaf), torch.autograd.grad(want, leaf), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("distance", ALL)
def test_gradcheck_of_the_reference_engine(distance):
    case = OutputCase("", "", (2, 3), (5, 7), mask="float", labels="some")
    inputs = make_logits(case).to(torch.float64)
    options = {"ce_weight": 0.3, "temperature": 1.5, "student_softcap": 3.0, "vocab": "prefix"}

    def loss(*_):
        return inputs.call(engine="reference", distance=distance, **options).loss

    assert torch.autograd.gradcheck(loss, list(inputs.leaves.values()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1, 2, 31, 1000])
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(engine, size):
    case = OutputCase("", "", (50,), (size, size), spread=10.0, distance_to=0.0)
    inputs = make_logits(case)
    for distance in ALL:
        got = results(inputs, engine=engine, distance=distance, temperature=2.0)
        assert abs(got["loss"].item()) < 1e-6
        assert got["student_logits"].abs().max() < 1e-6
        assert distance != "kl" or not got["student_logits"].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_is_linear_kl_with_given_logits(engine):
    linear = make_linear(CASES["softcap"])
    t = linear.tensors
    student, teacher = (
        F.linear(t[f"{side}_hidden"], t[f"{side}_head"], t[f"{side}_bias"]).detach()
        for side in ("student", "teacher")
    )
    rows = {"labels": t["labels"], "mask": t["mask"]}
    got = logit_kl(student, teacher, **rows, **linear.options, engine=engine)
    want = linear_kl(**t, **linear.options, engine=engine)
    torch.testing.assert_close(got.per_token, want.per_token)


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("engine", ENGINES)
def test_entries_masked_on_both_sides_are_as_if_they_were_not_there(engine, distance):
    is_away = torch.arange(61) % 4 == 1
    check_entries_of_probability_0(
        lambda: make_logits(CASES["labels"]), is_away, engine, distance=distance
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_what_one_side_excludes(engine):
    """KL is infinite where the divisor's side excludes an entry; its gradient is not."""
    student = torch.tensor([[0.5, -torch.inf, 1.0], [0.1, 0.2, 0.3]], requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0, 0.0], [0.1, -torch.inf, 0.0]])
    got = logit_kl(student, teacher, engine=engine)
    assert got.per_token[0] == torch.inf
    assert got.per_token[1].isfinite()
    (grad,) = torch.autograd.grad(got.loss, student)
    torch.testing.assert_close(grad, (student.softmax(-1) - teacher.softmax(-1)) / 2)
    jsd = logit_kl(student, teacher, distance="jsd", engine=engine)
    assert jsd.per_token.isfinite().all()
    assert torch.autograd.grad(jsd.loss, student)[0].isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_that_do_not_count_may_hold_anything(engine):
    inputs, hostile = make_logits(CASES["float"]), make_logits(CASES["float"])
    is_masked = hostile.tensors["mask"] == 0
    away = is_masked | (hostile.tensors["labels"] == -100)
    with torch.no_grad():
        for name in ("student_logits", "teacher_logits"):
            hostile.tensors[name].masked_fill_(away[..., None], torch.nan)
        hostile.tensors["labels"].masked_fill_(is_masked, 10**6)
    want = results(inputs, engine=engine)
    for name, value in results(hostile, engine=engine).items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("side", ["student_logits", "teacher_logits"])
def test_nan_reaches_the_loss(engine, side):
    inputs = make_logits(CASES["plain"])
    with torch.no_grad():
        inputs.tensors[side][1, 7, 3] = torch.nan
    result = inputs.call(engine=engine)
    assert result.loss.isnan()
    assert result.per_token.isnan().sum() == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_jsd_of_entries_that_one_side_excludes(engine, beta):
    """What is impossible to one side is half of the mixture to the other, not nothing."""
    student = torch.tensor([[0.5, -torch.inf, 1], [1, 2, 0], [0.5, -torch.inf, 1]])
    teacher = torch.tensor([[1, 2, 0], [0.5, -torch.inf, 1], [-torch.inf, 2, 0]])
    s, t = (x.double().softmax(-1) for x in (student, teacher))
    middle = beta * t + (1 - beta) * s
    want = [torch.xlogy(p, p / middle) for p in (t, s)]
    want = beta * want[0] + (1 - beta) * want[1]
    student.requires_grad_()
    got = logit_kl(student, teacher, distance="jsd", jsd_beta=beta, engine=engine)
    torch.testing.assert_close(got.per_token, want.sum(-1).float())
    (grad,) = torch.autograd.grad(got.loss, student)
    slope = (1 - beta) * (s / middle).log().nan_to_num(neginf=0.0)
    want_grad = s * (slope - (s * slope).sum(-1, keepdim=True)) / 3
    torch.testing.assert_close(grad, want_grad.float())


@pytest.mark.parametrize("engine", ENGINES)
def test_only_what_is_trained_costs_a_gradient(engine):
    inputs = make_logits(CASES["plain"])
    inputs.tensors["teacher_logits"].requires_grad_()
    inputs.call(engine=engine).loss.backward()
    assert inputs.tensors["teacher_logits"].grad is None
    with torch.no_grad():
        *_, grad = torch.ops.fakd.logit_kl(*inputs.call_lowered(lower, engine=engine))
        assert grad.numel() == 0
    inputs.tensors["student_logits"].requires_grad_(False)
    assert not inputs.call(engine=engine).loss.requires_grad


@pytest.mark.parametrize("engine", ENGINES)
def test_learned_weights_receive_their_gradients(engine):
    check_learned_weights(make_logits(CASES["warm"]), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_classifier(engine):
    """Few classes, many rows."""
    student = torch.randn(4096, 8, requires_grad=True)
    teacher, labels = torch.randn(4096, 8), torch.randint(8, (4096,))
    got = logit_kl(student, teacher, labels=labels, ce_weight=0.5, engine=engine).loss
    want = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    want = want + 0.5 * F.cross_entropy(student, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, student), torch.autograd.grad(want, student)
    )


def test_explain_says_who_serves():
    text = explain("logit_kl", torch.randn(3, 4, 7), torch.randn(3, 4, 7))
    assert "served by the cpu engine" in text
    assert "12 tokens, vocabulary of 7" in text
