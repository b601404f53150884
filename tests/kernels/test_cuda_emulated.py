"""The CUDA kernels on a CPU, under AddressSanitizer and UBSan, against the float64 oracle.

The same lines that nvcc compiles, run by tests/cuda_emulator, which also watches for threads that
wait for each other in vain and for races in shared memory. No card is needed, and none is used:
speed, and what a memory model allows beyond races in shared memory, are not tested here.
"""

import shutil

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("needs g++ to compile the kernels for a CPU", allow_module_level=True)

from fakd_kernels import _engines, explain, feature_alignment
from fakd_kernels.ops.feature_alignment import dispatch
from tests.cuda_emulator import emulated
from tests.support.cases import CASES, CASES_BY_ID, FeatureCase, FeatureInputs, make_inputs
from tests.support.checks import check_feature_alignment

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {
    "f32": (F32, F32),
    "bf16": (BF16, BF16),
    "f16": (F16, F16),
    "bf16-f32": (BF16, F32),
    "f32-f16": (F32, F16),
}
UNPROJECTED = [case for case in CASES if case.projection == "none"]
pytestmark = pytest.mark.usefixtures("nan_filled_memory", "cuda_engine")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_emulator")
    program = emulated.build("feature_alignment.cpp", folder)
    return emulated.EmulatedFeatureAlignment(program, folder)


@pytest.fixture
def cuda_engine(kernels, monkeypatch):
    """engine="cuda" serves CPU tensors, by the emulator."""
    monkeypatch.setattr(_engines, "cuda_refusal", lambda device, is_double: None)
    monkeypatch.setitem(dispatch.FILL, "cuda", kernels.fill)


def make_pairs(*pairs, mask=None) -> FeatureInputs:
    """Of (student, teacher) as they lie in memory."""
    students, teachers = (list(tensors) for tensors in zip(*pairs, strict=True))
    for student in students:
        student.requires_grad_()
    absent = [None] * len(pairs)
    return FeatureInputs(students, teachers, absent, absent, mask or absent, {})


@pytest.mark.parametrize("case", UNPROJECTED, ids=lambda case: case.id)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_value_and_gradients(case, dtypes):
    inputs = make_inputs(case, *DTYPES[dtypes])
    for euclidean in ("squared", "distance"):
        check_feature_alignment(inputs, engine="cuda", euclidean=euclidean)


@pytest.mark.parametrize("fill", ["near-2", "huge", "tiny"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_magnitudes(fill, dtypes):
    inputs = make_inputs(FeatureCase("", "", ((40, 72, 72),), "none", fill=fill), *DTYPES[dtypes])
    for euclidean in ("squared", "distance"):
        check_feature_alignment(inputs, engine="cuda", euclidean=euclidean)


@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_views(layout):
    case = FeatureCase("", "", ((30, 48, 48), (5, 19, 19)), "none", layout=layout)
    check_feature_alignment(make_inputs(case, BF16), engine="cuda")


def test_every_pair_of_dtypes_in_one_launch():
    sizes = [(9, 24), (3, 200), (1, 1), (17, 40), (0, 8), (8, 64), (2, 1030), (4, 7), (5, 33)]
    dtypes = [(x, t) for x in (F32, F16, BF16) for t in (F32, F16, BF16)]
    pairs = [
        (torch.randn(*size).to(x), torch.randn(*size).to(t))
        for size, (x, t) in zip(sizes, dtypes, strict=True)
    ]
    check_feature_alignment(make_pairs(*pairs), engine="cuda", euclidean="distance")


def test_more_pairs_than_a_launch_takes():
    sizes = [(1 + index % 3, 4 + index % 7) for index in range(130)]
    inputs = make_pairs(*[(torch.randn(*size), torch.randn(*size)) for size in sizes])
    check_feature_alignment(inputs, engine="cuda")


# A warp takes rows up to 1024 wide, a block wider ones, beyond 8192 tile by tile; odd widths have
# elements before and after those that are loaded 16 bytes at a time.
@pytest.mark.parametrize("width", [1, 3, 7, 9, 1023, 1024, 1025, 8192, 8200, 16500])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f32-f16"])
def test_widths(width, dtypes):
    x, t = (torch.randn(3, width).to(dtype) for dtype in DTYPES[dtypes])
    check_feature_alignment(make_pairs((x, t)), engine="cuda")


def shifted(rows: int, width: int, offset: int, gap: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that begin `offset` elements into their memory and lie `gap` elements apart."""
    memory = torch.full((offset + rows * (width + gap),), torch.nan, dtype=dtype)
    return memory.as_strided((rows, width), (width + gap, 1), offset).copy_(
        torch.randn(rows, width)
    )


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, BF16)])
def test_every_alignment(dtypes):
    """Of student, teacher and gradient: aligned together, after some elements, or never."""
    pairs = [
        tuple(shifted(4, 35, *place, dtype) for place, dtype in zip(places, dtypes, strict=True))
        for offset in range(9)
        for places in (((offset, 0), (offset, 0)), ((offset, 0), (0, 0)), ((0, offset), (0, 1)))
    ]
    check_feature_alignment(make_pairs(*pairs), engine="cuda")


def test_offsets_past_32_bits(kernels):
    result = emulated.run(kernels.program, "far")
    assert result.returncode == 0, result.stderr


def test_wide_rows_that_are_never_aligned():
    pairs = [(shifted(2, width, 1, 0, F32), torch.randn(2, width)) for width in (700, 5000)]
    check_feature_alignment(make_pairs(*pairs), engine="cuda")


@pytest.mark.parametrize("width", [40, 1500])
def test_rows_of_weight_zero_are_not_read(width):
    student, teacher = torch.randn(2, 21, width)
    mask = torch.rand(21) > 0.5
    wild = torch.where(mask[:, None], student, torch.nan).requires_grad_()
    got = feature_alignment(
        wild, torch.where(mask[:, None], teacher, torch.inf), mask=mask, engine="cuda"
    )
    clean = student.clone().requires_grad_()
    want = feature_alignment(clean, teacher, mask=mask, engine="cuda")
    assert got.loss == want.loss
    (a,) = torch.autograd.grad(got.loss, wild)
    (b,) = torch.autograd.grad(want.loss, clean)
    assert torch.equal(a, b)
    assert (a[~mask] == 0).all()


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_reach_the_loss(where, value):
    tensors = {"student": torch.randn(7, 16), "teacher": torch.randn(7, 16)}
    tensors[where][3, 5] = value
    student = tensors["student"].requires_grad_()
    result = feature_alignment(student, tensors["teacher"], engine="cuda")
    assert not torch.isfinite(result.loss)
    result.loss.backward()
    assert not torch.isfinite(student.grad[3]).any()
    assert torch.isfinite(student.grad[2]).all()


def test_values_alone_without_gradients():
    inputs = make_inputs(CASES_BY_ID["same-width-many"], BF16)
    learned = inputs.call(engine="cuda").loss
    with torch.no_grad():
        assert inputs.call(engine="cuda").loss == learned


def test_float16_gradients_wait_in_float32(kernels, monkeypatch):
    seen = []
    monkeypatch.setitem(dispatch.FILL, "cuda", lambda p: (kernels.fill(p), seen.append(p)))
    student = torch.randn(20, 64, dtype=F16, requires_grad=True)
    feature_alignment(student, torch.randn(20, 64), normalizer=2.0**30, engine="cuda")
    (pair,) = seen[0].pairs
    assert pair.grad_student.dtype == F32
    assert (pair.grad_student != 0).all()


def test_engine_is_chosen_before_triton_without_a_projection(monkeypatch):
    inputs = make_inputs(CASES_BY_ID["same-width"])
    order = _engines.PREFERENCE_OF["feature_alignment"]["cuda"]
    monkeypatch.setitem(_engines.PREFERENCE_OF, "feature_alignment", {"cpu": order})
    monkeypatch.setattr(_engines, "triton_refusal", lambda device, is_double: None)
    words = explain("feature_alignment", inputs.student, inputs.teacher)
    assert "served by the cuda engine" in words
    assert "not triton: it could serve, but is asked later" in words
    assert "align_rows: value and gradient, 1 pairs" in words


PLANTED = {
    "none": (0, ""),
    "missing-barrier": (3, "race in block 1: thread 1 reads word 0"),
    "missing-barrier-before-reuse": (3, "race in block 1"),
    "missing-syncwarp": (3, "race in block 1"),
    "unwritten": (3, "unwritten: thread 0 reads word 64"),
    "divergent-barrier": (3, "divergence in block 1: thread 0 waits at a barrier"),
    "divergent-shuffle": (3, "divergence in block 1"),
    "left-early": (3, "divergence in block 1: thread 0 waits at a barrier"),
    "shared-bounds": (3, "bounds: index -1 of a shared array of 65"),
    "global-bounds": (1, "AddressSanitizer: heap-buffer-overflow"),
    "misaligned": (1, "misaligned address"),
}


BARRIERS = [("feature_row.h", 2, 0), ("feature_row.h", 2, 1), ("feature_kernels.h", 1, 0)]


@pytest.mark.parametrize(("name", "count", "place"), BARRIERS)
def test_every_barrier_of_the_kernels_is_needed(name, count, place, tmp_path, monkeypatch):
    for header in emulated.KERNELS.glob("*.h"):
        text = header.read_text()
        if header.name == name:
            parts = text.split("__syncthreads();")
            assert len(parts) == count + 1
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            text = "__syncthreads();".join(parts)
        (tmp_path / header.name).write_text(text)
    program = emulated.build("feature_alignment.cpp", tmp_path, tmp_path, "-O0")
    kernels = emulated.EmulatedFeatureAlignment(program, tmp_path)
    monkeypatch.setitem(dispatch.FILL, "cuda", kernels.fill)
    with pytest.raises(AssertionError, match="emulator: race in block 0"):
        feature_alignment(torch.randn(2, 1500), torch.randn(2, 1500), engine="cuda")


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    return emulated.build("planted.cpp", tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, planted):
    code, words = PLANTED[bug]
    result = emulated.run(planted, bug)
    assert result.returncode == code, result.stderr
    assert words in result.stderr
