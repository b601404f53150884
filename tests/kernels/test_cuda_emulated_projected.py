"""Pairs with a projection by the CUDA engine on a CPU, see test_cuda_emulated.py.

The launcher is the real one. Its products are those of torch on a CPU, where half operands are
widened; what it calls between them is registered with the schemas of the CUDA library, and runs in
the emulator. The barriers of these kernels are those of feature_row.h, which that file removes.
"""

import shutil

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("needs g++ to compile the kernels for a CPU", allow_module_level=True)

from fakd_kernels import _engines, _products, explain, feature_alignment
from fakd_kernels.ops.feature_alignment import cuda, dispatch, projected, reference
from fakd_kernels.ops.feature_alignment.problem import Pair, Problem
from tests.cuda_emulator import emulated
from tests.cuda_emulator.emulated_outputs import schemas
from tests.cuda_emulator.emulated_projected import EmulatedProjected
from tests.kernels.test_output_products import _Card
from tests.support.cases import CASES, CASES_BY_ID, FeatureCase, FeatureInputs, make_inputs
from tests.support.checks import check_feature_alignment

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {
    "bf16": (BF16, BF16, BF16),
    "f16": (F16, F16, F16),
    "bf16-f32-bf16": (BF16, F32, BF16),
    "bf16-f16-f32": (BF16, F16, F32),
}
PROJECTED = [case for case in CASES if case.projection != "none"]
HALF = ("prime", "shared", "float-mask", "near-2", "fitted", "zeros", "wide-row", "bias")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_emulator")
    return EmulatedProjected(emulated.build("projected_rows.cpp", folder), folder)


@pytest.fixture
def emulated_projected(kernels, monkeypatch):
    """engine="cuda" serves CPU tensors, by the emulator."""
    monkeypatch.setattr(_engines, "cuda_refusal", lambda device, is_double: None)
    kernels.entries.clear()
    with kernels.registered():
        yield kernels


pytestmark = pytest.mark.usefixtures("nan_filled_memory", "emulated_projected")


@pytest.mark.parametrize("case", PROJECTED, ids=lambda case: case.id)
def test_value_and_gradients(case):
    inputs = make_inputs(case)
    for euclidean in ("squared", "distance"):
        check_feature_alignment(inputs, engine="cuda", euclidean=euclidean)


@pytest.mark.parametrize("id", HALF)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_half_precision(id, dtypes):
    inputs = make_inputs(CASES_BY_ID[id], *DTYPES[dtypes])
    check_feature_alignment(inputs, engine="cuda", euclidean="distance")


@pytest.mark.parametrize(
    ("dtypes", "names"),
    [
        ("bf16", ["addmm"]),  # P on b; dX is bfloat16 itself, and so is dW of one part
        ("f16", ["addmm"]),  # dP is in float32
        ("bf16-f32-bf16", ["addmm"]),
        ("bf16-f16-f32", []),
    ],
)
def test_a_card_multiplies_half_operands_as_they_are(dtypes, names, monkeypatch):
    monkeypatch.setattr(_products, "is_native", lambda a, b: a.dtype == b.dtype)
    card = _Card()

    def fill(problem):
        with card:
            cuda.fill(problem)

    monkeypatch.setitem(dispatch.FILL, "cuda", fill)
    check_feature_alignment(make_inputs(CASES_BY_ID["bias"], *DTYPES[dtypes]), engine="cuda")
    assert card.names == names


# A warp takes rows up to 1024 wide, a block wider ones; in registers up to 8192, or 6144 of float32
# against float32 with dP in bfloat16. Odd widths have elements that are loaded one by one.
@pytest.mark.parametrize("width", [1, 7, 771, 1024, 1025, 6155, 8200])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32-bf16"])
def test_widths(width, dtypes):
    # Ds of a model: a maximum of few sums is good or bad luck, in eager too.
    case = FeatureCase("", "", ((3, 64, width),), bias=True, mask="float")
    inputs = make_inputs(case, *DTYPES.get(dtypes, ()))
    check_feature_alignment(inputs, engine="cuda", euclidean="squared")


@pytest.mark.parametrize("dtypes", ["f32", *DTYPES])
def test_chunks_of_many_pairs(dtypes, emulated_projected, monkeypatch):
    """Pairs begin and end inside chunks, and share a projection across them."""
    monkeypatch.setattr(projected, "CHUNK_BYTES", 1 << 17)
    monkeypatch.setattr(projected, "ROWS", 8)
    sizes = ((150, 16, 120), (0, 16, 120), (7, 16, 120), (400, 16, 120))
    case = FeatureCase("", "", sizes, "shared", bias=True)
    inputs = make_inputs(case, *DTYPES.get(dtypes, ()))
    inputs.mask[2:] = [torch.rand(rows) > 0.4 for rows, *_ in sizes[2:]]
    check_feature_alignment(inputs, engine="cuda")
    entries = emulated_projected.entries
    assert len(entries) > 2
    assert any(len(chunk) > 1 for chunk in entries)
    assert all(sum(4 * r * c for r, c in chunk) <= 1 << 17 for chunk in entries)
    assert sum(rows for chunk in entries for rows, _ in chunk) == 557


def test_more_entries_than_a_launch_takes():
    sizes = tuple((1 + index % 3, 3, 4 + index % 7) for index in range(165))
    inputs = make_inputs(FeatureCase("", "", sizes))
    leaves = list(inputs.leaves.values())
    got, want = inputs.call(engine="cuda"), inputs.call(engine="reference")
    torch.testing.assert_close(got.cosine, want.cosine)
    torch.testing.assert_close(got.euclidean, want.euclidean)
    grads = (torch.autograd.grad(result.loss, leaves) for result in (got, want))
    torch.testing.assert_close(*grads)


def test_every_dtype_in_one_call():
    """Pairs whose dP is float32 and bfloat16 are two launches of one call."""
    kinds = [(F32, F32, F32), *DTYPES.values(), (F32, BF16, BF16), (BF16, F16, BF16)]
    parts = [
        make_inputs(FeatureCase("", "", ((11 + i, 6, 20 + i),), bias=True), *kind, seed=i)
        for i, kind in enumerate(kinds)
    ]
    names = ("student", "teacher", "projection", "bias", "mask")
    lists = [[getattr(part, name)[0] for part in parts] for name in names]
    check_feature_alignment(FeatureInputs(*lists, {}), engine="cuda")


# Rows that are never aligned are loaded one by one, and read again beyond eight for each thread.
@pytest.mark.parametrize("width", [35, 700, 2500])
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_teachers_at_every_alignment(width, dtypes):
    inputs = make_inputs(
        FeatureCase("", "", ((3, 48, width),) * 9, bias=True), *DTYPES.get(dtypes, ())
    )
    for offset, teacher in enumerate(inputs.teacher):
        memory = torch.full((offset + 3 * (width + 1),), torch.nan, dtype=teacher.dtype)
        rows = memory.as_strided((3, width), (width + 1, 1), offset)
        inputs.teacher[offset] = rows.copy_(teacher)
    check_feature_alignment(inputs, engine="cuda")


def test_rows_of_weight_zero_are_not_read():
    student, teacher, w = torch.randn(21, 10), torch.randn(21, 1500), torch.randn(1500, 10)
    mask = torch.rand(21) > 0.5

    def run(x, t):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        result = feature_alignment(leaves[0], t, leaves[1], mask=mask, engine="cuda")
        return result.loss.detach(), *torch.autograd.grad(result.loss, leaves)

    wild = torch.where(mask[:, None], student, torch.nan)
    got = run(wild, torch.where(mask[:, None], teacher, torch.inf))
    for value, want in zip(got, run(student, teacher), strict=True):
        assert torch.equal(value, want)
    assert (got[1][~mask] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_reach_the_loss(value):
    student, teacher, w = torch.randn(7, 16), torch.randn(7, 24), torch.randn(24, 16)
    teacher[3, 5] = value
    student.requires_grad_()
    result = feature_alignment(student, teacher, w, engine="cuda")
    assert not torch.isfinite(result.loss)
    result.loss.backward()
    assert not torch.isfinite(student.grad[3]).any()
    assert torch.isfinite(student.grad[2]).all()


@pytest.mark.parametrize("wanted", ["student", "projection", "bias", None])
def test_gradients_exist_where_asked(wanted):
    inputs = make_inputs(CASES_BY_ID["bias"], BF16)
    want = torch.autograd.grad(inputs.call(engine="cuda").loss, list(inputs.leaves.values()))
    for name, leaf in inputs.leaves.items():
        leaf.requires_grad_(name.split("[")[0] == wanted)
    loss = inputs.call(engine="cuda").loss
    assert loss.requires_grad == (wanted is not None)
    for leaf, grad in zip(inputs.leaves.values(), want, strict=True):
        if leaf.requires_grad:
            assert torch.equal(torch.autograd.grad(loss, leaf)[0], grad)


def test_offsets_past_32_bits(kernels):
    result = emulated.run(kernels.program, "far")
    assert result.returncode == 0, result.stderr


def align_features(
    student, teacher, weights, has_weights, coefficients, grads, wants, sums, is_squared, eps
):
    """By the reference: test_cuda_emulated.py proves the kernel."""
    weights, grads = iter(weights), iter(grads)
    pairs = [
        Pair(
            *(x, t, None, None),
            next(weights) if has_weights[index] else None,
            next(grads) if wants[index] else None,
            *(-1, -1, "none"),
        )
        for index, (x, t) in enumerate(zip(student, teacher, strict=True))
    ]
    reference.fill(Problem(pairs, coefficients, sums, [], [], is_squared, eps))


def test_pairs_with_and_without_a_projection():
    cases = ("same-width-many", "bias", "float-mask-same", "weights")
    parts = [make_inputs(CASES_BY_ID[id], seed=seed) for seed, id in enumerate(cases)]
    names = ("student", "teacher", "projection", "bias", "mask")
    lists = [[entry for part in parts for entry in getattr(part, name)] for name in names]
    inputs = FeatureInputs(*lists, {})
    library = torch.library.Library("fakd_ext", "FRAGMENT")
    library.define(schemas("bindings.cpp")["align_features"])
    library.impl("align_features", align_features, "CPU")
    try:
        check_feature_alignment(inputs, engine="cuda", pair_weights=[0.5, 1.0, 2.0, 0.3, 1.5, 0.1])
    finally:
        library._destroy()


def test_the_gram_route_is_refused_in_words():
    inputs = make_inputs(CASES_BY_ID["narrow-student"], BF16)
    with pytest.raises(RuntimeError, match="it takes the direct route alone"):
        inputs.call(engine="cuda", route="gram")


def test_cuda_comes_first(monkeypatch):
    order = _engines.PREFERENCE_OF["feature_alignment"]["cuda"]
    monkeypatch.setitem(_engines.PREFERENCE_OF, "feature_alignment", {"cpu": order})
    monkeypatch.setattr(_engines, "triton_refusal", lambda device, is_double: None)
    inputs = make_inputs(CASES_BY_ID["narrow-student"], F16)
    pytest.importorskip("triton")
    words = explain("feature_alignment", inputs.student, inputs.teacher, inputs.projection)
    assert "served by the cuda engine" in words
    assert "not triton: it could serve, but is asked later" in words
    assert "70 rows, 24 to 160 wide, direct route" in words
    assert "rows of 1 pairs in chunks, 1 in all: P = X W^T by torch, 1 launch" in words
