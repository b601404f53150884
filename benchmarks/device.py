"""The device that is measured: the one place that decides.

FAKD_BENCH_DEVICE names it, which `--device` sets and every process of a run inherits; by default
CUDA where there is a card.
"""

import os
import platform
from pathlib import Path

import torch


def device() -> str:
    """ "cpu" or "cuda"."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return os.environ.get("FAKD_BENCH_DEVICE", default)


def is_cuda() -> bool:
    return device() == "cuda"


def synchronize() -> None:
    if is_cuda():
        torch.cuda.synchronize()


def device_name() -> str:
    if is_cuda():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
