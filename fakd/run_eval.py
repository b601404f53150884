"""`fakd eval`: scores of the student of a training, or of any model."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .config import DataConfig, RunConfig
from .config_file import ConfigError, Override, load_config
from .data import prepare, prepare_test
from .distribute import join
from .evaluate import evaluate
from .libraries import quieten_libraries
from .models import check_length, load_teacher, load_tokenizer, output_names
from .run import CONFIG, STUDENT
from .train_log import in_words


def score_folder(
    folder: str, task: str | None, data: str | None, settings: Sequence[str], console: Console
) -> dict[str, float]:
    """Score a model on held-out rows, and say so.

    Data that a model was not trained on by fakd, and that have no split to score, are scored whole.

    Args:
        folder: the output folder of `fakd train`, whose student and data are taken; or what
            `RunConfig.teacher` takes, with `task` and `data`.
        task: "classification" or "causal_lm"; of a training, its own.
        data: as `DataConfig.source`; of a training, its own.
        settings: "data.max_tokens=64" and the like.
        console: where the scores go.

    Raises:
        ConfigError: neither a training nor enough to score a model. Others as `fakd train` does.
    """
    quieten_libraries()
    config, is_own_data = _settings(folder, task, data, settings)
    accelerator = join()
    tokenizer = load_tokenizer(config.teacher)
    prepare_data = prepare if is_own_data else prepare_test
    prepared = prepare_data(config.data, config.task, tokenizer, output_names(config, "model"))
    model = load_teacher(config, prepared.labels, "model").to(accelerator.device)
    check_length(config.data, model)
    scores = evaluate(model, prepared, tokenizer, accelerator=accelerator).scores
    if accelerator.is_main_process:
        console.print(prepared.describe(), soft_wrap=True)
        console.print(f"{folder}: {in_words(scores)}", soft_wrap=True)
    return scores


def _settings(
    folder: str, task: str | None, data: str | None, settings: Sequence[str]
) -> tuple[RunConfig, bool]:
    """The model that is scored stands in the teacher's place; and whether these are its data."""
    known = Path(folder) / CONFIG
    given: list[Override] = [] if data is None else [("data.source", data)]
    if known.is_file():
        if task is not None:
            raise ConfigError(
                f"task must be absent for a training, which has its own: got {task!r}; drop it."
            )
        student = Path(folder) / STUDENT
        if not student.is_dir():
            raise ConfigError(
                f"{folder} must hold a training that ended: got no {STUDENT} in it; let fakd train "
                "end first."
            )
        own = load_config(known).data
        if data is not None and not _is_same(data, own.source):
            # These say something of the data that were trained on.
            names = ("name", "train_split", "test_split", "labels_per_class", "test_rows")
            given += [(f"data.{name}", getattr(DataConfig(data), name)) for name in names]
        config = load_config(known, [*given, *settings, ("teacher", str(student))])
        return config, _is_same(config.data.source, own.source)
    if task is None or data is None:
        raise ConfigError(
            f"task and data must be given for a model that is no training of fakd: got {task} and "
            f"{data}; pass --task and --data."
        )
    given += [("task", task), ("teacher", folder)]
    given += ["steps=1", "output=.", "student.layers=1"]
    return load_config(None, [*given, *settings]), False


def _is_same(source: str, other: str) -> bool:
    return Path(source).expanduser().resolve() == Path(other).expanduser().resolve()
