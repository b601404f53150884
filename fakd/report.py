"""What trainings came to: tables, the sentences that judge them, and a page that compares them.

Trainings come in arms: by the name of each arm, its trainings from several seeds.
"""

import html
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from .config import RunConfig
from .config_file import ConfigError, differences, load_config, to_yaml
from .drawings import draw_curves, draw_layer_map
from .measure import Costs
from .page import html_table, page, to_table
from .run import RunResults
from .run_folder import BEST_STUDENT, CONFIG, ERRORS, LOG, RESULTS, STUDENT
from .train_log import LogLine, in_words


@dataclass(frozen=True)
class Run:
    """A training that ended, read back from its folder."""

    name: str
    config: RunConfig
    results: RunResults
    errors: dict[str, list[float]]  # of each held-out row, see `Evaluation`
    log: list[LogLine]


Arms = Mapping[str, Sequence[Run]]
_CORRELATIONS = ("pearson", "spearmanr", "matthews_correlation")  # no shares of anything


def print_results(results: RunResults, config: RunConfig, console: Console) -> None:
    """Scores before and after, and where the student lies."""
    console.print(to_table("Held-out rows", *_score_rows({"trained": [results]})))
    whole = results.seconds / 60
    best = ""
    if results.best_step != results.steps:
        best = f"; the best was step {results.best_step}, {in_words(results.best)}: "
        best += f"{config.output / BEST_STUDENT}"
    console.print(
        f"{results.steps} steps, {whole:.1f} minutes{best}. The student is "
        f"{config.output / STUDENT}, its log {config.output / LOG}.",
        soft_wrap=True,
        highlight=False,
    )


def read_run(folder: Path) -> Run:
    """A training from its output folder.

    Raises:
        ConfigError: it holds none, or one that did not end.
    """
    for name in (CONFIG, RESULTS, ERRORS, LOG):
        if not (folder / name).is_file():
            raise ConfigError(
                f"a run must be the output folder of a training that ended: got {folder} without "
                f"{name}; let fakd train end there first."
            )
    results, errors = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in (RESULTS, ERRORS)
    )
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    return Run(
        folder.name,
        load_config(folder / CONFIG),
        RunResults(**results),
        errors,
        [json.loads(line) for line in lines],
    )


def arms_of(folders: Sequence[Path]) -> dict[str, list[Run]]:
    """Trainings from their folders, each an arm of its own.

    Raises:
        ConfigError: as `read_run` does.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return {
        # Runs of equal names get the name of the folder above too.
        f"{run.config.output.parent.name}/{run.name}" if names.count(run.name) > 1 else run.name: [
            run
        ]
        for run in runs
    }


def verdict(arms: Arms) -> list[str]:
    """Say from the numbers, a line for each comparison, whether an arm is better.

    Every arm is compared with the first, and with the one before it. What is compared is the mean
    error of the held-out rows (see `Evaluation`), row by row and seed by seed; noise is twice the
    standard error of a change over the rows. A change counts as real if every seed changes by more
    than its noise, so neither a lucky start nor a lucky row decides.

    Returns:
        No lines for arms that were scored on other rows, or from other numbers of seeds.
    """
    names = list(arms)
    pairs = [(names[0], name) for name in names[1:]]
    pairs += pairwise(names[1:])
    return [
        _judge(base, name, arms[base], arms[name], part)
        for base, name in pairs
        if _is_comparable(arms[base], arms[name])
        for part in arms[base][0].errors
    ]


def _is_comparable(ours: Sequence[Run], theirs: Sequence[Run]) -> bool:
    sizes = [{part: len(rows) for part, rows in run.errors.items()} for run in (*ours, *theirs)]
    sources = {(run.results.data, run.results.rows) for run in (*ours, *theirs)}
    return len(ours) == len(theirs) and len(sources) == 1 and all(s == sizes[0] for s in sizes)


def _judge(base: str, name: str, plain: Sequence[Run], other: Sequence[Run], part: str) -> str:
    """What the second arm does to the errors of the first, with the numbers."""
    changes, noises = zip(
        *(paired_change(p.errors[part], o.errors[part]) for p, o in zip(plain, other, strict=True)),
        strict=True,
    )
    if all(change < -noise for change, noise in zip(changes, noises, strict=True)):
        judged = "better, beyond noise"
    elif all(change > noise for change, noise in zip(changes, noises, strict=True)):
        judged = "worse, beyond noise"
    elif max(changes) < 0:
        judged = "maybe better: every seed is, but not every one beyond noise"
    else:
        judged = "no clear difference: the change is within noise"
    if len(changes) == 1:
        judged += " (one seed only: not a safe conclusion)"
    is_lm = plain[0].config.task == "causal_lm"
    share = set(plain[0].errors[part]) <= {0.0, 1.0}
    what, factor, unit = ("wrong rows", 100, " %") if share else ("mean error", 1, "")
    what = "mean cross-entropy" if is_lm else what
    digits = 1 if share else 3
    each = ", ".join(
        f"{factor * c:+.{digits}f} ± {factor * n:.{digits}f}{unit}"
        for c, n in zip(changes, noises, strict=True)
    )
    where = "" if part == "test" else f" ({part})"
    scores = ", ".join(
        f"{metric.removeprefix(f'{part}/')} {_mean(plain, metric)} to {_mean(other, metric)}"
        for metric in plain[0].results.student
        if (metric.rpartition("/")[0] or "test") == part
    )
    return f"{name} against {base}{where}: {judged}. {scores}; {what} by seed {each}."


def paired_change(plain: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean change of the errors of the same rows, and twice its standard error."""
    changes = [o - p for p, o in zip(plain, other, strict=True)]
    if len(changes) < 2:
        return changes[0], float("inf")
    return statistics.mean(changes), 2 * statistics.stdev(changes) / len(changes) ** 0.5


def score_rows(arms: Arms) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table: teachers once each, students before and after."""
    return _score_rows({name: [run.results for run in runs] for name, runs in arms.items()})


def _score_rows(arms: Mapping[str, Sequence[RunResults]]) -> tuple[list[str], list[list[str]]]:
    everything = [results for group in arms.values() for results in group]
    metrics = list(dict.fromkeys(name for results in everything for name in results.student))
    columns = ["model", *metrics, "weights"]
    rows: list[list[str]] = []

    def add(name: str, scores: Sequence[Mapping[str, float]], parameters: int | None) -> None:
        cells = [_mean_of(m, [each[m] for each in scores if m in each]) for m in metrics]
        row = [name, *cells, "" if parameters is None else f"{parameters / 1e6:.1f} M"]
        if row not in rows:
            rows.append(row)

    for results in everything:
        if results.teacher:
            # One whose predictions were stored is not loaded to be counted.
            add("teacher", [results.teacher], results.parameters.get("teacher"))
    for group in arms.values():
        add("student at the start", [r.start for r in group], group[0].parameters["student"])
    for name, group in arms.items():
        add(f"student, {name}", [r.student for r in group], group[0].parameters["student"])
    return columns, rows


def _mean(runs: Sequence[Run], metric: str) -> str:
    values = [run.results.student[metric] for run in runs]
    return _number(metric, statistics.mean(values))


def _mean_of(metric: str, values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds; "" of a metric that another task has."""
    if not values:
        return ""
    mean = _number(metric, statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {_number(metric, statistics.stdev(values)).removesuffix(' %')}"


def _number(metric: str, value: float) -> str:
    if metric.endswith("perplexity"):
        return f"{value:.1f}"
    return f"{value:.3f}" if metric.endswith(_CORRELATIONS) else f"{100 * value:.1f} %"


def cost_rows(costs: Costs) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table of costs."""
    columns = ["loss", "step, ms", "loss alone, ms", "loss alone, peak memory MB"]
    rows = []
    for name, cost in costs.by_loss.items():
        peak = cost.loss_peak_bytes
        memory = "not measured" if peak is None else f"{peak / 1e6:.1f}"
        rows.append([name, f"{cost.step_ms:.0f}", f"{cost.loss_ms:.1f}", memory])
    return columns, rows


def write_page(
    arms: Arms,
    path: Path,
    title: str = "Distillation",
    costs: Costs | None = None,
    teacher: RunConfig | None = None,
) -> None:
    """Compare trainings on one page.

    Args:
        arms: the trainings.
        path: receives the page, which needs no other file.
        title: of the page.
        costs: of the loss of features.
        teacher: the settings of the teacher's own training.

    Raises:
        OSError: the page cannot be written.
    """
    first, *others = [run for runs in arms.values() for run in runs]
    sources = dict.fromkeys(run.results.data for run in (first, *others))
    parts = [
        *(f"<p>{html.escape(source)}</p>" for source in sources),
        *(f"<p class='verdict'>{html.escape(line)}</p>" for line in verdict(arms)),
        html_table("Held-out rows. Mean and standard deviation over seeds.", *score_rows(arms)),
    ]
    if costs is not None:
        table = html_table("Loss of features, fused and in plain PyTorch.", *cost_rows(costs))
        parts += ["<h2>Cost</h2>", f"<p>{html.escape(costs.setting)}</p>", table]
    parts += ["<h2>Loss</h2>", draw_curves({n: [r.log for r in runs] for n, runs in arms.items()})]
    if any(run.results.pairs for run in (first, *others)):
        parts += ["<h2>Layer map</h2>", _layer_map([first, *others])]
    parts.append("<h2>Settings</h2>")
    if teacher is not None:
        parts.append(f"<p>Of the teacher:</p><pre>{html.escape(to_yaml(teacher))}</pre>")
    parts.append(f"<p>Of {html.escape(first.name)}:</p><pre>")
    parts.append(f"{html.escape(to_yaml(first.config))}</pre>")
    for run in others:
        items = "".join(
            f"<li>{html.escape(line)}</li>" for line in differences(run.config, first.config)
        )
        parts.append(f"<p>{html.escape(run.name)} differs in:</p><ul>{items}</ul>")
    parts.append(f"<p><small>{html.escape(first.results.environment)}</small></p>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, parts), encoding="utf-8")


def _layer_map(runs: Sequence[Run]) -> str:
    """Of the training with the most pairs."""
    results = max((run.results for run in runs), key=lambda results: len(results.pairs))
    return draw_layer_map(results.pairs, results.layers, results.widths)
