"""The dual-softmax CUDA kernels on a CPU: logit_kl and linear_kl, see test_cuda_emulated.py.

Launchers are the real ones: what they call is registered with the schemas of the CUDA library, and
runs in the emulator.
"""

import shutil
from dataclasses import replace

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("needs g++ to compile the kernels for a CPU", allow_module_level=True)

from fakd_kernels import _engines, _output_checks, explain, logit_kl
from fakd_kernels.ops.logit_kl import cuda, dispatch
from tests.cuda_emulator import emulated
from tests.cuda_emulator.emulated_outputs import EmulatedOutputs
from tests.support.output_cases import (
    DENSE_CASES,
    DISTANCES,
    DTYPES,
    OutputCase,
    make_linear,
    make_logits,
)
from tests.support.output_checks import (
    check,
    check_entries_of_probability_0,
    check_learned_weights,
    check_tokens_that_do_not_count,
    results,
)

ALL = DISTANCES["f32"]
CASES = {case.id: case for case in DENSE_CASES}
# Two tiles of a block; of three rows eager may be right by luck.
WIDE = OutputCase("", "", (3,), (4801, 4801), labels="some", mask="float", slack=2.0)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_emulator")
    return EmulatedOutputs(emulated.build("dual_softmax.cpp", folder), folder)


@pytest.fixture
def emulated_outputs(kernels, monkeypatch):
    """engine="cuda" serves CPU tensors, by the emulator."""
    monkeypatch.setattr(_engines, "cuda_refusal", lambda device, is_double: None)
    kernels.calls.clear()
    with kernels.registered():
        yield kernels


pytestmark = pytest.mark.usefixtures("nan_filled_memory", "emulated_outputs")


# Cases of another dtype differ in how rows are read and written alone.
ROWS = [
    case for case in DENSE_CASES if case.id in ("aligned", "primes", "float", "softcap", "rows")
]


@pytest.mark.parametrize("case", DENSE_CASES, ids=lambda case: case.id)
def test_logit_kl(case):
    inputs = make_logits(case)
    for distance in ALL:
        check(inputs, "cuda", distance=distance)


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
@pytest.mark.parametrize("dtypes", ["bf16", "f16", "mixed"])
def test_logit_kl_in_half_precision(case, dtypes):
    inputs = make_logits(case, dtypes)
    for distance in DISTANCES[dtypes]:
        check(inputs, "cuda", distance=distance)


# A warp takes rows up to 1024 wide, tile by tile beyond 512; a block wider ones, beyond 4096.
@pytest.mark.parametrize("vocab", [7, 513, 1024, 1025, 4801])
@pytest.mark.parametrize("distance", ALL)
def test_widths(vocab, distance):
    case = replace(WIDE, vocab=(vocab, vocab))
    check(make_logits(case), "cuda", distance=distance, temperature=1.7, ce_weight=0.5)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_logits_that_move_the_maximum_in_every_octet(order):
    inputs = make_logits(replace(WIDE, spread=1.0))
    slope = torch.linspace(0, 100, 4801)
    with torch.no_grad():
        for name in ("student_logits", "teacher_logits"):
            inputs.tensors[name] += slope if order == "rising" else slope.flip(0)
    for distance in ALL:
        check(inputs, "cuda", distance=distance)


def shifted(rows: torch.Tensor, offset: int) -> torch.Tensor:
    """The same rows, `offset` elements into their memory and with a gap between them."""
    count, width = rows.shape
    memory = torch.full((offset + count * (width + 3),), torch.nan, dtype=rows.dtype)
    return memory.as_strided((count, width), (width + 3, 1), offset).copy_(rows.detach())


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "mixed"])
def test_every_alignment(dtypes):
    """Of student, teacher and gradient: aligned together, after some elements, or never."""
    inputs = make_logits(OutputCase("", "", (2,), (29, 29)), dtypes)
    want = results(inputs, engine="cuda")
    for offset in range(1, 9):
        for moved in ({"student_logits"}, {"teacher_logits"}, set(inputs.tensors)):
            tensors = {
                name: shifted(t, offset) if name in moved and t is not None else t
                for name, t in inputs.tensors.items()
            }
            tensors["student_logits"].requires_grad_()
            for name, value in results(replace(inputs, tensors=tensors), engine="cuda").items():
                torch.testing.assert_close(value, want[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_of_a_gradient_are_not_touched(dtype, monkeypatch):
    """Every row of the gradient lies between sentinels, which the emulator's caller compares."""
    inputs = make_logits(OutputCase("", "", (13,), (61, 61), mask="holes"))
    whole = torch.full((15, 81), 7.0, dtype=dtype)

    def fill(problem):
        cuda.fill(replace(problem, grad=whole[1:-1, 10:-10]))

    monkeypatch.setitem(dispatch.FILL, "cuda", fill)
    inputs.call(engine="cuda")
    assert (whole[1:-1, 10:-10] != 7).all()


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("vocab", [61, 1100])
def test_equal_sides_give_nothing(vocab, distance):
    case = OutputCase("", "", (3,), (vocab, vocab), spread=10.0, distance_to=0.0)
    inputs = make_logits(case, "bf16")
    got = results(inputs, engine="cuda", distance=distance, temperature=2.0, jsd_beta=0.1)
    assert got["loss"].abs() < 1e-6
    assert got["student_logits"].abs().max() < 1e-6
    assert distance != "kl" or not got["student_logits"].any()


@pytest.mark.parametrize("distance", ALL)
def test_entries_of_probability_0_are_as_if_they_were_not_there(distance):
    is_away = torch.arange(61) % 4 == 1
    is_away[:16] = True  # and an octet without any
    check_entries_of_probability_0(
        lambda: make_logits(CASES["labels"]), is_away, "cuda", distance=distance
    )


def test_what_one_side_excludes():
    """KL is infinite where the divisor's side excludes an entry; its gradient is not."""
    student = torch.tensor([[0.5, -torch.inf, 1.0], [0.1, 0.2, 0.3]], requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0, 0.0], [0.1, -torch.inf, 0.0]])
    got = logit_kl(student, teacher, engine="cuda")
    assert got.per_token[0] == torch.inf
    assert got.per_token[1].isfinite()
    (grad,) = torch.autograd.grad(got.loss, student)
    torch.testing.assert_close(grad, (student.softmax(-1) - teacher.softmax(-1)) / 2)
    got, want = (
        logit_kl(student, teacher, distance="jsd", engine=e) for e in ("cuda", "reference")
    )
    torch.testing.assert_close(got.per_token, want.per_token)


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("side", ["student_logits", "teacher_logits"])
@pytest.mark.parametrize("vocab", [61, 1100])
def test_nan_and_rows_without_any_probability_are_nan(side, distance, vocab):
    inputs = make_logits(OutputCase("", "", (9,), (vocab, vocab)))
    with torch.no_grad():
        inputs.tensors[side][7, 3] = torch.nan
        inputs.tensors[side][2] = -torch.inf
    result = inputs.call(engine="cuda", distance=distance)
    assert result.loss.isnan()
    assert result.per_token.isnan().nonzero().flatten().tolist() == [2, 7]


@pytest.mark.parametrize("case", [CASES["float"], WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tokens_that_do_not_count_may_hold_anything(case, value):
    check_tokens_that_do_not_count(lambda: make_logits(case), "cuda", value, ce_weight=0.5)


def test_labels_outside_the_vocabulary_are_nan(monkeypatch):
    """On a card nobody can look at them before the launch."""
    monkeypatch.setattr(_output_checks, "check_values", lambda *arguments: None)
    inputs = make_logits(OutputCase("", "", (4,), (9, 9), labels="all"))
    inputs.tensors["labels"][1:3] = torch.tensor([9, -1])
    assert inputs.call(engine="cuda", ce_weight=0.5).per_token.isnan().tolist() == [
        *(False, True, True, False)
    ]


def test_values_alone_without_gradients(emulated_outputs):
    inputs = make_logits(WIDE)
    learned = inputs.call(engine="cuda").loss
    assert emulated_outputs.calls == ["score_logits", "sum_logits"]
    with torch.no_grad():
        assert inputs.call(engine="cuda").loss == learned


def test_learned_weights_receive_their_gradients():
    check_learned_weights(make_logits(CASES["warm"]), "cuda")


LINEAR = ("plain", "primes", "one-row", "no-row", "float", "biases", "softcap", "prefix-student")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", [CASES[id] for id in LINEAR], ids=LINEAR)
def test_linear_kl(case, dtypes, emulated_outputs):
    inputs = make_linear(case, dtypes)
    check(inputs, "cuda", distance=DISTANCES[dtypes][-1], block_bytes=20_000)
    blocks = emulated_outputs.calls.count("score_logits")
    assert (blocks > 1) == (case.id not in ("one-row", "no-row"))


def test_engine_is_chosen_after_triton(monkeypatch):
    monkeypatch.setattr(_engines, "PREFERENCE", {"cpu": _engines.PREFERENCE["cuda"]})
    logits, head = torch.randn(3, 4), torch.randn(5, 4)
    calls = ("logit_kl", logits, logits), ("linear_kl", logits, head, logits, head)
    for call in calls:
        assert "served by the cuda engine" in explain(*call), "Triton serves no CPU tensors"
    monkeypatch.setattr(_engines, "triton_refusal", lambda device, is_double: None)
    for call in calls:
        words = explain(*call)
        assert "served by the triton engine" in words
        assert "not cuda: it could serve, but is asked later" in words


def test_every_barrier_of_the_kernels_is_needed(tmp_path):
    sources = shutil.copytree(emulated.KERNELS.parent, tmp_path / "csrc") / emulated.KERNELS.name
    team = sources / "row_team.h"
    text = team.read_text()
    assert text.count("__syncthreads();") == 1
    team.write_text(text.replace("__syncthreads();", ""))
    program = emulated.build("dual_softmax.cpp", tmp_path, sources, "-O0")
    broken = EmulatedOutputs(program, tmp_path)
    logits, values = torch.randn(2, 2, 1500), torch.empty(2, 2)
    rest = (None, None, None, None, torch.ones(2), None, values, 0.0, 0.0, 1.0, 0.5, 0)
    with pytest.raises(AssertionError, match="emulator: race in block 0"):
        broken.score_logits(*logits, *rest)
