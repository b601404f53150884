"""The benchmark suite: what it times is right, and what it writes follows from the results."""

import importlib
import json

import pytest

from benchmarks import harness, plots, record, report
from benchmarks.run import OPS
from benchmarks.shapes import (
    AttentionShape,
    FeatureShape,
    MapShape,
    OutputShape,
    TopShape,
)
from fakd_kernels import engines

TINY = {
    "feature_alignment": (FeatureShape(2, 16, 8, 8), FeatureShape(2, 16, 8, 24)),
    "attention_kl": (
        AttentionShape(1, 1, 20, (4, 4), (8, 16), True, 2),
        AttentionShape(1, 1, 64, (2, 4), (8, 16)),
    ),
    "attention_map_kl": (MapShape(2, 1, 2, 12),),
    "linear_kl": (OutputShape(16, 50, (8, 12)),),
    "logit_kl": (OutputShape(16, 50),),
    "topk_kl": (TopShape(16, 50, 8, 4),),
}
needs_cpu = pytest.mark.skipif(not engines()["cpu"].is_usable, reason="the C++ engine is not built")


def bench_of(op: str):
    return importlib.import_module(f"benchmarks.bench_{op}")


@needs_cpu
@pytest.mark.parametrize("op", TINY)
def test_contenders_agree(op, monkeypatch):
    monkeypatch.setenv("FAKD_BENCH_DEVICE", "cpu")
    for shape in TINY[op]:
        for contender in ("cpu", "reference"):
            harness.check(f"benchmarks.bench_{op}", contender, shape, "float32")
        harness.make_step(bench_of(op), "limit", shape, "float32")()


@needs_cpu
def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setenv("FAKD_BENCH_DEVICE", "cpu")
    bench = bench_of("logit_kl")
    right = bench.loss

    def wrong(contender, *case):
        return right(contender, *case) * (1.001 if contender == "cpu" else 1)

    monkeypatch.setattr(bench, "loss", wrong)
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        harness.check(bench.__name__, "cpu", TINY["logit_kl"][0], "float32")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_quick_shape(op):
    bench = bench_of(op)
    assert bench.OP == op
    assert any(shape.is_quick and not shape.is_big for shape in bench.SHAPES.values())
    assert {"eager", "limit"} <= set(bench.RIVALS)


def test_interleave_gives_every_step_its_turns(monkeypatch):
    monkeypatch.setattr(harness, "SETTLE_SECONDS", 0.0)
    turns = []
    steps = {name: lambda name=name: turns.append(name) for name in "ab"}
    spreads = harness.interleave(steps, seconds=0.0, least=4)
    assert turns == [*"ab", *"abbaabba"]
    assert all(s["p20"] <= s["median"] <= s["p80"] for s in spreads.values())


def test_committed_results_can_be_drawn(tmp_path):
    drawn = plots.draw(record.newest("cpu"), tmp_path)
    assert any(path.name == "ratios.png" for path in drawn)
    assert all(path.stat().st_size > 1000 for path in drawn)


@pytest.mark.parametrize("page", report.TELLERS, ids=lambda page: page.parent.name)
def test_pages_are_written_from_the_results(page):
    text = page.read_text()
    assert report.render(text, report.TELLERS[page]) == text, "run python -m benchmarks.report"


def test_drawings_are_of_the_results():
    """Whatever draws them, they tell the commit that was measured."""
    paths = [path for kind in ("cpu", "cuda") if (path := record.newest(kind))]
    expected = {name: path for path in paths for name in report.drawing_names(path)}
    assert {path.name for path in report.DRAWINGS.iterdir()} == set(expected)
    for name, path in expected.items():
        commit = json.loads(path.read_text())["environment"]["commit"]
        assert commit in (report.DRAWINGS / name).read_text(), "run python -m benchmarks.report"


def test_no_figure_of_a_gpu_is_told_without_a_result():
    written = report.render("".join(report.MARKS), report.headlines)
    assert ("not measured yet" in written) == (record.newest("cuda") is None)


def test_the_page_of_gpu_kernels_is_written_from_its_facts():
    pytest.importorskip("triton")
    aot = importlib.import_module("benchmarks.aot")
    assert aot.page(json.loads(aot.FACTS.read_text())) == aot.PAGE.read_text()
