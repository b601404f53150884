"""Writes README's tables from benchmarks/results: python -m benchmarks.report."""

import json
import re
from pathlib import Path

from .harness import BOUNDS
from .record import RESULTS

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- benchmarks: written by python -m benchmarks.report -->\n", "<!-- end -->")
NOT_YET = (
    "On a GPU: not measured yet. [benchmarks/GPU.md](benchmarks/GPU.md) has what compilers say of\n"
    "every kernel, and `make bench-gpu` measures on a card."
)
# Contenders as the table heads them; of the bounds the time is a factor.
HEADINGS = {
    "base": "base",
    "eager": "eager",
    "compiled": "torch.compile",
    "liger": "Liger",
    "reference": "reference engine",
    "triton": "Triton engine",  # beside the CUDA engine
    "limit": "limit",
    "sum": "`student + teacher`",
}


def label_of(contender: str) -> str:
    """A contender as drawings and curves name it."""
    known = {name: HEADINGS[name] for name in ("base", "eager", "compiled", "liger", "limit")}
    return known.get(contender, f"fakd ({contender})")


def newest(device_type: str) -> Path | None:
    """The results file of the latest date on a kind of device, None without any."""
    paths = [
        path
        for path in RESULTS.glob("*-????-??-??.json")
        if json.loads(path.read_text())["environment"].get("device_type", "cpu") == device_type
    ]
    return max(paths, key=lambda path: (path.stem[-10:], path.stem), default=None)


def markdown(path: Path) -> str:
    """A table per op, a line per row: times, ratios of medians of that run, peak memory."""
    record = json.loads(path.read_text())
    where = record["environment"]
    threads = "" if where.get("device_type") == "cuda" else f" {where['threads']} threads,"
    lines = [
        f"{where['device']},{threads} torch {where['torch']}, "
        f"{where['date']}, commit {where['commit']}"
        + (" with local changes" if where["dirty"] else "")
        + f" ([{path.name}](benchmarks/results/{path.name})). Ratios are of medians of one run:",
    ]
    for op in dict.fromkeys(row["op"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["op"] == op]
        lines += ["", *_table(op, rows)]
    for curve in record.get("curves", []):
        lines += ["", *_curve(curve)]
    return "\n".join(lines) + "\n"


def _curve(curve: dict) -> list[str]:
    """Peak memory by length; a dash where a contender was not run."""
    lengths = [f"T = {tokens}" for tokens in curve["tokens"]]
    lines = [
        f"| `{curve['op']}`, {curve['shape']}: extra peak MB | {' | '.join(lengths)} |",
        "|---" * (1 + len(lengths)) + "|",
    ]
    for name, values in curve["extra_peak_mb"].items():
        cells = ["-" if value is None else f"{value:.0f}" for value in values]
        lines.append(f"| {'eager' if name == 'eager' else 'fakd'} | {' | '.join(cells)} |")
    return lines


def _table(op: str, rows: list[dict]) -> list[str]:
    firsts = {next(iter(row["times_ms"])) for row in rows}
    present = {name for row in rows for name in row["times_ms"]}
    others = [name for name in HEADINGS if name in present - firsts]
    headings = [f"`{op}`", "fakd", *[HEADINGS[name] for name in others], "extra peak memory"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in rows:
        times = {name: spread["median"] for name, spread in row["times_ms"].items()}
        first = next(iter(times))
        peak = row["extra_peak_mb"]
        cells = [f"{row['shape']}, {row['dtype']}", f"{times[first]:.1f} ms"]
        for name in others:
            if name not in times:
                cells.append("-")
                continue
            ratio = times[name] / times[first]
            cells.append(f"{1 / ratio:.2f}x" if name in BOUNDS else _in_words(ratio))
        cells.append(f"{peak[first]:.0f} MB, eager {peak['eager']:.0f} MB")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _in_words(speedup: float) -> str:
    """How many times faster than a contender."""
    if 0.95 <= speedup < 1.05:
        return "as fast"
    return f"{speedup:.1f}x faster" if speedup > 1 else f"{1 / speedup:.1f}x slower"


def render(readme: str) -> str:
    """The README with its tables written anew."""
    begin, end = map(re.escape, MARKS)
    gpu = newest("cuda")
    parts = [markdown(newest("cpu")), NOT_YET + "\n" if gpu is None else markdown(gpu)]
    body = MARKS[0] + "\n" + "\n".join(parts) + "\n" + MARKS[1]
    return re.sub(f"{begin}.*?{end}", lambda _: body, readme, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
