"""One training from its settings: build, train, score, keep."""

import dataclasses
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from .checkpoint import Checkpoints
from .config import RunConfig
from .config_file import ConfigError, differences, fingerprint, load_config, to_yaml
from .data import Prepared, check_tokenizers, collate, plan, prepare, split, tokenizer_hash
from .demo_shared import environment, quieten_libraries
from .distiller import Distiller
from .distribute import join, unsharded
from .evaluate import evaluate
from .files import sync_folder, write_whole
from .language_models import check_causal, check_packing
from .models import check_length, check_vocabulary, load_teacher, load_tokenizer, make_student
from .teacher_cache import (
    Identity,
    RowsWithTeacher,
    TeacherCache,
    collate_with_teacher,
    hash_weights,
)
from .terms import build_output
from .train import LogLine, train
from .weighting import Weighting

CONFIG, LOG, RESULTS = "config.yaml", "log.jsonl", "results.json"
STUDENT, CHECKPOINTS, TRACKED = "student", "checkpoints", "tracked"
TEACHER, START = "teacher", "student at the start"

# Settings that say how a training is watched and kept, not what it computes.
_WATCHING = ("log_every", "checkpoint_every", "keep", "trackers")


@dataclass(frozen=True)
class RunResults:
    """What a training came to."""

    data: str
    # By metric; empty without a teacher.
    teacher: dict[str, float]
    start: dict[str, float]  # the student before its training
    student: dict[str, float]
    best_step: int | None  # of the checkpoint with the best first metric
    steps: int
    parameters: dict[str, int]
    seconds: float  # of this call
    environment: str


@dataclass(frozen=True)
class Parts:
    """What a training is made of."""

    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    teacher: nn.Module | None  # None too where its predictions are stored
    student: nn.Module
    cache: TeacherCache | None


def run(config: RunConfig, console: Console) -> tuple[RunResults | None, list[LogLine]]:
    """Train as `config` says, or go on with it where the same call was interrupted.

    Args:
        config: see `RunConfig`.
        console: where progress goes; the main process alone speaks.

    Returns:
        The results (None but in the main process), and the log. `config.output` receives
        config.yaml (all settings), log.jsonl,
        results.json, checkpoints/ and student/, a folder that `AutoModel.from_pretrained` reads.

    Raises:
        ConfigError: the output folder holds another training. Others as `build` and `train` do; all
            before any training but `NonFiniteLoss`, and OSError where the disk refuses later.
    """
    began = time.perf_counter()
    quieten_libraries()
    accelerator = _join(config)
    console = console if accelerator.is_main_process else Console(quiet=True)
    with accelerator.main_process_first():
        check_output(config)
        parts = build(config)
    console.print(parts.prepared.describe(), soft_wrap=True)
    distiller = _make_distiller(config, parts)
    planned = plan(parts.prepared, config.data, config.steps, config.epochs, config.train.seed)
    mine = split(
        planned, accelerator.num_processes, accelerator.process_index, config.train.accumulation
    )
    # Before anything is sharded: a model is whole in every process.
    baseline = _baseline(config, parts, accelerator)
    if accelerator.is_main_process:
        write_whole(config.output / CONFIG, to_yaml(config))
        for name, scores in baseline.items():
            console.print(f"{name}: {in_words(scores)}", soft_wrap=True)

    def score() -> dict[str, float]:
        with unsharded(distiller):
            return evaluate(
                distiller.student, parts.prepared, parts.tokenizer, accelerator=accelerator
            )

    metric, sign = parts.prepared.metrics[0], 1 if parts.prepared.is_greater_better else -1
    checkpoints = Checkpoints(
        config.output / CHECKPOINTS,
        config.train.keep,
        identity=identity(config, parts.prepared),
        evaluate=score,
        worth=lambda scores: sign * scores[metric],
        console=console,
    )
    rows, collator = parts.prepared.train, collate(parts.tokenizer, config.task)
    if parts.cache is not None:
        rows, collator = RowsWithTeacher(rows, parts.cache), collate_with_teacher(collator)
    batches = DataLoader(rows, batch_sampler=mine, collate_fn=collator)
    log = train(
        distiller,
        batches,
        config.train,
        accelerator=accelerator,
        log_path=config.output / LOG,
        console=console,
        title="student",
        checkpoints=checkpoints,
    )
    results = None
    if accelerator.is_main_process:
        last, best = checkpoints.last(), checkpoints.best()
        results = RunResults(
            data=parts.prepared.describe(),
            teacher=baseline.get(TEACHER, {}),
            start=baseline[START],
            student=checkpoints.verified(last)["scores"],
            best_step=checkpoints.verified(best)["step"],
            steps=len(planned),
            parameters={
                name: sum(parameter.numel() for parameter in model.parameters())
                for name, model in (("teacher", parts.teacher), ("student", parts.student))
                if model is not None
            },
            seconds=time.perf_counter() - began,
            environment=environment(),
        )
        _save_student(distiller.student, checkpoints.student_state(last), parts, config.output)
        write_whole(config.output / RESULTS, json.dumps(dataclasses.asdict(results), indent=1))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results, log


def build(config: RunConfig) -> Parts:
    """Data and models, checked against each other before anything is computed.

    Raises:
        ModuleNotFoundError, OSError, ValueError: what is not there, or does not fit.
    """
    sources = {"teacher": config.teacher, "student.path": config.student.path}
    if not any(sources.values()):
        # A config alone need not bring a tokenizer, where a model does.
        sources = {"student.config": config.student.config}
    tokenizers = [load_tokenizer(path, name) for name, path in sources.items() if path is not None]
    tokenizer = tokenizers[0]
    for other in tokenizers[1:]:
        check_tokenizers(other, tokenizer)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    prepared = prepare(config.data, config.task, tokenizer)
    torch.manual_seed(config.train.seed)  # of what is drawn for the student
    teacher = None if config.teacher is None else load_teacher(config, prepared.labels)
    student = make_student(config, teacher, prepared.labels)
    for name, model in (("the teacher", teacher), ("the student", student)):
        if model is None:
            continue
        check_length(config.data, model, name)
        check_vocabulary(tokenizer, model, name)
        if config.task == "causal_lm":
            check_causal(model)
        if config.data.layout == "packed":
            check_packing(model)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
    cache = None
    if config.teacher_cache is not None:
        cache = TeacherCache(config.teacher_cache)
        cache.check(cache_identity(config, tokenizer, prepared, teacher))
        teacher = None
    return Parts(tokenizer, prepared, teacher, student, cache)


def cache_identity(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    teacher: nn.Module,
) -> Identity:
    """What a cache of this training's teacher is made of."""
    return Identity(
        task=config.task,
        teacher=hash_weights(teacher),
        tokenizer=tokenizer_hash(tokenizer),
        data=prepared.fingerprint,
        rows=len(prepared.train),
        top_k=config.distill.top_k if config.task == "causal_lm" else None,
    )


def check_output(config: RunConfig) -> None:
    """Check that the output folder can be written, and holds this training or none.

    Raises:
        ConfigError: it holds another (the message says what differs), or cannot be written.
    """
    known = config.output / CONFIG
    if known.is_file():
        before = load_config(known)
        changed = differences(_computed(config), _computed(before))
        if changed:
            raise ConfigError(
                f"output must be a new folder, or hold a training of the same settings: got "
                f"{config.output}, where these differ: {'; '.join(changed)}; change them back to "
                "go on, or choose another output."
            )
    probe = config.output / f".probe-{os.getpid()}"
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output must be a folder that can be written: got {config.output} "
            f"({error.strerror}); choose another."
        ) from None


def identity(config: RunConfig, prepared: Prepared) -> str:
    """What makes two trainings the same: settings and data."""
    return f"{fingerprint(_computed(config))}-{prepared.fingerprint}"


def in_words(scores: dict[str, float]) -> str:
    """accuracy 0.912, macro_f1 0.874"""
    return ", ".join(
        f"{name} {value:.2f}" if name.endswith("perplexity") else f"{name} {value:.4f}"
        for name, value in scores.items()
    )


def _join(config: RunConfig) -> Accelerator:
    trackers = list(config.train.trackers)
    try:
        accelerator = join(
            config.train.mixed_precision,
            log_with=trackers or None,
            project_dir=config.output / TRACKED,
        )
        if trackers:
            accelerator.init_trackers("fakd", config={"settings": to_yaml(config)})
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"train.trackers must be trackers of accelerate that are installed: got {trackers} "
            f"({error}); install them, or drop them."
        ) from error
    return accelerator


def _computed(config: RunConfig) -> RunConfig:
    """The settings without those that only watch and keep, and without the folder."""
    defaults = type(config.train)()
    watching = {name: getattr(defaults, name) for name in _WATCHING}
    train_config = dataclasses.replace(config.train, **watching)
    return dataclasses.replace(config, train=train_config, output=Path("."))


def _baseline(
    config: RunConfig, parts: Parts, accelerator: Accelerator
) -> dict[str, dict[str, float]]:
    """Scores of the teacher and of the student before; read again where they were written."""
    known = config.output / "baseline.json"
    if known.is_file():
        return json.loads(known.read_text(encoding="utf-8"))
    scores = {} if parts.cache is None else {TEACHER: parts.cache.scores}
    scores |= {
        name: evaluate(
            model.to(accelerator.device), parts.prepared, parts.tokenizer, accelerator=accelerator
        )
        for name, model in _models(parts).items()
    }
    if accelerator.is_main_process:
        write_whole(known, json.dumps(scores, indent=1))
    accelerator.wait_for_everyone()
    return scores


def _make_distiller(config: RunConfig, parts: Parts) -> Distiller:
    if parts.cache is None:
        return Distiller.from_config(parts.teacher, parts.student, config.distill)
    return Distiller(
        None,
        parts.student,
        output=build_output(config.distill, parts.student),
        weighting=Weighting(config.distill.schedules, config.distill.balance),
        task_weight=config.distill.task_weight,
    )


def _models(parts: Parts) -> dict[str, nn.Module]:
    named = {TEACHER: parts.teacher, START: parts.student}
    return {name: model for name, model in named.items() if model is not None}


def _save_student(student: nn.Module, state: dict, parts: Parts, output: Path) -> None:
    """The student as a folder of its own, without teacher and projections."""
    part, target = output / f".{STUDENT}.part", output / STUDENT
    shutil.rmtree(part, ignore_errors=True)
    student.save_pretrained(part, state_dict=state)
    parts.tokenizer.save_pretrained(part)
    sync_folder(part)
    shutil.rmtree(target, ignore_errors=True)  # of the same training: the same weights
    part.rename(target)
