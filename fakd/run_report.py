"""What trainings came to: a table for the terminal, and a page that compares several."""

import dataclasses
import html
import json
import math
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from rich.console import Console

from .config import RunConfig
from .config_file import ConfigError, differences, load_config, to_yaml
from .page import html_table, page, plt, svg, to_table
from .run import CONFIG, LOG, RESULTS, STUDENT, RunResults
from .train_log import LogLine

_WEIGHTED = "weighted_"
_COLUMNS = 3  # of drawings beside each other


@dataclass(frozen=True)
class Run:
    """A training that ended, read back from its folder."""

    name: str
    config: RunConfig
    results: RunResults
    log: list[LogLine]


def print_results(results: RunResults, config: RunConfig, console: Console) -> None:
    """Scores before and after, and where the student lies."""
    console.print(to_table("Held-out rows", *score_rows({"trained": results})))
    whole = results.seconds / 60
    best = "" if results.best_step == results.steps else f"; the best was step {results.best_step}"
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
    for name in (CONFIG, RESULTS, LOG):
        if not (folder / name).is_file():
            raise ConfigError(
                f"a run must be the output folder of a training that ended: got {folder} without "
                f"{name}; let fakd train end there first."
            )
    text = (folder / RESULTS).read_text(encoding="utf-8")
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    return Run(
        folder.name,
        load_config(folder / CONFIG),
        RunResults(**json.loads(text)),
        [json.loads(line) for line in lines],
    )


def write_page(folders: list[Path], path: Path) -> None:
    """Compare trainings on one page.

    Args:
        folders: their output folders.
        path: receives the page, which needs no other file.

    Raises:
        ConfigError: a folder without a training that ended. OSError: the page cannot be written.
    """
    runs = _named_apart([read_run(folder) for folder in folders])
    first = runs[0]
    parts = [
        f"<p>{html.escape(first.results.data)}</p>",
        html_table("Held-out rows", *score_rows({run.name: run.results for run in runs})),
        "<h2>Loss</h2>",
        _draw_curves(runs),
        "<h2>Settings</h2>",
        f"<p>Of {html.escape(first.name)}:</p><pre>{html.escape(to_yaml(first.config))}</pre>",
    ]
    for run in runs[1:]:
        changed = [line for line in differences(run.config, first.config)]
        items = "".join(f"<li>{html.escape(line)}</li>" for line in changed)
        parts.append(f"<p>{html.escape(run.name)} differs in:</p><ul>{items}</ul>")
    parts.append(f"<p><small>{html.escape(first.results.environment)}</small></p>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page("Distillation", parts), encoding="utf-8")


def score_rows(runs: dict[str, RunResults]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table: teachers once each, students before and after."""
    metrics = list(dict.fromkeys(name for results in runs.values() for name in results.student))
    columns = ["model", *metrics, "weights"]
    rows: list[list[str]] = []

    def add(name: str, scores: dict[str, float], parameters: int | None) -> None:
        cells = [_number(metric, scores[metric]) if metric in scores else "" for metric in metrics]
        row = [name, *cells, "" if parameters is None else f"{parameters / 1e6:.1f} M"]
        if row not in rows:
            rows.append(row)

    for results in runs.values():
        if results.teacher:
            # One whose predictions were stored is not loaded to be counted.
            add("teacher", results.teacher, results.parameters.get("teacher"))
    for name, results in runs.items():
        count = results.parameters["student"]
        add("student at the start", results.start, count)
        add(f"student, {name}", results.student, count)
    return columns, rows


def _number(metric: str, value: float) -> str:
    return f"{value:.1f}" if metric.endswith("perplexity") else f"{100 * value:.1f} %"


def _draw_curves(runs: list[Run]) -> str:
    """SVG: every term of the loss, unweighted, one line for each training that has it."""
    terms = [
        name.removeprefix(_WEIGHTED)
        for name in dict.fromkeys(name for run in runs for name in run.log[-1])
        if name.startswith(_WEIGHTED)
    ]
    rows = math.ceil(len(terms) / _COLUMNS)
    size = (3.6 * _COLUMNS, 2.8 * rows + 0.4)
    figure, grid = plt.subplots(rows, _COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for axis, term in zip_longest(grid.flat, terms):
        if term is None:
            axis.axis("off")
            continue
        for index, run in enumerate(runs):
            drawn = [(line["step"], line[term]) for line in run.log if term in line]
            if drawn:
                axis.plot(*zip(*drawn, strict=True), color=f"C{index}")
        axis.set(title=term, xlabel="step", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    lines = [
        plt.Line2D([], [], color=f"C{index}", label=run.name) for index, run in enumerate(runs)
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=_COLUMNS, frameon=False)
    return svg(figure)


def _named_apart(runs: list[Run]) -> list[Run]:
    """Runs of equal names get the name of the folder above too."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f"{run.config.output.parent.name}/{run.name}")
        if names.count(run.name) > 1
        else run
        for run in runs
    ]
