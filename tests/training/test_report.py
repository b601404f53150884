"""Scores, the judging sentence, the tables and the drawings."""

import io
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fakd import report
from fakd.measure import Cost
from fakd.page import to_table

TRUTH = [index % 4 for index in range(400)]


def predictions(wrong: int, offset: int = 0) -> list[int]:
    """The truth, but for so many rows."""
    bad = {(offset + 7 * index) % len(TRUTH) for index in range(wrong)}
    return [(t + 1) % 4 if row in bad else t for row, t in enumerate(TRUTH)]


# What the log of each way of training holds.
TERMS = {
    "teacher": ("task",),
    report.LABELS_ONLY: ("task",),
    report.WITH_FEATURES: ("task", "cosine", "euclidean"),
    report.WITH_ATTENTION: ("task", "cosine", "euclidean", "attention"),
}


def trained(name: str, seed: int, wrong: int) -> report.Trained:
    predicted = predictions(wrong, offset=seed)
    log = [{"step": step} | dict.fromkeys(TERMS[name], 2.0 / step) for step in (5, 10, 15)]
    return report.Trained(name, seed, 7_300_000, predicted, report.score(TRUTH, predicted), log)


def results(labels_only=(100, 104), with_features=(40, 52), with_attention=()) -> report.Results:
    arms = {
        report.LABELS_ONLY: labels_only,
        report.WITH_FEATURES: with_features,
        report.WITH_ATTENTION: with_attention,
    }
    students = [
        trained(name, seed, wrong) for name, arm in arms.items() for seed, wrong in enumerate(arm)
    ]
    return report.Results(
        title="Alignment on <tiny>",
        setting="One sentence.",
        truth=TRUTH,
        teacher=trained("teacher", 0, 20),
        students=students,
        pairs=[(1, 2), (3, 6)],
        layers=(3, 6),
        widths=(192, 384),
        costs={"fused": Cost(210.4, 8.81, 6_692_864), "eager": Cost(230.0, 20.2, None)},
        cost_setting="How it was measured.",
        environment="torch 1",
    )


def test_scores():
    assert report.score([0, 0, 1, 1], [0, 0, 1, 0]) == report.Scores(
        0.75, pytest.approx((0.8 + 2 / 3) / 2)
    )
    # A class that is never predicted counts with 0, without a warning.
    assert report.score([0, 1], [0, 0]).macro_f1 == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("labels_only", "with_features", "match"),
    [
        ((100, 104), (40, 52), r"^Feature alignment helped: every seed .* Accuracy \+14\.0"),
        ((40, 52), (100, 104), r"^Feature alignment hurt: every seed .* Accuracy -14\.0"),
        ((100, 100), (99, 40), r"^Feature alignment may have helped: .* Accuracy \+7\.6"),
        ((100, 40), (40, 50), r"^Feature alignment made no clear difference: .* Accuracy \+6\.2"),
        (
            (100, 100),
            (100, 100),
            r"^Feature alignment made no clear difference: .* Accuracy \+0\.0 points",
        ),
        ((100,), (40,), r"more than noise \(one seed only: not a safe conclusion\)"),
    ],
)
def test_verdict_follows_from_the_numbers(labels_only, with_features, match):
    assert re.search(match, report.verdict(results(labels_only, with_features)))


@pytest.mark.parametrize(
    ("with_attention", "added"),
    [
        ((10, 12), "Attention added to features helped: every seed gains by more than noise"),
        ((80, 90), "Attention added to features hurt: every seed loses by more than noise"),
        ((38, 51), "Attention added to features may have helped: every seed gains, not every one"),
        ((44, 50), "Attention added to features made no clear difference: the change is within"),
    ],
)
def test_verdict_on_attention_compares_with_labels_and_with_features(with_attention, added):
    lines = report.verdict(results(with_attention=with_attention)).split("\n")
    assert lines[0] == report.verdict(results())
    assert lines[1].startswith("Feature and attention alignment helped: every seed gains")
    assert lines[2].startswith(added)
    gain = (sum((40, 52)) - sum(with_attention)) / 2 / 4
    assert f"Accuracy {gain:+.1f} points" in lines[2]


def test_verdict_gives_the_noise_of_every_seed():
    # 60 and 52 rows of 400 change from wrong to right, and none the other way.
    noises = [200 * (n / 399 * (1 - n / 400) / 400) ** 0.5 for n in (60, 52)]
    expected = f"+15.0 ± {noises[0]:.1f}, +13.0 ± {noises[1]:.1f})"
    assert expected in report.verdict(results())


def test_tables():
    columns, rows = report.score_rows(results())
    assert columns == ["model", "accuracy %", "macro-F1 %", "weights"]
    assert [row[0] for row in rows] == [
        "teacher",
        "student, labels only",
        "  seed 0",
        "  seed 1",
        "student, labels + features",
        "  seed 0",
        "  seed 1",
    ]
    assert rows[0][1] == "95.0"
    assert rows[1][1] == "74.5 ± 0.7"
    assert rows[5][1] == "90.0"
    assert report.cost_rows(results())[1] == [
        ["fused", "210", "8.8", "6.7"],
        ["eager", "230", "20.2", "not measured"],
    ]


def test_tables_fit_a_narrow_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    three = results(with_attention=(40, 50))
    console.print(to_table("Held-out rows", *report.score_rows(three)))
    text = console.export_text()
    for name in three.arms:
        assert f"student, {name} " in text


def test_html_is_complete_and_escaped():
    three = results(with_attention=(40, 50))
    page = report.to_html(three)
    assert "<h1>Alignment on &lt;tiny&gt;</h1>" in page
    for line in report.verdict(three).split("\n"):
        assert f"<p class='verdict'>{line}</p>" in page
    assert page.count("<svg") == 2
    assert page.count("<table>") == 2
    # Self-contained: nothing is loaded from elsewhere.
    assert not re.search(r"<(script|link|img)|src=", page)


def test_drawings_are_well_formed():
    curves = report.draw_curves(results(with_attention=(40, 50)))
    layer_map = report.draw_layer_map(replace(results(), pairs=[(0, 0), (3, 6)]))
    for svg in (curves, layer_map):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "labels + features" in curves
    assert "KL of the attention" in curves
    assert "KL of the attention" not in report.draw_curves(results())
    for text in ("embeddings", "layer 6", "student, 192 wide", "teacher, 384 wide"):
        assert text in layer_map
