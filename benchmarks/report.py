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


def markdown(path: Path) -> str:
    """One line per measured row: times, ratios of medians of that run, and peak memory."""
    record = json.loads(path.read_text())
    where = record["environment"]
    lines = [
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, "
        f"{where['date']}, commit {where['commit']}"
        + (" with local changes" if where["dirty"] else "")
        + f" ([{path.name}](benchmarks/results/{path.name})). Ratios are of medians of one run:",
        "",
        "| layer pairs, dtype | fakd | eager | torch.compile | limit | extra peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        times = {name: spread["median"] for name, spread in row["times_ms"].items()}
        first = next(iter(times))
        peak = row["extra_peak_mb"]
        lines.append(
            f"| {row['shape']}, {row['dtype']} | {times[first]:.1f} ms "
            f"| {times['eager'] / times[first]:.1f}x faster "
            f"| {times['compiled'] / times[first]:.1f}x faster "
            f"| {times[first] / times['limit']:.2f}x its time "
            f"| {peak[first]:.0f} MB, eager {peak['eager']:.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def render(readme: str) -> str:
    """The README with its tables written anew."""
    begin, end = map(re.escape, MARKS)
    body = MARKS[0] + "\n" + markdown(newest()) + "\n" + MARKS[1]
    return re.sub(f"{begin}.*?{end}", lambda _: body, readme, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
