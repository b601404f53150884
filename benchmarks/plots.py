"""Draws a record of results: python -m benchmarks.plots [RESULTS.json] [--into FOLDER]."""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from .harness import BOUNDS
from .record import label_of, newest, rivals

# Contenders keep their colour in every drawing; fakd's engine is the first of its row.
COLOURS = {"eager": "#b0b0b0", "compiled": "#7a9cc6", "liger": "#c6a15b", "limit": "#404040"}
OURS = "#b5402c"
INCH = 0.42  # of height per bar group
MOST_TICKS = 9
# Of a curve: what its file is named by, and how its axis is.
FIELDS = {"times_ms": ("time", "time, ms"), "extra_peak_mb": ("memory", "extra peak memory, MB")}


def file_names(record: dict, prefix: str = "", kind: str = "png") -> list[str]:
    """Of the files that `draw` makes, in its order."""
    drawn = ["ratios"] if record["rows"] else []
    for curve in record["curves"]:
        drawn += [f"{curve['op']}-{what}" for field, (what, _) in FIELDS.items() if field in curve]
    return [f"{prefix}{name}.{kind}" for name in drawn]


def draw(results: Path, folder: Path, prefix: str = "", kind: str = "png") -> list[Path]:
    """The files drawn: ratios of every row, and time and memory by length."""
    record = json.loads(results.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    figures = [_ratios(record)] if record["rows"] else []
    for curve in record["curves"]:
        figures += [_by_length(curve, field) for field in FIELDS if field in curve]
    paths = [folder / name for name in file_names(record, prefix, kind)]
    for figure, path in zip(figures, paths, strict=True):
        _save(figure, record, path)
    return paths


def _by_length(curve: dict, field: str):
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in curve[field].items():
        points = [(t, v) for t, v in zip(curve["tokens"], values, strict=True) if v is not None]
        colour = COLOURS.get(name, OURS)
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label_of(name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    measured = zip(curve["tokens"], *curve[field].values(), strict=True)
    ticks = [tokens for tokens, *values in measured if any(v is not None for v in values)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="tokens T", ylabel=FIELDS[field][1], title=f"{curve['op']}, {curve['shape']}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _ratios(record: dict):
    """Bars from fakd's time to those of others, rightwards where fakd is faster; limits marked."""
    rows = record["rows"]
    timed = [name for name in rivals(rows) if name not in BOUNDS]
    figure, axes = plt.subplots(figsize=(9, 1.2 + INCH * len(rows)), layout="constrained")
    height = 0.8 / len(timed)
    for place, name in enumerate(timed):
        bars = [
            (index + (place - (len(timed) - 1) / 2) * height, _ratio(row, name))
            for index, row in enumerate(rows)
            if name in row["times_ms"]
        ]
        places, ratios = zip(*bars, strict=True)
        lefts = [min(1, ratio) for ratio in ratios]
        widths = [max(1, ratio) - left for ratio, left in zip(ratios, lefts, strict=True)]
        colour = COLOURS.get(name, "#888888")
        axes.barh(places, widths, height, lefts, color=colour, label=label_of(name))
    marks = [(_ratio(row, "limit"), index) for index, row in enumerate(rows)]
    axes.plot(*zip(*marks, strict=True), "D", color=COLOURS["limit"], markersize=4, label="limit")
    axes.axvline(1, color=OURS, linewidth=1.5, label="fakd")
    axes.set_xscale("log", base=2)
    known = [
        _ratio(row, name) for row in rows for name in (*timed, "limit") if name in row["times_ms"]
    ]
    ends = min(0.25, *known) / 1.15, max(4, *known) * 1.15
    least, most = math.ceil(math.log2(ends[0])), math.floor(math.log2(ends[1]))
    step = math.ceil((most - least + 1) / MOST_TICKS)
    ticks = [2.0**power for power in range(least, most + 1) if power % step == 0]
    axes.set_xlim(*ends)
    axes.set_xticks(ticks, [f"{tick:.2g}x" for tick in ticks])
    labels = [f"{row['op']} {row['shape']}, {row['dtype']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set(xlabel="time / time of fakd", title="forward + backward")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _ratio(row: dict, name: str) -> float:
    times = row["times_ms"]
    return times[name]["median"] / next(iter(times.values()))["median"]


def _save(figure, record: dict, path: Path) -> None:
    where = record["environment"]
    words = f"{where['device']}, torch {where['torch']}, {where['date']}, {where['commit']}"
    figure.supxlabel(words, fontsize=7, color="#606060")
    # Text as text, and neither dates nor random names: what is drawn again is the same file.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        is_svg = path.suffix == ".svg"
        figure.savefig(path, dpi=130, metadata={"Date": None} if is_svg else None)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="default the newest committed")
    parser.add_argument("--into", type=Path, default=Path("outputs/plots"), metavar="FOLDER")
    options = parser.parse_args()
    for path in draw(options.results or newest("cpu"), options.into):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
