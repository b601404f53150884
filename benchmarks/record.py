"""What a figure depends on, and the file that keeps both."""

import datetime
import json
import platform
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .device import device, device_name
from .harness import Row

RESULTS = Path(__file__).parent / "results"
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


def environment() -> dict:
    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        return result.stdout.strip()

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    measured = ("fakd_kernels", "fakd", "csrc", "benchmarks/*.py")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", *[f":/{name}" for name in measured])),
        "device_type": device(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "command": "python -m " + " ".join(["benchmarks.run", *sys.argv[1:]]),
    }


def default_path() -> Path:
    """benchmarks/results/<device>-<date>.json."""
    name = re.sub(r"\((r|tm)\)", "", device_name(), flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{slug}-{datetime.date.today().isoformat()}.json"


def save(rows: list[Row], path: Path, curves: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows_written = [asdict(row) for row in rows]
    record = {"environment": environment(), "rows": rows_written, "curves": curves}
    path.write_text(json.dumps(record, indent=1) + "\n")


def label_of(contender: str) -> str:
    """A contender as drawings and curves name it."""
    known = {name: HEADINGS[name] for name in ("base", "eager", "compiled", "liger", "limit")}
    return known.get(contender, f"fakd ({contender})")


def rivals(rows: list[dict]) -> list[str]:
    """The contenders beside fakd's own engine, in the order of tables."""
    firsts = {next(iter(row["times_ms"])) for row in rows}
    present = {name for row in rows for name in row["times_ms"]}
    return [name for name in HEADINGS if name in present - firsts]


def newest(device_type: str) -> Path | None:
    """The results file of the latest date on a kind of device, None without any."""
    paths = [
        path
        for path in RESULTS.glob("*-????-??-??.json")
        if json.loads(path.read_text())["environment"].get("device_type", "cpu") == device_type
    ]
    return max(paths, key=lambda path: (path.stem[-10:], path.stem), default=None)
