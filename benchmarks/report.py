"""Writes README's tables from benchmarks/results: python -m benchmarks.report."""

import json
import re
from pathlib import Path

from .harness import RESULTS

README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- benchmarks: written by python -m benchmarks.report -->\n", "<!-- end -->")


def newest() -> Path:
    """The results file of the latest date."""
    return max(RESULTS.glob("*.json"), key=lambda path: (path.stem[-10:], path.stem))


# Contenders as the table heads them; the limit is slower or faster, so its time is a factor.
HEADINGS = {"eager": "eager", "compiled": "torch.compile", "liger": "Liger", "limit": "limit"}


def markdown(path: Path) -> str:
    """A table per op, a line per row: times, ratios of medians of that run, peak memory."""
    record = json.loads(path.read_text())
    where = record["environment"]
    lines = [
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, "
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
    others = [name for name in HEADINGS if name in rows[0]["times_ms"]]
    headings = [f"`{op}`", "fakd", *[HEADINGS[name] for name in others], "extra peak memory"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in rows:
        times = {name: spread["median"] for name, spread in row["times_ms"].items()}
        first = next(iter(times))
        peak = row["extra_peak_mb"]
        cells = [f"{row['shape']}, {row['dtype']}", f"{times[first]:.1f} ms"]
        for name in others:
            ratio = times[name] / times[first]
            cells.append(f"{1 / ratio:.2f}x" if name == "limit" else _in_words(ratio))
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
    body = MARKS[0] + "\n" + markdown(newest()) + "\n" + MARKS[1]
    return re.sub(f"{begin}.*?{end}", lambda _: body, readme, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
