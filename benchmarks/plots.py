"""Draws a record of results: python -m benchmarks.plots [RESULTS.json] [--into FOLDER]."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from .report import HEADINGS, label_of, newest

# Contenders keep their colour in every drawing; fakd's engine is the first of its row.
COLOURS = {"eager": "#b0b0b0", "compiled": "#7a9cc6", "liger": "#c6a15b", "limit": "#404040"}
OURS = "#b5402c"
INCH = 0.42  # of height per bar group


def draw(results: Path, folder: Path) -> list[Path]:
    """The files drawn: time and memory by length, and ratios of every row."""
    record = json.loads(results.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for curve in record["curves"]:
        for field, words in (("times_ms", "time, ms"), ("extra_peak_mb", "extra peak memory, MB")):
            if field in curve:
                name = f"{curve['op']}-{'time' if field == 'times_ms' else 'memory'}.png"
                drawn.append(_by_length(curve, field, words, record, folder / name))
    if record["rows"]:
        drawn.append(_ratios(record, folder / "ratios.png"))
    return drawn


def _by_length(curve: dict, field: str, words: str, record: dict, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in curve[field].items():
        points = [(t, v) for t, v in zip(curve["tokens"], values, strict=True) if v is not None]
        colour = COLOURS.get(name, OURS)
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label_of(name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(curve["tokens"], [str(tokens) for tokens in curve["tokens"]])
    axes.set(xlabel="tokens T", ylabel=words, title=f"{curve['op']}, {curve['shape']}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(figure, record, path)


def _ratios(record: dict, path: Path) -> Path:
    """Bars of the time of others over that of fakd: beyond 1 fakd is faster."""
    rows = record["rows"]
    present = [name for name in HEADINGS if any(name in row["times_ms"] for row in rows)]
    figure, axes = plt.subplots(figsize=(8, 1.2 + INCH * len(rows)), layout="constrained")
    height = 0.8 / len(present)
    for place, name in enumerate(present):
        bars = []
        for index, row in enumerate(rows):
            if name in row["times_ms"]:
                ours = next(iter(row["times_ms"].values()))["median"]
                ratio = row["times_ms"][name]["median"] / ours
                bars.append((index + (place - (len(present) - 1) / 2) * height, ratio))
        colour = COLOURS.get(name, "#888888")
        axes.barh(*zip(*bars, strict=True), height=height, color=colour, label=label_of(name))
    axes.axvline(1, color=OURS, linewidth=1.5, label="fakd")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    labels = [f"{row['op']} {row['shape']}, {row['dtype']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="time / time of fakd", title="forward + backward")
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, record, path)


def _save(figure, record: dict, path: Path) -> Path:
    where = record["environment"]
    words = f"{where['device']}, torch {where['torch']}, {where['date']}, {where['commit']}"
    figure.supxlabel(words, fontsize=7, color="#606060")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="default the newest committed")
    parser.add_argument("--into", type=Path, default=Path("outputs/plots"), metavar="FOLDER")
    options = parser.parse_args()
    for path in draw(options.results or newest("cpu"), options.into):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
