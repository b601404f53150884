"""`fakd doctor`: what is installed, which engines are usable, and what is missing and its cost."""

import os
import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fakd_kernels

# Package -> what is missing without it.
_PACKAGES = {
    "fakd": "this is a source tree, not installed",
    "torch": "nothing works",
    "triton": "no GPU engine: losses on a GPU store their large intermediates",
    "transformers": "no capture, no training; the losses work",
    "accelerate": "no training loop, no distribution",
    "datasets": "no `fakd train`",
    "safetensors": "no checkpoints",
    "pydantic": "no settings from files",
    "pyyaml": "no settings from files",
    "scikit-learn": "no scores",
    "scipy": "no scores of regressions",
    "matplotlib": "no `fakd report`, no `fakd compare`",
    "tensorboard": "no `train.trackers: [tensorboard]`; log.jsonl has the same lines",
    "gguf": "no `smollm2` from its package",
}


def examine(console: Console) -> None:
    """Print all of it."""
    console.print(
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        highlight=False,
    )
    accelerator = "none"
    if torch.accelerator.is_available():
        count = torch.accelerator.device_count()
        accelerator = f"{count} x {torch.accelerator.current_accelerator()}"
        if torch.cuda.is_available():
            accelerator += f" ({torch.cuda.get_device_name()})"
    console.print(f"accelerator: {accelerator}", highlight=False)

    engines = Table(title="engines", title_justify="left")
    for heading in ("engine", "usable", "why, or what it serves"):
        engines.add_column(heading)
    for state in fakd_kernels.engines().values():
        engines.add_row(state.name, "yes" if state.is_usable else "no", escape(state.reason or ""))
    console.print(engines)

    packages = Table(title="packages", title_justify="left")
    for heading in ("package", "version", "without it"):
        packages.add_column(heading)
    for name, cost in _PACKAGES.items():
        version = version_of(name)
        packages.add_row(name, version or "missing", "" if version else escape(cost))
    console.print(packages)


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
