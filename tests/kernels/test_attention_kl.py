"""attention_kl on the reference and C++ engines, against the float64 formula."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from fakd_kernels import attention_kl, explain
from tests.support.attention_cases import CASES, CASES_BY_ID, AttentionCase, make_inputs
from tests.support.attention_checks import check, results

ENGINES = ("reference", "cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"f32": (F32, F32), "bf16": (BF16, BF16), "f16": (F16, F16), "bf16-f32": (BF16, F32)}
DISTANCES = ("kl", "reverse_kl", "jsd", "mse")
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize(
    ("engine", "dtypes"), [(engine, dtypes) for engine in ENGINES for dtypes in DTYPES]
)
def test_value_and_gradients(case, engine, dtypes):
    inputs = make_inputs(case, *DTYPES[dtypes])
    for distance in DISTANCES:
        check(inputs, engine, distance=distance)


def test_formula_by_hand():
    scores = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    q, k = scores.log_softmax(-1)[None, None], torch.eye(2)[None, None]
    teacher = torch.tensor([[1.0, 1.0], [0.0, 0.5]])[None, None]
    got = attention_kl(q, k, teacher, k, student_scale=1.0, teacher_scale=1.0)
    want = (
        F.kl_div(scores.log_softmax(-1), teacher[0, 0].softmax(-1), reduction="none").sum(-1).mean()
    )
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck_of_the_reference_engine(heads, distance):
    case = AttentionCase("", "", ((1, 5, (2, 1, 3), (2, 2, 4)),), mask="float")
    inputs = make_inputs(case).double()
    options = {"heads": heads, "distance": distance, "causal": True, "student_softcap": 3.0}

    def loss(*_):
        return inputs.call(engine="reference", **options).loss

    assert torch.autograd.gradcheck(loss, list(inputs.leaves.values()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(engine, distance):
    inputs = make_inputs(CASES_BY_ID["equal"])
    got = results(inputs, reference=False, engine=engine, distance=distance)
    assert abs(got["loss"].item()) < 1e-6
    assert all(got[name].abs().max() < 1e-6 for name in inputs.leaves)


@pytest.mark.parametrize("engine", ENGINES)
def test_masked_tokens_are_not_read(engine):
    inputs = make_inputs(CASES_BY_ID["holes"])
    hostile = make_inputs(CASES_BY_ID["holes"])
    away = ~hostile.mask[0][:, None, :, None]
    with torch.no_grad():
        for group in hostile.tensors:
            group[0].masked_fill_(away, 1e30 if engine == "reference" else torch.nan)
    for name, value in results(hostile, reference=False, engine=engine).items():
        want = results(inputs, reference=False, engine=engine)[name]
        torch.testing.assert_close(value, want)


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_reaches_the_loss(engine):
    inputs = make_inputs(CASES_BY_ID["plain"])
    with torch.no_grad():
        inputs.tensors[0][0][1, 2, 7, 3] = torch.nan
    assert inputs.call(engine=engine).loss.isnan()


@pytest.mark.parametrize("engine", ENGINES)
def test_only_what_is_trained_gets_a_gradient(engine):
    inputs = make_inputs(CASES_BY_ID["gqa"])
    inputs.tensors[1][0].requires_grad_(False)
    inputs.tensors[2][0].requires_grad_()
    inputs.call(engine=engine).loss.backward()
    assert inputs.tensors[0][0].grad is not None
    assert inputs.tensors[1][0].grad is None
    assert inputs.tensors[2][0].grad is None
    with torch.no_grad():
        assert not inputs.call(engine=engine).loss.requires_grad


def test_learned_weight_receives_its_gradient():
    inputs = make_inputs(CASES_BY_ID["plain"])
    weight = torch.tensor(0.3, requires_grad=True)
    result = inputs.call(weight=weight)
    result.loss.backward()
    assert weight.grad.item() == pytest.approx(result.per_pair.mean().item(), rel=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_threads(threads):
    before = torch.get_num_threads()
    inputs = make_inputs(CASES_BY_ID["ragged"])
    want = results(inputs, reference=False, engine="cpu")
    try:
        torch.set_num_threads(threads)
        got = results(inputs, reference=False, engine="cpu")
    finally:
        torch.set_num_threads(before)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-7)


@pytest.fixture
def many_threads():
    before = torch.get_num_threads()
    yield lambda: torch.set_num_threads(24)
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("is_masked", [False, True])
def test_query_rows_that_threads_share(dtype, causal, window, is_masked, many_threads):
    """Of few heads: each range of rows packs, and gives gradients to, the keys that it meets."""
    torch.manual_seed(0)
    student = [torch.randn(1, heads, 700, 48).to(dtype).requires_grad_() for heads in (2, 1)]
    teacher = [torch.randn(1, 2, 700, 16).to(dtype) for _ in range(2)]
    mask = torch.rand(1, 700) > 0.3 if is_masked else None
    found = []
    for _ in range(2):
        loss = attention_kl(
            *student, *teacher, causal=causal, window=window, mask=mask, engine="cpu"
        ).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, student)])
        many_threads()
    for alone, shared in zip(*found, strict=True):
        apart = (alone - shared).float().norm() / alone.float().norm()
        assert apart < (1e-6 if dtype == F32 else 3e-3)


WINDOWED = r"""
import re
import torch
from fakd_kernels import attention_kl

def megabytes(name):
    return int(re.search(name + r":\s*(\d+)", open("/proc/self/status").read())[1]) / 1e3

torch.set_num_threads(64)
student = [torch.randn(1, 1, 16384, 64, requires_grad=True) for _ in range(2)]
teacher = [torch.randn(1, 1, 16384, 64) for _ in range(2)]
before = megabytes("VmRSS")
loss = attention_kl(*student, *teacher, causal=True, window=256, engine="cpu").loss
torch.autograd.grad(loss, student)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_under_a_window_hardly_grows_with_threads():
    """It was 1.6 GB where every thread packed all keys; the inputs are 17 MB."""
    run = subprocess.run([sys.executable, "-c", WINDOWED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 300


def _q(*shape, **options):
    return torch.randn(*shape, **options)


def _call(*tensors, **options):
    return lambda: attention_kl(*tensors, **options)


_FOUR = [_q(2, 4, 6, 8)] * 4
BAD_CALLS = {
    "rank": (_call(*[_q(2, 6, 8)] * 4), ValueError, r"student_q\[0\] must have the shape \[B, H"),
    "tokens": (_call(*_FOUR[:3], _q(2, 4, 7, 8)), ValueError, "batch and tokens of student_q"),
    "width": (
        _call(_q(2, 4, 6, 8), _q(2, 4, 6, 9), *_FOUR[:2]),
        ValueError,
        "as wide as student_q",
    ),
    "groups": (_call(_q(2, 4, 6, 8), _q(2, 3, 6, 8), *_FOUR[:2]), ValueError, "divides that of"),
    "match": (
        _call(*_FOUR[:2], _q(2, 8, 6, 8), _q(2, 8, 6, 8)),
        ValueError,
        "got 4 .student. and 8 .teacher.; use 'mean'",
    ),
    "heads": (_call(*_FOUR, heads="sum"), ValueError, "'match', 'mean'"),
    "heads-count": (_call(*_FOUR, heads=[0, 1]), ValueError, "one entry per student head"),
    "heads-range": (_call(*_FOUR, heads=[0, 1, 2, 4]), ValueError, "from 0 to 3 .* got 4"),
    "mask": (_call(*_FOUR, mask=torch.ones(2, 6, 6).bool()), ValueError, "not one of T x T"),
    "mask-int": (_call(*_FOUR, mask=torch.ones(2, 6).long()), TypeError, "bool or floating"),
    "mask-negative": (_call(*_FOUR, mask=-torch.ones(2, 6)), ValueError, "weights >= 0"),
    "window": (_call(*_FOUR, window=0), ValueError, "window must be at least 1"),
    "window-float": (_call(*_FOUR, window=2.5), TypeError, "window must be None or an int"),
    "causal": (_call(*_FOUR, causal=1), TypeError, "causal must be a bool"),
    "causal-count": (_call(*_FOUR, causal=[True] * 2), ValueError, "causal must have one entry"),
    "window-list": (_call(*_FOUR, window=[0]), ValueError, r"window\[0\] must be at least 1"),
    "temperature": (_call(*_FOUR, temperature=0.0), ValueError, "temperature must be greater"),
    "softcap": (_call(*_FOUR, student_softcap=-1.0), ValueError, "student_softcap must be gr"),
    "scale": (_call(*_FOUR, teacher_scale=torch.inf), ValueError, "teacher_scale must be finite"),
    "distance": (_call(*_FOUR, distance="l2"), ValueError, "distance must be one of"),
    "integers": (_call(*[t.int() for t in _FOUR]), TypeError, "got torch.int32"),
    "count": (_call([_FOUR[0]] * 2, *[[t] for t in _FOUR[1:]]), ValueError, "one entry per layer"),
    "engine-double": (
        _call(*[t.double() for t in _FOUR], engine="cpu"),
        RuntimeError,
        "float64 is served by the reference engine only",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_in_words(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case_id", ["ragged", "mean", "float", "softcap"])
def test_opcheck(case_id, grad):
    from fakd_kernels.ops.attention_kl.arguments import lower

    torch.use_deterministic_algorithms(False)
    inputs = make_inputs(CASES_BY_ID[case_id])
    for leaf in inputs.leaves.values():
        leaf.requires_grad_(grad)
    defaults = {
        "causal": False, "window": None, "student_scale": None, "teacher_scale": None,
        "student_softcap": None, "teacher_softcap": None, "temperature": 1.0, "heads": "match",
        "distance": "kl", "weight": 1.0, "pair_weights": None, "normalizer": None, "engine": None,
    }  # fmt: skip
    lowered, _ = lower(*inputs.tensors, inputs.mask, **defaults | inputs.options)
    lowered = pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), lowered
    )
    torch.library.opcheck(torch.ops.fakd.attention_kl.default, lowered)


def test_compiles_whole_with_dynamic_shapes():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()

    def loss(q, k, teacher_q, teacher_k, mask):
        return attention_kl(q, k, teacher_q, teacher_k, mask=mask, causal=True, window=5).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (11, 17):
        leaves = [_q(2, 4, tokens, 8, requires_grad=True), _q(2, 2, tokens, 8, requires_grad=True)]
        others = _q(2, 4, tokens, 16), _q(2, 4, tokens, 16), torch.rand(2, tokens) > 0.3
        got, want = compiled(*leaves, *others), loss(*leaves, *others)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_explain_says_who_serves():
    assert "served by the cpu engine" in explain("attention_kl", *_FOUR)
    text = explain("attention_kl", *[t.double() for t in _FOUR])
    assert "served by the reference engine" in text
    assert "not cpu: float64 is served by the reference engine only" in text
