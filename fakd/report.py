"""Scores, the sentence that judges them, and the report: tables, loss curves and the layer map."""

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.metrics import accuracy_score, f1_score

from .measure import Cost
from .page import html_table, page, plt, svg

# The ways of training, each of which adds to the one before.
LABELS_ONLY = "labels only"
WITH_FEATURES = "labels + features"
WITH_ATTENTION = "labels + features + attention"

_COLORS = {LABELS_ONLY: "#8a8f98", WITH_FEATURES: "#1f6feb", WITH_ATTENTION: "#bf5700"}
# Title -> the terms of the log that it shows, and their lines.
_PANELS = (
    ("cross-entropy on the labelled rows", {"task": "-"}),
    ("distance of the hidden states", {"cosine": "-", "euclidean": "--"}),
    ("KL of the attention", {"attention": "-"}),
)


@dataclass(frozen=True)
class Scores:
    """How well held-out rows are classified, from 0 to 1."""

    accuracy: float
    macro_f1: float


@dataclass(frozen=True)
class Trained:
    """One trained model."""

    name: str
    seed: int
    parameters: int
    predicted: list[int]
    scores: Scores
    log: list[dict[str, float]]


@dataclass(frozen=True)
class Results:
    """Everything that the report shows."""

    title: str
    setting: str  # in one sentence, what was trained on what
    truth: list[int]
    teacher: Trained
    students: list[Trained]
    pairs: list[tuple[int, int]]
    layers: tuple[int, int]  # blocks of the student and of the teacher
    widths: tuple[int, int]  # features of the student and of the teacher
    costs: dict[str, Cost]
    cost_setting: str  # in one sentence, what was measured
    environment: str

    @property
    def arms(self) -> list[str]:
        """The ways of training there are."""
        return list(dict.fromkeys(student.name for student in self.students))

    def arm(self, name: str) -> list[Trained]:
        """The students of one way of training, in the order of their seeds."""
        return [student for student in self.students if student.name == name]


def score(truth: Sequence[int], predicted: Sequence[int]) -> Scores:
    return Scores(
        float(accuracy_score(truth, predicted)),
        float(f1_score(truth, predicted, average="macro", zero_division=0)),
    )


def verdict(results: Results) -> str:
    """Say from the numbers, a line for each comparison, whether alignment helped.

    Every way of training is compared with the labels alone, and attention also with what it adds
    to. Noise is twice the standard error of a gain over the held-out rows. A gain counts as real if
    every seed gains by more than its noise, so neither a lucky start nor a lucky row decides.
    """
    comparisons = [
        ("Feature alignment", LABELS_ONLY, WITH_FEATURES),
        ("Feature and attention alignment", LABELS_ONLY, WITH_ATTENTION),
        ("Attention added to features", WITH_FEATURES, WITH_ATTENTION),
    ]
    return "\n".join(
        f"{subject} {_judge(results.truth, results.arm(base), results.arm(arm))}"
        for subject, base, arm in comparisons
        if results.arm(arm)
    )


def _judge(truth: Sequence[int], plain: list[Trained], aligned: list[Trained]) -> str:
    """What the second arm does to the first, with the numbers."""
    gains, noises = zip(
        *(_gain(truth, p, f) for p, f in zip(plain, aligned, strict=True)), strict=True
    )
    f1_gain = 100 * (
        statistics.mean(run.scores.macro_f1 for run in aligned)
        - statistics.mean(run.scores.macro_f1 for run in plain)
    )
    if all(gain > noise for gain, noise in zip(gains, noises, strict=True)):
        judged = "helped: every seed gains by more than noise"
    elif all(-gain > noise for gain, noise in zip(gains, noises, strict=True)):
        judged = "hurt: every seed loses by more than noise"
    elif min(gains) > 0:
        judged = "may have helped: every seed gains, not every one beyond noise"
    else:
        judged = "made no clear difference: the change is within noise"
    if len(gains) == 1:
        judged += " (one seed only: not a safe conclusion)"
    seeds = ", ".join(f"{g:+.1f} ± {n:.1f}" for g, n in zip(gains, noises, strict=True))
    return (
        f"{judged}. Accuracy {statistics.mean(gains):+.1f} points (by seed, with twice the "
        f"standard error over the held-out rows: {seeds}), macro-F1 {f1_gain:+.1f} points."
    )


def _gain(truth: Sequence[int], plain: Trained, aligned: Trained) -> tuple[float, float]:
    """Points of accuracy that the second run gains on the first, and the noise in that."""
    differences = [
        (f == t) - (p == t)
        for p, f, t in zip(plain.predicted, aligned.predicted, truth, strict=True)
    ]
    noise = 2 * statistics.stdev(differences) / len(differences) ** 0.5
    return 100 * statistics.mean(differences), 100 * noise


def score_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table of scores."""
    columns = ["model", "accuracy %", "macro-F1 %", "weights"]
    rows = [["teacher", *_row([results.teacher])]]
    for name in results.arms:
        arm = results.arm(name)
        rows.append([f"student, {name}", *_row(arm)])
        if len(arm) > 1:
            rows += [[f"  seed {run.seed}", *_row([run])] for run in arm]
    return columns, rows


def cost_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table of costs."""
    columns = ["loss", "step, ms", "loss alone, ms", "loss alone, peak memory MB"]
    rows = []
    for name, cost in results.costs.items():
        peak = cost.loss_peak_bytes
        memory = "not measured" if peak is None else f"{peak / 1e6:.1f}"
        rows.append([name, f"{cost.step_ms:.0f}", f"{cost.loss_ms:.1f}", memory])
    return columns, rows


def to_html(results: Results) -> str:
    """The report as one file that needs no other."""
    parts = [
        f"<p>{html.escape(results.setting)}</p>",
        *(f"<p class='verdict'>{html.escape(line)}</p>" for line in verdict(results).split("\n")),
        html_table("Held-out rows. Mean and standard deviation over seeds.", *score_rows(results)),
        "<h2>Cost</h2>",
        f"<p>{html.escape(results.cost_setting)}</p>",
        html_table("Loss of features, fused and in plain PyTorch.", *cost_rows(results)),
        "<h2>Loss curves</h2>",
        draw_curves(results),
        "<h2>Layer map</h2>",
        draw_layer_map(results),
        f"<p><small>{html.escape(results.environment)}</small></p>",
    ]
    return page(results.title, parts)


def draw_curves(results: Results) -> str:
    """SVG: the loss with labels, and the terms of alignment where they are learned."""
    panels = _PANELS if WITH_ATTENTION in results.arms else _PANELS[:-1]
    size = (5 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (title, terms) in zip(axes, panels, strict=True):
        drawn = [
            (run, term, style)
            for run in results.students
            for term, style in terms.items()
            if term in run.log[0]
        ]
        for run, term, style in drawn:
            label = run.name if len(terms) == 1 else f"{term}, {run.name}"
            axis.plot(
                [line["step"] for line in run.log],
                [line[term] for line in run.log],
                style,
                color=_COLORS[run.name],
                # One entry of the legend serves all seeds.
                label=label if run.seed == results.students[0].seed else None,
            )
        axis.set(title=title, xlabel="step")
        axis.legend(frameon=False, fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(**({"yscale": "log"} if "task" in terms else {"ylim": (0, None)}))
    return svg(figure)


def draw_layer_map(results: Results) -> str:
    """SVG: the layers of both models, and a line for every pair."""
    (student_layers, teacher_layers), pairs = results.layers, results.pairs
    tallest = max(student_layers, teacher_layers)
    figure, axis = plt.subplots(figsize=(6, 0.5 * tallest + 1.3), layout="constrained")

    def height(layer: int, count: int) -> float:
        return layer * tallest / count

    sides = (("student", 0.0, student_layers, results.widths[0], 0),)
    sides += (("teacher", 1.0, teacher_layers, results.widths[1], 1),)
    for name, x, count, width, side in sides:
        used = {pair[side] for pair in pairs}
        for layer in range(count + 1):
            is_used = layer in used
            axis.text(
                x,
                height(layer, count),
                f"layer {layer}" if layer else "embeddings",
                ha="center",
                va="center",
                color="black" if is_used else "#8a8f98",
                bbox={
                    "boxstyle": "round,pad=0.35",
                    "facecolor": "#ddf4ff" if is_used else "#f6f8fa",
                    "edgecolor": "#1f6feb" if is_used else "#d0d7de",
                },
            )
        axis.text(x, tallest + 0.8, f"{name}, {width} wide", ha="center", weight="bold")
    for student, teacher in pairs:
        ends = height(student, student_layers), height(teacher, teacher_layers)
        axis.plot([0, 1], ends, color="#1f6feb", linewidth=1.5, zorder=1)
    axis.set(xlim=(-0.3, 1.3), ylim=(-0.5, tallest + 1.3))
    axis.axis("off")
    return svg(figure)


def _row(runs: list[Trained]) -> list[str]:
    accuracy = _mean_and_spread([100 * run.scores.accuracy for run in runs])
    macro_f1 = _mean_and_spread([100 * run.scores.macro_f1 for run in runs])
    return [accuracy, macro_f1, f"{runs[0].parameters / 1e6:.1f} M"]


def _mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
