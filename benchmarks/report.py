"""Writes the tables and drawings of README.md and benchmarks/README.md from benchmarks/results:
python -m benchmarks.report.
"""

import argparse
import json
import re
from pathlib import Path

from .harness import BOUNDS
from .plots import draw, file_names
from .record import HEADINGS, RESULTS, newest, rivals

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
DRAWINGS = RESULTS / "drawings"
MARKS = ("<!-- benchmarks: written by python -m benchmarks.report -->\n", "<!-- end -->")
NOT_YET = "On a GPU: not measured yet; `make bench-gpu` measures on a card.\n"
# What README tells, as far as it was measured; the page has every row.
HEADLINES = (
    ("feature_alignment", "12 x 4096 x 768, no projection", "float32"),
    ("feature_alignment", "6 x 4096, 384 to 768", "float32"),
    ("attention_kl", "B8 H12 T512, 32 and 64 wide", "float32"),
    ("attention_kl", "B8 H12 T512, 32 and 64 wide", "bfloat16"),
    ("attention_kl", "B1 H8 T2048, causal", "float32"),
    ("attention_map_kl", "B8 H12 T512", "float32"),
    ("linear_kl", "N1024 V32000, 512 and 1024 wide", "float32"),
    ("linear_kl", "N1024 V32000, 512 and 1024 wide", "bfloat16"),
    ("linear_kl", "N512 V151936, 256 and 512 wide", "float32"),
    ("logit_kl", "2048 x 32000", "float32"),
    ("topk_kl", "N1024 V32000, 512 wide, k 64", "float32"),
    ("train_step", "BERT-base to 4 x 312, B8 T128", "float32"),
    ("train_step", "SmolLM2-135M to 8 blocks, B2 T512", "float32"),
    ("linear_kl", "Llama-3.1-8B to 1B, N4096", "bfloat16"),
    ("linear_kl", "Qwen3-8B to 0.6B, N4096", "bfloat16"),
    ("logit_kl", "Llama-3.1, 4096 x 128256", "bfloat16"),
    ("train_step", "SmolLM2-135M to 8 blocks, B2 T512", "bfloat16"),
)


def headlines(path: Path) -> str:
    """One table of a few rows, without bounds."""
    record = json.loads(path.read_text())
    known = {(row["op"], row["shape"], row["dtype"]): row for row in record["rows"]}
    rows = [known[key] for key in HEADLINES if key in known]
    others = ["eager", "compiled", "liger"]
    table = _table("", rows, others, [f"`{row['op']}` {_name(row)}" for row in rows])
    return "\n".join([_where(record) + ":", "", *table]) + "\n"


def in_full(path: Path) -> str:
    """A table per op, a line per row, curves, and the drawings of both."""
    record = json.loads(path.read_text())
    figures = f"[figures](results/{path.name})"
    lines = [f"## {record['environment']['device']}", "", f"{_where(record)} ({figures})."]
    for name in drawing_names(path):
        lines += ["", f"![{name.removeprefix(path.stem)[1:-4]}](results/drawings/{name})"]
    for op in dict.fromkeys(row["op"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["op"] == op]
        lines += ["", *_table(f"`{op}`", rows, rivals(rows), [_name(row) for row in rows])]
    for curve in record["curves"]:
        lines += ["", *_curve(curve)]
    return "\n".join(lines) + "\n"


def drawing_names(path: Path) -> list[str]:
    """The files that `draw` makes of a record."""
    return file_names(json.loads(path.read_text()), f"{path.stem}-", "svg")


def _where(record: dict) -> str:
    where = record["environment"]
    threads = "" if where.get("device_type") == "cuda" else f"{where['threads']} threads, "
    changes = " with local changes" if where["dirty"] else ""
    return (
        f"{where['device']}, {threads}torch {where['torch']}, "
        f"{where['date']}, commit {where['commit']}{changes}"
    )


def _name(row: dict) -> str:
    return f"{row['shape']}, {row['dtype']}"


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


def _table(heading: str, rows: list[dict], others: list[str], labels: list[str]) -> list[str]:
    """Times, ratios of medians and peak memory."""
    contenders = [HEADINGS[n] if n in BOUNDS else f"against {HEADINGS[n]}" for n in others]
    headings = [heading, "fakd", *contenders, "extra peak memory"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row, words in zip(rows, labels, strict=True):
        times = {name: spread["median"] for name, spread in row["times_ms"].items()}
        first = next(iter(times))
        peak = row["extra_peak_mb"]
        cells = [words, f"{times[first]:.1f} ms"]
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


def render(text: str, tell) -> str:
    """A page with its figures written anew: what `tell` makes of each newest record."""
    begin, end = map(re.escape, MARKS)
    records = [newest("cpu"), newest("cuda")]
    parts = [NOT_YET if record is None else tell(record) for record in records]
    body = MARKS[0] + "\n" + "\n".join(parts) + "\n" + MARKS[1]
    return re.sub(f"{begin}.*?{end}", lambda _: body, text, flags=re.DOTALL)


TELLERS = {README: headlines, PAGE: in_full}


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__).parse_args()
    for page, tell in TELLERS.items():
        page.write_text(render(page.read_text(), tell))
    for old in DRAWINGS.glob("*.svg"):
        old.unlink()
    for record in filter(None, (newest("cpu"), newest("cuda"))):
        draw(record, DRAWINGS, f"{record.stem}-", "svg")


if __name__ == "__main__":
    main()
