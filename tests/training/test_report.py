"""The judging sentences, the tables, the drawings and the page."""

import io
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fakd import report
from fakd.config import DataConfig, RunConfig, StudentConfig
from fakd.drawings import draw_curves, draw_layer_map
from fakd.measure import Cost, Costs
from fakd.page import to_table
from fakd.run import RunResults

ROWS = 400
PLAIN, FEATURES, ATTENTION = "labels only", "labels + features", "labels + features + attention"
TERMS = {PLAIN: ("task",), FEATURES: ("task", "cosine"), ATTENTION: ("task", "cosine", "attention")}
COSTS = Costs({"fused": Cost(210.4, 8.81, 6_692_864), "eager": Cost(230.0, 20.2, None)}, "How.")


def run(arm: str, seed: int, errors: list[float], task: str = "classification") -> report.Run:
    mean = sum(errors) / len(errors)
    metrics = {"accuracy": 1 - mean, "macro_f1": 0.5}
    if task == "causal_lm":
        metrics = {"perplexity": 10 * mean}
    student = StudentConfig(layers=3)
    config = RunConfig(task, "t", student, DataConfig("r8"), Path("out") / f"{arm}-{seed}", steps=9)
    results = RunResults(
        data="Tiny <texts>.",
        teacher=dict.fromkeys(metrics, 0.9),
        start=dict.fromkeys(metrics, 0.1),
        student=metrics,
        best_step=9,
        steps=9,
        parameters={"teacher": 22_700_000, "student": 7_300_000},
        layers={"teacher": 6, "student": 3},
        widths={"teacher": 384, "student": 192},
        pairs=[(1, 2), (3, 6)] if arm != PLAIN else [],
        seconds=60.0,
        environment="torch 1",
    )
    terms = TERMS.get(arm, ("task",))
    log = [
        {"step": step} | {f"{w}{term}": 2.0 / step for term in terms for w in ("", "weighted_")}
        for step in (5, 10, 15)
    ]
    return report.Run(config.output.name, config, results, {"test": errors}, log)


def wrong(count: int, offset: int = 0) -> list[float]:
    """So many of the rows."""
    bad = {(offset + 7 * index) % ROWS for index in range(count)}
    return [float(row in bad) for row in range(ROWS)]


def make(*counts: tuple[int, ...]) -> dict[str, list[report.Run]]:
    """Arms with so many wrong rows by seed."""
    return {
        arm: [run(arm, seed, wrong(count, seed)) for seed, count in enumerate(by_seed)]
        for arm, by_seed in zip(TERMS, counts, strict=False)
    }


@pytest.mark.parametrize(
    ("plain", "features", "match"),
    [
        ((100, 104), (40, 52), r": better, beyond noise\. accuracy 74\.5 % to 88\.5 %"),
        ((40, 52), (100, 104), r": worse, beyond noise\. accuracy 88\.5 % to 74\.5 %"),
        ((100, 100), (99, 40), r": maybe better: every seed is, but not every one"),
        ((100, 40), (40, 50), r": no clear difference: the change is within noise"),
        ((100, 100), (100, 100), r"seed \+0\.0 ± 0\.0 %, \+0\.0 ± 0\.0 %"),
        ((100,), (40,), r"beyond noise \(one seed only: not a safe conclusion\)"),
    ],
)
def test_verdict_follows_from_the_numbers(plain, features, match):
    (line,) = report.verdict(make(plain, features))
    assert line.startswith(f"{FEATURES} against {PLAIN}: ")
    assert re.search(match, line)


def test_every_arm_is_judged_against_the_first_and_the_one_before():
    lines = report.verdict(make((100, 104), (40, 52), (38, 51)))
    assert [line.partition(":")[0] for line in lines] == [
        f"{FEATURES} against {PLAIN}",
        f"{ATTENTION} against {PLAIN}",
        f"{ATTENTION} against {FEATURES}",
    ]
    assert "maybe better" in lines[2]


def test_verdict_gives_the_noise_of_every_seed():
    # 60 and 52 rows of 400 change from wrong to right, and none the other way.
    noises = [200 * (n / 399 * (1 - n / 400) / 400) ** 0.5 for n in (60, 52)]
    expected = f"seed -15.0 ± {noises[0]:.1f} %, -13.0 ± {noises[1]:.1f} %."
    assert expected in report.verdict(make((100, 104), (40, 52)))[0]


def test_verdict_on_language_models_is_by_set():
    arms = {}
    for name, losses in (("plain", [2.0, 3.0, 4.0]), ("distilled", [1.0, 1.1, 0.9])):
        made = run(name, 0, losses, "causal_lm")
        made.errors["plays"] = [5.0, 5.0, 5.0]
        made.results.student["plays/perplexity"] = 148.4
        arms[name] = [made]
    speeches, plays = report.verdict(arms)
    assert re.search(r"better, beyond.*; mean cross-entropy by seed -2\.000 ± 1\.2", speeches)
    assert "perplexity 30.0 to 10.0;" in speeches
    assert plays.startswith("distilled against plain (plays): no clear difference")
    assert "perplexity 148.4 to 148.4;" in plays


def test_what_cannot_be_compared_is_not_judged():
    arms = make((100, 104), (40, 52))
    arms[FEATURES][0].errors["test"].pop()
    assert report.verdict(arms) == []
    assert report.verdict(make((100, 104), (40,))) == []


def test_paired_change():
    change, noise = report.paired_change([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert change == pytest.approx(-2.0)
    assert noise == pytest.approx(2 / 3**0.5)
    assert report.paired_change([2.0], [1.0]) == (-1.0, float("inf"))


def test_tables():
    columns, rows = report.score_rows(make((100, 104), (40, 52)))
    assert columns == ["model", "accuracy", "macro_f1", "weights"]
    assert [row[0] for row in rows] == [
        "teacher",
        "student at the start",
        "student, labels only",
        "student, labels + features",
    ]
    assert rows[0][1:] == ["90.0 %", "90.0 %", "22.7 M"]
    assert rows[2][1] == "74.5 % ± 0.7"
    assert report.cost_rows(COSTS)[1] == [
        ["fused", "210", "8.8", "6.7"],
        ["eager", "230", "20.2", "not measured"],
    ]


def test_trainings_of_two_tasks_have_each_their_own_scores(tmp_path):
    arms = make((100,)) | {"speeches": [run("speeches", 0, [2.0, 3.0], "causal_lm")]}
    columns, rows = report.score_rows(arms)
    assert columns == ["model", "accuracy", "macro_f1", "perplexity", "weights"]
    assert rows[-2][1:4] == ["75.0 %", "50.0 %", ""]
    assert rows[-1][1:4] == ["", "", "25.0"]
    assert [row[0] for row in rows].count("teacher") == 2
    arms["speeches"][0] = replace(
        arms["speeches"][0], results=replace(arms["speeches"][0].results, data="Speeches.")
    )
    assert report.verdict(arms) == []
    report.write_page(arms, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<p>Tiny &lt;texts&gt;.</p>" in page
    assert "<p>Speeches.</p>" in page


def test_tables_fit_a_terminal():
    console = Console(width=100, record=True, file=io.StringIO())
    arms = make((100, 104), (40, 52), (40, 50))
    console.print(to_table("Held-out rows", *report.score_rows(arms)))
    text = console.export_text()
    for name in arms:
        assert f"student, {name} " in text


def test_the_page_is_complete_and_escaped(tmp_path):
    arms = make((100, 104), (40, 52), (40, 50))
    path = tmp_path / "new" / "page.html"
    report.write_page(arms, path, "Alignment on <tiny>", COSTS, arms[PLAIN][0].config)
    page = path.read_text(encoding="utf-8")
    assert "<h1>Alignment on &lt;tiny&gt;</h1>" in page
    for line in report.verdict(arms):
        assert f"<p class='verdict'>{line}</p>" in page
    assert page.count("<svg") == 2
    assert page.count("<table>") == 2
    assert "Of the teacher:" in page
    # Self-contained: nothing is loaded from elsewhere.
    assert not re.search(r"<(script|link|img)|src=", page)


def test_drawings_are_well_formed():
    arms = make((100, 104), (40, 52), (40, 50))
    curves = draw_curves({name: [each.log for each in runs] for name, runs in arms.items()})
    sizes = {"student": 3, "teacher": 6}, {"student": 192, "teacher": 384}
    layer_map = draw_layer_map([(0, 0), (3, 6)], *sizes)
    for svg in (curves, layer_map):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    for text in (*arms, "attention"):
        assert text in curves
    for text in ("embeddings", "layer 6", "student, 192 wide", "teacher, 384 wide"):
        assert text in layer_map


def test_rows_of_other_data_are_not_compared_one_by_one():
    arms = make((100, 104), (40, 52))
    assert len(report.verdict(arms)) == 1
    arms[FEATURES] = [
        replace(run, results=replace(run.results, rows="others")) for run in arms[FEATURES]
    ]
    assert report.verdict(arms) == []


def test_correlations_are_no_percentages():
    assert report._number("pearson", 0.1184) == "0.118"
    assert report._number("accuracy", 0.1184) == "11.8 %"
