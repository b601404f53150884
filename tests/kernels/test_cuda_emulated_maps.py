"""attention_map_kl by the dual-softmax CUDA kernels on a CPU, see test_cuda_emulated_outputs.py."""

import pytest
import torch

from fakd_kernels import _engines, attention_map_kl, explain
from tests.kernels.test_attention_map_kl import (
    CASES,
    CASES_BY_ID,
    DISTANCES,
    DTYPES,
    F32,
    MapCase,
    make,
    results,
)
from tests.kernels.test_cuda_emulated_outputs import emulated_outputs, kernels  # noqa: F401
from tests.support.accuracy import assert_accurate

pytestmark = pytest.mark.usefixtures("nan_filled_memory", "emulated_outputs")
HEADWISE = [case for case in CASES if case.options.get("heads") != "mean"]


def check(case, inputs, dtypes, distances=DISTANCES):
    students, teachers, masks = make(case, inputs, DTYPES[dtypes])
    double = [s.detach().double().requires_grad_() for s in students]
    for distance in distances:
        options = {"inputs": inputs, "distance": distance} | case.options
        truth = results(double, [t.double() for t in teachers], masks, options)
        eager = results(students, teachers, masks, options)
        for name, value in results(students, teachers, masks, options, "cuda").items():
            dtype = students[0].dtype if name.startswith("grad") else F32
            assert value.dtype == dtype
            assert_accurate(f"{distance} {name}", value, truth[name], eager[name], dtype)


@pytest.mark.parametrize("case", HEADWISE, ids=lambda case: case.id)
@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
def test_value_and_gradients(case, inputs):
    check(case, inputs, "f32")


@pytest.mark.parametrize("id", ["float", "causal", "heads"])
@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
@pytest.mark.parametrize("dtypes", ["bf16", "f16", "bf16-f32"])
def test_half_precision(id, inputs, dtypes):
    check(CASES_BY_ID[id], inputs, dtypes, ("kl", "mse"))


def test_more_heads_than_a_launch_takes():
    check(MapCase("", "", ((1, 3, 31, 31), (2, 4, 2, 2))), "scores", "f32", ("kl",))


def test_masked_scores_may_be_minus_infinity():
    """As models hand over scores to which they have added a mask."""
    away = torch.ones(12, 12).triu(1).bool()
    student, teacher = (torch.randn(1, 2, 12, 12) for _ in range(2))
    want = attention_map_kl(student, teacher, inputs="scores", causal=True, engine="cuda").loss
    for low in (-torch.inf, torch.finfo(F32).min):
        maps = [s.masked_fill(away, low).requires_grad_() for s in (student, teacher)]
        got = attention_map_kl(*maps, inputs="scores", engine="cuda").loss
        torch.testing.assert_close(got, want)
        assert torch.autograd.grad(got, maps[0])[0].isfinite().all()


def test_masked_rows_are_not_read():
    students, teachers, masks = make(CASES_BY_ID["holes"], "scores")
    want = results(students, teachers, masks, {"inputs": "scores"}, "cuda")
    away = ~masks[0]
    with torch.no_grad():
        students[0].masked_fill_(away[:, None, :, None] | away[:, None, None, :], torch.nan)
    got = results(students, teachers, masks, {"inputs": "scores"}, "cuda")
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0)


def test_averaged_heads_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(_engines, "PREFERENCE", {"cpu": _engines.PREFERENCE["cuda"]})
    maps = torch.full((2, 3, 6, 6), 1 / 6)
    assert "served by the cuda engine" in explain("attention_map_kl", maps, maps)
    words = explain("attention_map_kl", maps, maps, heads="mean")
    assert "not cuda: it compares head by head" in words
