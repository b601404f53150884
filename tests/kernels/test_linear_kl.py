"""linear_kl on the reference and C++ engines, against the float64 formula."""

import pytest
import torch
import torch.nn.functional as F

from fakd_kernels import explain, linear_kl, logit_kl
from fakd_kernels.ops.linear_kl import linear_kl_reference
from fakd_kernels.ops.linear_kl.arguments import lower
from tests.support.output_cases import (
    BF16,
    DISTANCES,
    DTYPES,
    LINEAR_CASES,
    OutputCase,
    make_linear,
)
from tests.support.output_checks import ENGINES, check, check_learned_weights, results

CASES = {case.id: case for case in LINEAR_CASES}
ALL = DISTANCES["f32"]
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize(
    ("engine", "dtypes"), [(engine, dtypes) for engine in ENGINES for dtypes in DTYPES]
)
def test_value_and_gradients(case, engine, dtypes):
    inputs = make_linear(case, dtypes)
    for distance in DISTANCES[dtypes]:
        check(inputs, engine, distance=distance)


@pytest.mark.parametrize("engine", ENGINES)
def test_replaces_what_the_docstring_says(engine):
    inputs = make_linear(CASES["biases"])
    t = inputs.tensors
    student = F.linear(t["student_hidden"], t["student_head"], t["student_bias"]).flatten(0, 1)
    teacher = F.linear(t["teacher_hidden"], t["teacher_head"], t["teacher_bias"]).flatten(0, 1)
    ce = F.cross_entropy(student, t["labels"].flatten())
    kl = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    got = inputs.call(engine=engine, temperature=2.0, kl_weight=0.4, ce_weight=0.6)
    torch.testing.assert_close(got.loss, 0.4 * 2**2 * kl + 0.6 * ce)
    torch.testing.assert_close(got.kl, kl.detach())
    torch.testing.assert_close(got.ce, ce.detach())
    torch.testing.assert_close(got.per_token.mean(), got.loss.detach())
    assert got.tokens == student.shape[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_states_of_width_0_say_that_all_is_likely_alike(engine):
    student = make_linear(CASES["plain"]).tensors
    hidden, head = student["student_hidden"], student["student_head"]
    got = linear_kl(hidden, head, hidden[..., :0], head[:, :0], engine=engine)
    want = logit_kl(hidden @ head.T, torch.zeros(*hidden.shape[:-1], len(head)), engine=engine)
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize("engine", ENGINES)
def test_cross_entropy_is_that_of_torch(engine):
    inputs = make_linear(CASES["labels"])
    hidden, head = inputs.leaves.values()
    logits = (hidden @ head.T).flatten(0, 1)
    want = F.cross_entropy(logits, inputs.tensors["labels"].flatten(), ignore_index=-100)
    got = inputs.call(engine=engine, kl_weight=0.0, ce_weight=1.0)
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(got.ce, want.detach())
    for a, b in zip(
        torch.autograd.grad(got.loss, (hidden, head)),
        torch.autograd.grad(want, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("distance", ALL)
def test_gradcheck_of_the_reference_engine(distance):
    case = OutputCase("", "", (2, 3), (5, 7), (3, 2), mask="float", labels="some", has_biases=True)
    inputs = make_linear(case).to(torch.float64)
    options = {"ce_weight": 0.3, "temperature": 1.5, "student_softcap": 3.0, "vocab": "prefix"}

    def loss(*_):
        return inputs.call(engine="reference", distance=distance, **options).loss

    assert torch.autograd.gradcheck(loss, list(inputs.leaves.values()))


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(engine, dtypes):
    """Tied, capped and warm, as a model distilled into its own copy."""
    case = OutputCase("", "", vocab=(331, 331), widths=(24, 24), spread=10.0, distance_to=0.0)
    inputs = make_linear(case, dtypes)
    for distance in ALL:
        options = {"student_softcap": 30.0, "teacher_softcap": 30.0, "temperature": 2.0}
        got = results(inputs, engine=engine, distance=distance, **options)
        assert abs(got["loss"].item()) < 1e-6
        assert all(got[name].abs().max() < 1e-6 for name in inputs.leaves)
        if distance == "kl":
            assert not any(got[name].any() for name in inputs.leaves)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_not_those_of_bfloat16_logits(engine):
    """Logits rounded to bfloat16 change the loss little and its gradient by several percent."""
    case = OutputCase("", "", (256,), (1024, 1024), (64, 96), spread=4.0, distance_to=None)
    inputs = make_linear(case, "bf16")
    truth = results(inputs.to(torch.float64), reference=True)
    got = results(inputs, engine=engine)
    rounded = results(inputs, reference=True)
    for name in inputs.leaves:
        error, others = (
            ((value[name].double() - truth[name]).norm() / truth[name].norm()).item()
            for value in (got, rounded)
        )
        assert error < 3e-3, name
        assert error < others, name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_small_blocks_give_the_same_numbers(engine, dtypes):
    """Sums over blocks are in float32: in bfloat16 they would lose digits block by block."""
    inputs = make_linear(CASES["float"], dtypes)
    tight = 3 * 2 * 4 * inputs.tensors["student_head"].shape[0]  # three tokens of both sides
    for block_bytes in (1, tight):
        check(inputs, engine, block_bytes=block_bytes)


@pytest.mark.parametrize("block", [13, 32])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_heads_gradient_is_summed_over_many_blocks(engine, block):
    """Of bfloat16 it may be one product of 2 D tokens, 32 for each block, or a sum of such."""
    case = OutputCase("", "", (300,), (1100, 1100), (140, 45), mask="holes")
    check(make_linear(case, "bf16"), engine, block_bytes=block * 2 * 4 * 1100)


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_that_do_not_count_may_hold_anything(engine):
    inputs, hostile = make_linear(CASES["float"]), make_linear(CASES["float"])
    is_masked = hostile.tensors["mask"] == 0
    away = is_masked | (hostile.tensors["labels"] == -100)
    with torch.no_grad():
        for name in ("student_hidden", "teacher_hidden"):
            hostile.tensors[name].masked_fill_(away[..., None], torch.nan)
        hostile.tensors["labels"].masked_fill_(is_masked, 10**6)
        hostile.tensors["mask"].masked_fill_(hostile.tensors["labels"] == -100, torch.inf)
    want = results(inputs, engine=engine)
    for name, value in results(hostile, engine=engine).items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_reaches_the_loss(engine):
    inputs = make_linear(CASES["plain"])
    with torch.no_grad():
        inputs.tensors["teacher_hidden"][1, 7, 3] = torch.nan
    assert inputs.call(engine=engine).loss.isnan()


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("engine", ENGINES)
def test_far_apart_sides_stay_finite(engine, distance):
    """Where the logarithm of a mixture of probabilities would be that of 0."""
    inputs = make_linear(OutputCase("", "", spread=1e4))
    got = results(inputs, engine=engine, distance=distance)
    assert all(value.isfinite().all() for value in got.values())
    if distance == "jsd":
        assert got["loss"] <= torch.log(torch.tensor(2.0)) + 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_entries_of_probability_0_are_as_if_they_were_not_there(engine):
    """A bias of -inf, as for padded entries of a vocabulary."""
    inputs = make_linear(CASES["prefix-teacher"])
    shared = inputs.tensors["student_head"].shape[0]
    want = {distance: results(inputs, engine=engine, distance=distance) for distance in ALL}
    head = F.pad(inputs.tensors["student_head"].detach(), (0, 0, 0, 8), value=1.0)
    bias = torch.zeros(len(head)).index_fill(0, torch.arange(shared, len(head)), -torch.inf)
    inputs.tensors |= {
        "student_head": head.requires_grad_(), "student_bias": bias, "teacher_bias": bias,
    }  # fmt: skip
    inputs.options.pop("vocab")
    for distance in ALL:
        got = results(inputs, engine=engine, distance=distance)
        assert not got["student_head"][shared:].any()
        got["student_head"] = got["student_head"][:shared]
        for name, value in got.items():
            torch.testing.assert_close(value, want[distance][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wanted", ["student_hidden", "student_head", "student_bias", "none"])
def test_only_what_is_trained_costs_a_gradient(engine, wanted):
    inputs = make_linear(CASES["biases"])
    t = inputs.tensors
    for name in inputs.trained:
        t[name].requires_grad_(name == wanted)
    for name in ("teacher_hidden", "teacher_head", "teacher_bias"):
        t[name].requires_grad_()
    *_, grads = torch.ops.fakd.linear_kl(*inputs.call_lowered(lower, engine=engine))
    assert len(grads) == (wanted != "none")
    loss = inputs.call(engine=engine).loss
    assert loss.requires_grad == (wanted != "none")
    if wanted != "none":
        loss.backward()
        full = results(make_linear(CASES["biases"]), engine=engine)
        torch.testing.assert_close(4 * t[wanted].grad, full[wanted], rtol=1e-5, atol=1e-7)
    assert not any(t[name].grad is not None for name in t if name != wanted and t[name] is not None)
    with torch.no_grad():
        *_, grads = torch.ops.fakd.linear_kl(*inputs.call_lowered(lower, engine=engine))
        assert len(grads) == 0
        assert not inputs.call(engine=engine).loss.requires_grad


@pytest.mark.parametrize("engine", ENGINES)
def test_learned_weights_receive_their_gradients(engine):
    check_learned_weights(make_linear(CASES["warm"]), engine)


def test_shared_head_gets_the_students_gradient_only():
    inputs = make_linear(OutputCase("", "", widths=(12, 12), labels="all"))
    head = inputs.tensors["student_head"]
    shared = linear_kl(**{**inputs.tensors, "teacher_head": head}).loss
    apart = linear_kl(**{**inputs.tensors, "teacher_head": head.detach().clone()}).loss
    torch.testing.assert_close(
        torch.autograd.grad(shared, head), torch.autograd.grad(apart, head), rtol=0, atol=0
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_of_a_batch_add_up_with_a_common_normalizer(engine):
    inputs = make_linear(CASES["float"])
    whole = inputs.call(engine=engine)
    t, parts = inputs.tensors, []
    for rows in (slice(0, 1), slice(1, None)):
        part = {name: t[name][rows] for name in ("student_hidden", "teacher_hidden")}
        part |= {name: t[name][rows] for name in ("labels", "mask")}
        parts.append(
            linear_kl(**{**t, **part}, **inputs.options, normalizer=whole.tokens, engine=engine)
        )
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    torch.testing.assert_close(torch.cat([part.per_token for part in parts]), whole.per_token)


def test_float16_gradients_survive_until_the_loss_scaler():
    inputs = make_linear(CASES["plain"], "f16")
    loss = inputs.call(normalizer=1e9).loss
    (grad,) = torch.autograd.grad(loss * 1e6, inputs.tensors["student_head"])
    want = torch.autograd.grad(inputs.call(normalizer=1e3).loss, inputs.tensors["student_head"])
    torch.testing.assert_close(grad, want[0], rtol=2e-3, atol=1e-7)


def test_autocast_does_what_linear_does():
    inputs = make_linear(CASES["biases"])
    with torch.autocast("cpu", torch.bfloat16):
        got = results(inputs)
    want = results(inputs.to(BF16))
    for name, value in got.items():
        torch.testing.assert_close(value, want[name].to(value.dtype), msg=name)
        assert value.dtype == torch.float32


def test_second_derivatives_are_refused_and_graphs_may_be_kept():
    inputs = make_linear(CASES["plain"])
    loss, head = inputs.call().loss, inputs.tensors["student_head"]
    first = torch.autograd.grad(loss, head, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(2 * loss, head)[0], 2 * first)
    (grad,) = torch.autograd.grad(inputs.call().loss, head, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("threads", [1, 3])
def test_results_do_not_depend_on_threads(threads):
    before = torch.get_num_threads()
    inputs = make_linear(CASES["primes"])
    want = results(inputs, engine="cpu")
    try:
        torch.set_num_threads(threads)
        got = results(inputs, engine="cpu")
    finally:
        torch.set_num_threads(before)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


def test_explain_says_who_serves():
    inputs = make_linear(CASES["plain"])
    assert "served by the cpu engine" in explain("linear_kl", **inputs.tensors)
    text = explain("linear_kl", **inputs.to(torch.float64).tensors)
    assert "served by the reference engine" in text
    assert "not cpu: float64 is served by the reference engine only" in text
    assert "123 tokens, 12 and 20 wide, vocabulary of 61" in text


def test_eager_is_in_the_dtype_of_its_inputs():
    """What benchmarks time against: bfloat16 logits, as models compute them."""
    inputs = make_linear(CASES["plain"], "bf16")
    t = inputs.tensors
    student, teacher = (
        F.linear(t[f"{side}_hidden"], t[f"{side}_head"]).float().flatten(0, 1)
        for side in ("student", "teacher")
    )
    want = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(linear_kl_reference(**t)[0], want)
