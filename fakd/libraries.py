"""The libraries beneath: their versions, and their chatter."""

import platform

import datasets
import torch
import transformers

import fakd_kernels

from .doctor import version_of


def quieten_libraries() -> None:
    """Their progress bars and reports of freshly drawn heads would drown our own lines."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def environment() -> str:
    """What a figure depends on, in one sentence without its end."""
    usable = [s.name for s in fakd_kernels.engines().values() if s.is_usable]
    return (
        f"fakd {version_of('fakd') or 'from a source tree'}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads; usable engines: {', '.join(usable)}"
    )
