"""`fakd cache-teacher`: what the teacher of a training predicts, stored before it."""

import dataclasses
import shutil

from rich.console import Console

from .config import RunConfig
from .config_file import ConfigError
from .data import collate
from .distribute import join
from .evaluate import evaluate
from .libraries import quieten_libraries
from .parts import build, cache_identity
from .run_folder import check_writable
from .teacher_cache import size_bytes, write_cache
from .train_log import in_words


def cache_teacher(config: RunConfig, console: Console) -> None:
    """Write `config.teacher_cache`; one that was interrupted goes on.

    Args:
        config: of the training that will read it.
        console: where size, scores and progress go.

    Raises:
        ConfigError: no folder is named, or none that can be written; the disk is too small; several
            processes. Others as `fakd train` does.
    """
    if config.teacher_cache is None:
        raise ConfigError(
            "teacher_cache must name the folder to write: got null; pass -s teacher_cache=FOLDER."
        )
    quieten_libraries()
    accelerator = join()
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"fakd cache-teacher must run in one process: got {accelerator.num_processes}; start "
            "it without torchrun."
        )
    check_writable("teacher_cache", config.teacher_cache)
    parts = build(dataclasses.replace(config, teacher_cache=None))
    prepared, teacher = parts.prepared, parts.teacher.to(accelerator.device)
    identity = cache_identity(config, parts.tokenizer, prepared, parts.teacher_hash, parts.losses)
    classes = None if prepared.labels is None else len(prepared.labels)
    size = size_bytes(prepared.train, identity, classes, parts.widths["teacher"])
    console.print(prepared.describe(), soft_wrap=True)
    console.print(f"{config.teacher_cache} will hold {size / 1e6:,.1f} MB", soft_wrap=True)
    free = shutil.disk_usage(config.teacher_cache).free
    if free < size:
        raise ConfigError(
            f"teacher_cache must be on a disk with {size / 1e6:,.1f} MB: got {free / 1e6:,.1f} MB "
            "free; lower distill.top_k, or choose another disk."
        )
    scores = evaluate(teacher, prepared, parts.tokenizer, accelerator=accelerator).scores
    console.print(f"teacher: {in_words(scores)}", soft_wrap=True)
    write_cache(
        config.teacher_cache,
        teacher,
        prepared.train,
        collate(parts.tokenizer, config.task),
        identity,
        scores=scores,
        device=accelerator.device,
        console=console,
    )
