"""The Triton engine of logit_kl in Triton's interpreter, on a CPU, against the oracle.

Run as `TRITON_INTERPRET=1 pytest tests/kernels/test_logit_kl_triton.py`: Triton reads the variable
when it is first imported, so the whole process must have it.
"""

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1 in the environment of the process", allow_module_level=True
    )
pytest.importorskip("triton")

from fakd_kernels import _triton, _triton_outputs, explain, logit_kl
from fakd_kernels.ops.logit_kl import dispatch, triton_kernel
from fakd_kernels.ops.logit_kl.arguments import lower
from tests.support.interpreter import prepare_once
from tests.support.output_cases import (
    BF16,
    DENSE_CASES,
    DISTANCES,
    DTYPES,
    OutputCase,
    make_logits,
)
from tests.support.output_checks import (
    check,
    check_learned_weights,
    check_tokens_that_do_not_count,
    results,
)

prepare_once()
CASES = {case.id: case for case in DENSE_CASES}
ALL = DISTANCES["f32"]
WIDE = OutputCase("", "", (5,), (331, 331), labels="some", mask="float")  # several tiles a row
pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    # numpy's, of elements that a mask takes off afterwards
    pytest.mark.filterwarnings("ignore:(invalid|overflow|divide by|All-NaN):RuntimeWarning"),
]


@pytest.mark.parametrize("case", DENSE_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_value_and_gradients(case, dtypes):
    inputs = make_logits(case, dtypes)
    for distance in DISTANCES[dtypes]:
        check(inputs, "triton", distance=distance)


@pytest.mark.parametrize("vocab", [1, 7, 64, 65, 128, 200])
def test_tiles_of_every_kind(vocab):
    """Rows that fill a tile or not, end with one or not; a temperature and labels."""
    case = OutputCase("", "", (37,), (vocab, vocab), labels="all", mask="holes")
    for distance in ALL:
        options = {"distance": distance, "temperature": 1.7, "ce_weight": 0.5}
        check(make_logits(case), "triton", **options)


@pytest.mark.parametrize("apart", [1e-2, 1e-3])
@pytest.mark.parametrize("distance", ALL)
def test_near_equal_wide_rows(apart, distance):
    check(make_logits(replace(WIDE, distance_to=apart)), "triton", distance=distance)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_logits_that_move_the_maximum_in_every_tile(order):
    inputs = make_logits(replace(WIDE, spread=1.0))
    slope = torch.linspace(0, 100, 331)
    with torch.no_grad():
        for name in ("student_logits", "teacher_logits"):
            inputs.tensors[name] += slope if order == "rising" else slope.flip(0)
    for distance in ALL:
        check(inputs, "triton", distance=distance)


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("vocab", [61, 331])
def test_equal_sides_give_nothing(vocab, distance):
    case = OutputCase("", "", (9,), (vocab, vocab), spread=10.0, distance_to=0.0)
    got = results(
        make_logits(case, "bf16"), engine="triton", distance=distance, temperature=2.0, jsd_beta=0.1
    )
    assert got["loss"].abs() < 1e-6
    assert got["student_logits"].abs().max() < 1e-6
    if distance != "jsd":
        assert not got["loss"].any()
    if distance == "kl":
        assert not got["student_logits"].any()


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("away", ["some", "first tile", "last tile"])
def test_entries_of_probability_0_are_as_if_they_were_not_there(distance, away):
    whole, part = (make_logits(replace(WIDE, mask="none")) for _ in range(2))
    place = torch.arange(331)
    is_away = {"some": place % 4 == 1, "first tile": place < 70, "last tile": place > 250}[away]
    with torch.no_grad():
        for name in ("student_logits", "teacher_logits"):
            whole.tensors[name].masked_fill_(is_away, -torch.inf)
            part.tensors[name] = part.tensors[name][..., ~is_away].detach()
    labels = whole.tensors["labels"]
    labels[is_away[labels.clamp_min(0)]] = -100
    kept = (~is_away).cumsum(0) - 1
    part.tensors["labels"] = torch.where(labels < 0, labels, kept[labels.clamp_min(0)])
    part.tensors["student_logits"].requires_grad_()
    got, want = (
        results(inputs, engine="triton", distance=distance, ce_weight=0.5)
        for inputs in (whole, part)
    )
    grad = got["student_logits"]
    assert not grad[..., is_away].any()
    got["student_logits"] = grad[..., ~is_away]
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab", [3, 130])
def test_what_one_side_excludes(vocab):
    """KL is infinite where the divisor's side excludes an entry; its gradient is not."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, vocab, generator=generator).unbind()
    student[0, 1] = teacher[1, 1] = -torch.inf
    student[0, :64:3] = -torch.inf
    student.requires_grad_()
    got = logit_kl(student, teacher, engine="triton")
    assert got.per_token[0] == torch.inf
    assert got.per_token[1].isfinite()
    (grad,) = torch.autograd.grad(got.loss, student)
    torch.testing.assert_close(grad, (student.softmax(-1) - teacher.softmax(-1)) / 2)
    jsd = logit_kl(student, teacher, distance="jsd", engine="triton")
    want = logit_kl(student, teacher, distance="jsd", engine="reference")
    torch.testing.assert_close(jsd.per_token, want.per_token)
    torch.testing.assert_close(
        torch.autograd.grad(jsd.loss, student), torch.autograd.grad(want.loss, student)
    )


def test_an_excluded_part_that_turns_out_to_weigh_nothing():
    """What the teacher believes in a first tile that the student excludes vanishes in a second."""
    student, teacher = torch.zeros(1, 128), torch.zeros(1, 128)
    student[:, :64] = -torch.inf
    teacher[:, 64:] = 200.0
    assert logit_kl(student, teacher, engine="triton").loss.abs() < 1e-6


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("side", ["student_logits", "teacher_logits"])
def test_a_row_without_any_probability_is_nan(side, distance):
    inputs = make_logits(CASES["plain"])
    with torch.no_grad():
        inputs.tensors[side][0, 2] = -torch.inf
    result = inputs.call(engine="triton", distance=distance)
    assert result.per_token.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("case", [CASES["float"], WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tokens_that_do_not_count_may_hold_anything(case, value):
    check_tokens_that_do_not_count(lambda: make_logits(case), "triton", value, ce_weight=0.5)


@pytest.mark.parametrize("vocab", [61, 331])
@pytest.mark.parametrize("side", ["student_logits", "teacher_logits"])
def test_nan_reaches_the_loss(side, vocab):
    inputs = make_logits(OutputCase("", "", (9,), (vocab, vocab)))
    with torch.no_grad():
        inputs.tensors[side][7, 3] = torch.nan
    for distance in ALL:
        result = inputs.call(engine="triton", distance=distance)
        assert result.loss.isnan()
        assert result.per_token.isnan().nonzero().tolist() == [[7]]


def launches_of(inputs, **options) -> list[tuple[str, int]]:
    with _triton.record_launches() as launches:
        inputs.call(engine="triton", **options)
    return launches


def test_one_launch_for_all_tokens():
    assert launches_of(make_logits(CASES["warm"])) == [("rows_kernel", 4), ("reduce_kernel", 1)]
    assert launches_of(make_logits(CASES["no-row"])) == []


@pytest.mark.parametrize("distance", ALL)
def test_values_alone_without_gradients(distance):
    inputs = make_logits(WIDE)
    learned = inputs.call(engine="triton", distance=distance)
    with torch.no_grad():
        result = inputs.call(engine="triton", distance=distance)
    assert torch.equal(result.loss, learned.loss)
    assert not result.loss.requires_grad


def test_learned_weights_receive_their_gradients():
    check_learned_weights(make_logits(CASES["warm"]), "triton")


def test_equal_bits_every_run():
    inputs = make_logits(WIDE, "bf16")
    first, second = (results(inputs, engine="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("vocab", [61, 331])
def test_neighbours_of_a_gradient_are_not_touched(vocab, monkeypatch):
    """Every row of the gradient lies between sentinels, in a row of a larger matrix."""
    inputs = make_logits(OutputCase("", "", (13,), (vocab, vocab), mask="holes"))
    whole = torch.full((15, vocab + 20), 7.0)

    def fill(problem):
        grad = whole[1:-1, 10:-10]
        triton_kernel.fill(replace(problem, grad=grad))

    monkeypatch.setitem(dispatch.FILL, "triton", fill)
    inputs.call(engine="triton")
    inside = whole[1:-1, 10:-10].clone()
    whole[1:-1, 10:-10] = 7.0
    assert (whole == 7).all()
    assert (inside != 7).all()


def test_offsets_past_32_bits():
    """A row begins 2^31 elements after the one before; memory between them is never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    inputs = make_logits(OutputCase("", "", (2,), (70, 70)), "bf16")
    want = results(inputs, engine="triton")
    far = torch.empty(2**31 + 70, dtype=BF16).as_strided((2, 70), (2**31, 1))
    for name in ("student_logits", "teacher_logits"):
        far.copy_(inputs.tensors[name].detach())
        moved = replace(inputs, tensors=dict(inputs.tensors))
        moved.tensors[name] = far.detach().requires_grad_(name in inputs.trained)
        got = results(moved, engine="triton")
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_padding_of_rows_is_neither_read_nor_part_of_the_gradient():
    """Where rows are padded to whole vectors, as `linear_kl` pads them."""
    inputs = make_logits(OutputCase("", "", (6,), (61, 61)))
    want = results(inputs, engine="triton")["student_logits"] / 4
    student, teacher = torch.full((2, 6, 64), torch.nan)
    student[:, :61] = inputs.tensors["student_logits"].detach()
    teacher[:, :61] = inputs.tensors["teacher_logits"]
    lowered = inputs.call_lowered(lower, engine="triton")
    problem, *_ = dispatch.resolve(*lowered)
    slots = _triton_outputs.Slots(_triton_outputs.count_programs(6, 61), problem.sums)
    _triton_outputs.launch_rows(
        _triton_outputs.Logits(student[:, :61]),
        _triton_outputs.Logits(teacher[:, :61]),
        student[:, :61],
        problem.terms,
        slice(0, 6),
        problem.per_token,
        slots,
        padded=64,
    )
    assert torch.equal(student[:, :61], want)
    assert not student[:, 61:].any()


def test_refusals_in_words():
    inputs = make_logits(CASES["plain"])
    with pytest.raises(RuntimeError, match="float64 is served by the reference engine only"):
        inputs.to(torch.float64).call(engine="triton")


def test_explain_says_who_serves():
    words = explain("logit_kl", *torch.randn(2, 3, 4, 7), engine="triton")
    assert words.startswith("logit_kl: served by the triton engine.")
    assert "12 tokens, vocabulary of 7" in words
