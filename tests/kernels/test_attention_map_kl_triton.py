"""The Triton engine of attention_map_kl in Triton's interpreter, on a CPU, against the oracle.

Run as `TRITON_INTERPRET=1 pytest tests/kernels/test_attention_map_kl_triton.py`: Triton reads the
variable when it is first imported, so the whole process must have it.
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

from fakd_kernels import _triton, attention_map_kl, explain
from fakd_kernels.ops.attention_map_kl import dispatch, triton_kernel
from tests.kernels.test_attention_map_kl import (
    BF16,
    CASES,
    CASES_BY_ID,
    DISTANCES,
    DTYPES,
    F32,
    MapCase,
    check_excluded_keys,
    make,
    results,
)
from tests.support import accuracy
from tests.support.accuracy import assert_accurate
from tests.support.interpreter import prepare_once

prepare_once()
INPUTS = ("probabilities", "scores")
pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    # numpy's, of elements that a mask takes off afterwards
    pytest.mark.filterwarnings("ignore:(invalid|overflow|divide by|All-NaN):RuntimeWarning"),
]


def check(students, teachers, masks, options, distances=DISTANCES):
    double = [s.detach().double().requires_grad_() for s in students]
    for distance in distances:
        options = options | {"distance": distance}
        truth = results(double, [t.double() for t in teachers], masks, options)
        eager = results(students, teachers, masks, options)
        for name, value in results(students, teachers, masks, options, "triton").items():
            dtype = students[0].dtype if name.startswith("grad") else F32
            assert value.dtype == dtype
            assert_accurate(f"{distance} {name}", value, truth[name], eager[name], dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_value_and_gradients(case, inputs, dtypes):
    check(*make(case, inputs, DTYPES[dtypes]), {"inputs": inputs} | case.options)


@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 128, 130])
@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_tiles_of_every_kind(tokens, heads, inputs):
    """Rows that fill a tile or not, of one tile or several; a causal window and a temperature."""
    case = MapCase("", "", ((1, tokens, 2, 2),), mask="float")
    options = {"inputs": inputs, "heads": heads, "causal": True, "window": 100}
    options |= {"temperature": 1.7} if inputs == "scores" else {}
    check(*make(case, inputs), options, ("kl", "jsd") if tokens == 130 else ("kl",))


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("apart", [1e-2, 1e-3])
def test_near_equal_sides(apart, inputs, heads, monkeypatch):
    students, _, masks = make(MapCase("", "", ((1, 70, 2, 2),)), "scores")
    generator = torch.Generator().manual_seed(1)
    scores = [students[0].detach()]
    scores.append(scores[0] + apart * torch.randn(scores[0].shape, generator=generator))
    student, teacher = [s.softmax(-1) if inputs == "probabilities" else s for s in scores]
    call = [student.requires_grad_()], [teacher], masks, {"inputs": inputs, "heads": heads}
    check(*call, ("kl", "reverse_kl", "jsd"))
    if (inputs, heads) == ("probabilities", "mean"):
        # The loss is a sum of what is left of numbers a hundred times as large, each rounded: of
        # one number, the error of eager is a matter of luck.
        monkeypatch.setattr(accuracy, "FLOOR_UNITS", 8)
    check(*call, ("mse",))


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("tokens", [9, 70])
@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_scores_give_nothing(tokens, heads, distance):
    case = MapCase("", "", ((1, tokens, 2, 2),), spread=10.0, is_equal=True)
    options = {"inputs": "scores", "heads": heads, "distance": distance}
    got = results(*make(case, "scores", (BF16, BF16)), options, "triton")
    assert got["loss"].abs() < 1e-6
    assert got["grad[0]"].abs().max() < 1e-6
    if distance == "kl":
        assert not got["grad[0]"].any()


@pytest.mark.parametrize("heads", ["match", "mean"])
def test_jsd_of_keys_that_one_side_excludes(heads):
    check_excluded_keys("triton", heads)


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("tokens", [12, 70])
@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(F32).min])
def test_masked_scores_may_be_minus_infinity(low, tokens, heads):
    """As models hand over scores to which they have added a mask."""
    away = torch.ones(tokens, tokens).triu(1).bool()
    student, teacher = (torch.randn(1, 2, tokens, tokens) for _ in range(2))
    for distance in DISTANCES if tokens == 12 or low == -torch.inf else ("kl",):
        options = {"inputs": "scores", "heads": heads, "distance": distance, "engine": "triton"}
        want = attention_map_kl(student, teacher, causal=True, **options).loss
        maps = [s.masked_fill(away, low).requires_grad_() for s in (student, teacher)]
        for is_causal in (True, False):
            got = attention_map_kl(*maps, causal=is_causal, **options).loss
            torch.testing.assert_close(got, want)
            assert torch.autograd.grad(got, maps[0])[0].isfinite().all()


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_masked_tokens_have_no_effect(value, inputs, heads):
    students, teachers, masks = make(MapCase("", "", ((1, 70, 2, 2),), "holes"), inputs)
    options = {"inputs": inputs, "heads": heads}
    want = results(students, teachers, masks, options, "triton")
    away = ~masks[0]
    with torch.no_grad():
        for maps in (students[0], teachers[0]):
            maps.masked_fill_(away[:, None, :, None] | away[:, None, None, :], value)
    got = results(students, teachers, masks, options, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("side", [0, 1])
def test_nan_reaches_the_loss(side, inputs, heads):
    for tokens in (9, 70):
        students, teachers, _ = make(MapCase("", "", ((1, tokens, 2, 2),)), inputs)
        with torch.no_grad():
            (students, teachers)[side][0][0, 1, 5, 3] = torch.nan
        for distance in DISTANCES if tokens == 9 else ("kl", "mse"):
            options = {"inputs": inputs, "heads": heads, "distance": distance}
            result = attention_map_kl(students, teachers, engine="triton", **options)
            assert result.loss.isnan()
            assert result.per_head[0].isnan().tolist() == ([True] if heads == "mean" else [0, 1])


KERNELS = {
    ("probabilities", "match"): "probabilities_kernel",
    ("scores", "match"): "scores_kernel",
    ("probabilities", "mean"): "mean_probabilities_kernel",
    ("scores", "mean"): "mean_scores_kernel",
}


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("count", [1, 5])
def test_launches_do_not_grow_with_the_number_of_pairs(count, inputs, heads):
    pairs = tuple((1 + index % 2, 9 + index, 3, 3) for index in range(count))
    students, teachers, masks = make(MapCase("", "", pairs, "holes"), inputs)
    masks[0] = None
    with _triton.record_launches() as launches:
        attention_map_kl(
            students, teachers, mask=masks, inputs=inputs, heads=heads, engine="triton"
        )
    assert [name for name, _ in launches] == [KERNELS[inputs, heads], "reduce_kernel"]


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_values_alone_without_gradients_and_equal_bits(inputs, heads):
    case = MapCase("", "", ((1, 20, 2, 2), (1, 70, 2, 2)), "float", options={"causal": True})
    students, teachers, masks = make(case, inputs, (BF16, BF16))
    options = {"inputs": inputs, "heads": heads} | case.options
    first, second = (results(students, teachers, masks, options, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        alone = attention_map_kl(students, teachers, mask=masks, engine="triton", **options)
    assert torch.equal(alone.loss, first["loss"])


@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_neighbours_of_a_gradient_are_not_touched(inputs, heads, monkeypatch):
    """Every row of the gradient lies between sentinels, in a row of a larger tensor."""
    for tokens in (13, 70):
        students, teachers, masks = make(MapCase("", "", ((1, tokens, 2, 2),), "holes"), inputs)
        whole = torch.full((1, 4, tokens + 2, tokens + 20), 7.0)
        grad = whole[:, 1:-1, 1:-1, 10:-10]

        def fill(problem, grad=grad):
            triton_kernel.fill(replace(problem, pairs=[replace(problem.pairs[0], grad=grad)]))

        monkeypatch.setitem(dispatch.FILL, "triton", fill)
        attention_map_kl(
            students, teachers, mask=masks, inputs=inputs, heads=heads, engine="triton"
        )
        assert (grad != 7).all()
        grad.fill_(7.0)
        assert (whole == 7).all()


@pytest.mark.parametrize("heads", ["match", "mean"])
def test_views_of_larger_tensors(heads):
    """Slices, transposed heads, and a batch that is expanded."""
    for inputs in INPUTS:
        case = MapCase("", "", ((2, 21, 3, 3),), "float")
        students, teachers, masks = make(case, inputs)
        wide = torch.full((21, 3, 2, 40), torch.nan)
        moved = wide.permute(2, 1, 0, 3)[..., 5:26]
        moved.copy_(students[0].detach())
        teachers = [teachers[0][:1].expand(2, -1, -1, -1)]
        check([moved.requires_grad_()], teachers, masks, {"inputs": inputs, "heads": heads})


@pytest.mark.parametrize("heads", ["match", "mean"])
def test_offsets_past_32_bits(heads):
    """A head begins 2^31 elements after the one before; memory between them is never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    students, teachers, masks = make(MapCase("", "", ((1, 6, 2, 2),)), "scores", (BF16, BF16))
    options = {"inputs": "scores", "heads": heads}
    want = results(students, teachers, masks, options, "triton")
    far = torch.empty(2**31 + 36, dtype=BF16).as_strided((1, 2, 6, 6), (0, 2**31, 6, 1))
    far.copy_(students[0].detach())
    got = results([far.detach().requires_grad_()], teachers, masks, options, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)
    far.copy_(teachers[0])
    got = results(students, [far], masks, options, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_empty_maps_give_nothing():
    for shape in ((0, 2, 5, 5), (1, 2, 0, 0)):
        maps = torch.rand(shape).requires_grad_()
        loss = attention_map_kl(maps, maps.detach(), engine="triton").loss
        assert loss == 0
        assert torch.autograd.grad(loss, maps)[0].shape == shape


def test_refusals_and_explanations_in_words():
    students, teachers, _ = make(CASES_BY_ID["plain"], "scores")
    words = explain("attention_map_kl", students, teachers, engine="triton")
    assert words.startswith("attention_map_kl: served by the triton engine.")
    with pytest.raises(RuntimeError, match="float64 is served by the reference engine only"):
        attention_map_kl(students[0].double(), teachers[0], engine="triton")
