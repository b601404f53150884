"""What both demos do alike around their training."""

import dataclasses
import json
import platform
from pathlib import Path

import datasets
import torch
import transformers


def quieten_libraries() -> None:
    """Their progress bars and reports of freshly drawn heads would drown our own lines."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def model_folder(folder: Path) -> Path:
    """The folder that was given for the teacher, once it is seen to hold a model."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"teacher must be the folder of a Hugging Face model: got {folder}, which has "
            "no config.json; check the path."
        )
    return folder


def environment() -> str:
    """What a figure depends on, in one sentence without its end."""
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )


def write_record(folder: Path, config: object, results: object, **more: object) -> None:
    """results.json: `more`, the config and the results, both dataclasses."""
    record = {**more, "config": dataclasses.asdict(config), **dataclasses.asdict(results)}
    text = json.dumps(record, indent=1, default=str)
    (folder / "results.json").write_text(text, encoding="utf-8")
