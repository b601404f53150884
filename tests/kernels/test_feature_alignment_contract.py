"""feature_alignment: bad calls in words, registration, compilation, the forced engine."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import fakd_kernels
from fakd_kernels import feature_alignment
from tests.support.cases import CASES_BY_ID, make_inputs


def _x(*shape, **options):
    return torch.randn(*shape, **options)


def _call(*args, **options):
    return lambda: feature_alignment(*args, **options)


BAD_CALLS = {
    "rank": (_call(_x(8), _x(8)), ValueError, r"student\[0\] must have the shape .*got \[8\]"),
    "rank-4": (_call(_x(1, 1, 2, 8), _x(1, 1, 2, 8)), ValueError, "must have the shape"),
    "tokens": (
        _call(_x(4, 127, 8), _x(4, 128, 8)),
        ValueError,
        r"same tokens .*\[4, 128\] and \[4, 127\]; drop",
    ),
    "widths": (
        _call(_x(4, 8), _x(4, 9)),
        ValueError,
        "projection.* must be given where the widths",
    ),
    "projection": (
        _call(_x(4, 8), _x(4, 9), _x(8, 9)),
        ValueError,
        r"\[Dt, Ds\] = \[9, 8\]: got \[8, 9\]",
    ),
    "bias": (_call(_x(4, 8), _x(4, 9), _x(9, 8), _x(8)), ValueError, r"\[Dt\] = \[9\]: got \[8\]"),
    "bias-alone": (_call(_x(4, 8), _x(4, 8), None, _x(8)), ValueError, "come with a projection"),
    "mask": (
        _call(_x(4, 8), _x(4, 8), mask=torch.ones(5, dtype=torch.bool)),
        ValueError,
        r"one weight per token .*got \[5\]",
    ),
    "mask-int": (
        _call(_x(4, 8), _x(4, 8), mask=torch.ones(4, dtype=torch.long)),
        TypeError,
        r"convert an attention mask with .bool\(\)",
    ),
    "mask-negative": (
        _call(_x(4, 8), _x(4, 8), mask=torch.tensor([1.0, 1.0, -0.5, 1.0])),
        ValueError,
        "finite weights >= 0: got numbers from -0.5 to 1.0",
    ),
    "mask-nan": (
        _call(_x(4, 8), _x(4, 8), mask=torch.tensor([1.0, 1.0, torch.nan, 1.0])),
        ValueError,
        "finite weights >= 0",
    ),
    "integers": (
        _call(torch.ones(4, 8, dtype=torch.int32), _x(4, 8)),
        TypeError,
        "got torch.int32",
    ),
    "complex": (_call(_x(4, 8, dtype=torch.complex64), _x(4, 8)), TypeError, "got torch.complex64"),
    "device": (_call(_x(4, 8), _x(4, 8, device="meta")), ValueError, "on the device of"),
    "empty": (_call([], []), ValueError, "at least one layer pair"),
    "count": (_call([_x(4, 8)], [_x(4, 8)] * 2), ValueError, "got 2 entries for 1 pairs"),
    "count-projection": (
        _call([_x(4, 8)] * 2, [_x(4, 8)] * 2, [_x(8, 8)]),
        ValueError,
        "projection must have one entry per layer pair",
    ),
    "not-a-tensor": (_call([4], [_x(4, 8)]), TypeError, r"student\[0\] must be a tensor: got int"),
    "not-a-list": (_call("student", _x(4, 8)), TypeError, "student must be a tensor or a list"),
    "euclidean": (_call(_x(4, 8), _x(4, 8), euclidean="l2"), ValueError, "'squared', 'distance'"),
    "route": (_call(_x(4, 8), _x(4, 8), route="fast"), ValueError, "route must be one of"),
    "eps": (_call(_x(4, 8), _x(4, 8), eps=0.0), ValueError, "eps must be greater than 0.0"),
    "normalizer": (_call(_x(4, 8), _x(4, 8), normalizer=-1.0), ValueError, "normalizer must be gr"),
    "weight-nan": (_call(_x(4, 8), _x(4, 8), cosine_weight=torch.nan), ValueError, "be finite"),
    "weight-shape": (
        _call(_x(4, 8), _x(4, 8), cosine_weight=_x(2)),
        ValueError,
        "0-dim tensor.*pair_weights",
    ),
    "pair-weights": (
        _call(_x(4, 8), _x(4, 8), pair_weights=[1.0, 2.0]),
        ValueError,
        "pair_weights",
    ),
    "engine": (_call(_x(4, 8), _x(4, 8), engine="fast"), ValueError, "engine must be one of"),
    "engine-float64": (
        _call(_x(4, 8).double(), _x(4, 8), engine="cpu"),
        RuntimeError,
        "float64 is served by the reference engine only",
    ),
    "engine-cuda": (
        _call(_x(4, 8), _x(4, 8), engine="cuda"),
        RuntimeError,
        "it serves CUDA tensors",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_in_words(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def _lowered(case_id: str, grad: bool = True):
    from fakd_kernels.ops.feature_alignment.arguments import lower

    inputs = make_inputs(CASES_BY_ID[case_id])
    for leaf in inputs.leaves.values():
        leaf.requires_grad_(grad)
    arguments = (inputs.student, inputs.teacher, inputs.projection, inputs.bias, inputs.mask)
    lowered = lower(*arguments, 0.5, 2.0, "distance", None, None, 1e-8, "auto", "cpu")[0]
    is_tensor = lambda value: isinstance(value, torch.Tensor)  # noqa: E731
    as_leaf = lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad)  # noqa: E731
    return pytree.tree_map_only(is_tensor, as_leaf, lowered)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "case_id", ["ragged", "shared", "same-width-many", "float-mask", "strided", "empty"]
)
def test_opcheck(case_id, grad):
    torch.library.opcheck(torch.ops.fakd.feature_alignment.default, _lowered(case_id, grad))


def test_opcheck_of_the_scaling_op():
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(
            torch.ops.fakd.scale_gradient.default, (torch.randn(3, 4), torch.tensor(2.0), dtype)
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    shared = torch.randn(24, 16, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)

    def loss(first, second, t1, t2, mask):
        projected = F.gelu(first)
        result = feature_alignment(
            [projected, first, second], [t1, t1, t2], [shared, shared, None], [bias, None, None],
            mask=[mask, mask, None], cosine_weight=0.5,
        )  # fmt: skip
        return 2 * result.loss, result.cosine

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (11, 17):
        first = torch.randn(2, tokens, 16, requires_grad=True)
        second = torch.randn(tokens, 8, requires_grad=True)
        others = torch.randn(2, tokens, 24), torch.randn(tokens, 8), torch.rand(2, tokens) > 0.3
        leaves = [first, second, shared, bias]
        got, got_cosine = compiled(first, second, *others)
        want, want_cosine = loss(first, second, *others)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got_cosine, want_cosine)
        for a, b in zip(
            torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_environment_forces_an_engine(monkeypatch):
    monkeypatch.setenv("FAKD_ENGINE", "reference")
    student = torch.randn(4, 8)
    assert "served by the reference engine" in fakd_kernels.explain(
        "feature_alignment", student, student
    )
    monkeypatch.setenv("FAKD_ENGINE", "quick")
    with pytest.raises(ValueError, match="FAKD_ENGINE must be one of"):
        feature_alignment(student, student)
