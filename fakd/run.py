"""One training from its settings: build, train, score, keep."""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from .checkpoint import Checkpoints
from .config import RunConfig
from .config_file import ConfigError, to_yaml
from .data import collate, plan, split
from .distribute import join, unsharded
from .evaluate import Evaluation, evaluate
from .files import sync_folder, write_whole
from .libraries import environment, quieten_libraries
from .parts import Parts, build, make_distiller
from .run_folder import (
    BASELINE,
    BEST_STUDENT,
    CHECKPOINTS,
    CONFIG,
    ERRORS,
    LOG,
    RESULTS,
    STUDENT,
    TRACKED,
    check_output,
    identity,
)
from .stopping import Stopped, StopSignals
from .teacher_cache import RowsWithTeacher, collate_with_teacher
from .train import LogLine, train
from .train_log import in_words

TEACHER, START = "teacher", "student at the start"


@dataclass(frozen=True)
class RunResults:
    """What a training came to."""

    data: str
    # By metric; empty without a teacher.
    teacher: dict[str, float]
    start: dict[str, float]  # the student before its training
    student: dict[str, float]
    best_step: int | None  # of the checkpoint with the best first metric, which chose by `rows`
    steps: int
    parameters: dict[str, int]
    # What each model has, "student" and "teacher": blocks, and features of a hidden state.
    layers: dict[str, int]
    widths: dict[str, int]
    # Aligned layers of hidden states, (student's, teacher's).
    pairs: list[tuple[int, int]]
    seconds: float  # of this call
    environment: str
    best: dict[str, float] = field(default_factory=dict)  # scores of `best_step`
    rows: str = ""  # a hash of the held-out rows: errors of equal ones are compared one by one


def run(
    config: RunConfig,
    console: Console,
    *,
    title: str = "student",
    known: Mapping[str, dict[str, float]] | None = None,
) -> tuple[RunResults | None, list[LogLine]]:
    """Train as `config` says, or go on with it where the same call was interrupted.

    Args:
        config: see `RunConfig`.
        console: where progress goes; the main process alone speaks.
        title: of the progress bar.
        known: scores of `TEACHER` and `START` that need not be found, nor said, again.

    Returns:
        The results (None but in the main process), and the log. `config.output` receives
        config.yaml (all settings), log.jsonl, scores.jsonl (of checkpoints), results.json,
        errors.json (of each held-out row, see `Evaluation`), checkpoints/ and student/, a folder
        that `AutoModel.from_pretrained` reads; student-best/ too if an earlier one was better.

    Raises:
        ConfigError: the output folder holds another training. Others as `build` and `train` do; all
            before any training but `NonFiniteLoss`, `Stopped`, and OSError where the disk refuses
            later.
    """
    quieten_libraries()
    accelerator = _join(config)
    console = console if accelerator.is_main_process else Console(quiet=True)
    with StopSignals(accelerator.is_main_process) as signals:
        try:
            return _run(config, accelerator, console, title, known or {}, signals)
        except Stopped as stopped:
            console.print(str(stopped), soft_wrap=True)
            raise


def _run(
    config: RunConfig,
    accelerator: Accelerator,
    console: Console,
    title: str,
    known: Mapping[str, dict[str, float]],
    signals: StopSignals,
) -> tuple[RunResults | None, list[LogLine]]:
    began = time.perf_counter()
    with accelerator.main_process_first():
        check_output(config)
        parts = build(config)
    if not known:
        console.print(parts.prepared.describe(), soft_wrap=True)
    same = identity(config, parts)
    distiller = make_distiller(config, parts)
    planned = plan(parts.prepared, config.data, config.steps, config.epochs, config.train.seed)
    mine = split(
        planned, accelerator.num_processes, accelerator.process_index, config.train.accumulation
    )
    # Before anything is sharded: a model is whole in every process.
    baseline = _baseline(config.output / BASELINE, same, parts, accelerator, known)
    if accelerator.is_main_process:
        write_whole(config.output / CONFIG, to_yaml(config))
        for name, scores in baseline.items():
            if name not in known:
                console.print(f"{name}: {in_words(scores)}", soft_wrap=True)

    def score() -> dict[str, float]:
        with unsharded(distiller):
            found = _evaluate(distiller.student, parts, accelerator)
        if accelerator.is_main_process:
            # Before the checkpoint of the same step, so that the last one's are there in the end.
            write_whole(config.output / ERRORS, json.dumps(found.errors))
        return found.scores

    metric, sign = parts.prepared.metrics[0], 1 if parts.prepared.is_greater_better else -1
    checkpoints = Checkpoints(
        config.output / CHECKPOINTS,
        config.train.keep,
        identity=same,
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
        title=title,
        checkpoints=checkpoints,
        signals=signals,
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
            best=checkpoints.verified(best)["scores"],
            rows=parts.prepared.rows_hash(),
            steps=len(planned),
            parameters={
                role: sum(parameter.numel() for parameter in model.parameters())
                for role, model in (("teacher", parts.teacher), ("student", parts.student))
                if model is not None
            },
            layers=parts.layers,
            widths=parts.widths,
            pairs=distiller.pairs,
            seconds=time.perf_counter() - began,
            environment=environment(),
        )
        kept = {STUDENT: last} | ({} if best == last else {BEST_STUDENT: best})
        for name, path in kept.items():
            state = checkpoints.student_state(path)
            _save_student(distiller.student, state, parts, config.output / name)
        write_whole(config.output / RESULTS, json.dumps(dataclasses.asdict(results), indent=1))
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return results, log


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


def _baseline(
    path: Path,
    same: Mapping[str, str],
    parts: Parts,
    accelerator: Accelerator,
    known: Mapping[str, dict[str, float]],
) -> dict[str, dict[str, float]]:
    """Scores of the teacher and of the student before; read again where this training wrote them.

    `same` is what makes it this training.
    """
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    accelerator.wait_for_everyone()  # all have looked before one writes
    if written.get("identity") == same:
        return written["scores"]
    scores = {} if parts.cache is None else {TEACHER: parts.cache.scores}
    for name, model in {TEACHER: parts.teacher, START: parts.student}.items():
        if name in known:
            scores[name] = known[name]
        elif model is not None:
            scores[name] = _evaluate(model.to(accelerator.device), parts, accelerator).scores
    if accelerator.is_main_process:
        write_whole(path, json.dumps({"identity": same, "scores": scores}, indent=1))
    accelerator.wait_for_everyone()
    return scores


def _evaluate(model: nn.Module, parts: Parts, accelerator: Accelerator) -> Evaluation:
    return evaluate(model, parts.prepared, parts.tokenizer, accelerator=accelerator)


def _save_student(student: nn.Module, state: dict, parts: Parts, target: Path) -> None:
    """The student as a folder of its own, without teacher and projections."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    student.save_pretrained(part, state_dict=state)
    parts.tokenizer.save_pretrained(part)
    sync_folder(part)
    shutil.rmtree(target, ignore_errors=True)  # of the same training: the same weights
    part.rename(target)
