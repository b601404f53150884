"""Checkpoints that survive anything: written aside, synced, renamed, and verified before use.

<folder>/step-00000120/  model.safetensors      the student and the projections
                         optimizer.safetensors  state of AdamW by parameter name
                         progress.json          step, schedule, settings of the optimizer, scores
                         manifest.json          size and SHA-256 of the files above
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.optim.lr_scheduler import LRScheduler

from .files import digest, sync, sync_folder

_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_PROGRESS, _MANIFEST = "progress.json", "manifest.json"


class BadCheckpoint(ValueError):
    """A checkpoint that must not be used; the message names it and says why."""


class Checkpoints:
    """The checkpoints of one training: the last few, and the one with the best score.

    Args:
        folder: receives a folder for each checkpoint; made when the first is written.
        keep: how many of the last are kept, > 0.
        identity: what the training is, by name a hash of each part, such as "settings" and "data";
            a checkpoint of another training is refused, with the names of what differs.
        evaluate: gives the scores of the student as it is, by name; called in every process before
            each checkpoint. None scores nothing: there is no best one then.
        worth: what the best of them has most of, from its scores.
        console: where refusals are said.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        identity: Mapping[str, str],
        evaluate: Callable[[], dict[str, float]] | None = None,
        worth: Callable[[dict[str, float]], float] | None = None,
        console: Console | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1: got {keep}; raise it.")
        self.folder = folder
        self._keep = keep
        self._identity = dict(identity)
        self._evaluate, self._worth = evaluate, worth
        self._console = console
        # What was found whole, or written, by this process: hashing gigabytes takes seconds.
        self._whole: dict[Path, dict] = {}

    def save(
        self,
        accelerator: Accelerator,
        distiller: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        step: int,
        *,
        is_scored: bool = True,
    ) -> dict[str, float] | None:
        """Write the state after `step` steps; a collective of all processes.

        Returns:
            Its scores. One that is not scored is never the best.

        Raises:
            OSError: the disk refuses; the checkpoints before are still there, whole.
        """
        scores = self._evaluate() if is_scored and self._evaluate is not None else None
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True
        )
        model_state, optimizer_state = get_state_dict(distiller, _plain(optimizer), options=options)
        if accelerator.is_main_process:
            moments, settings = _tensors_and_rest(optimizer_state)
            progress = {
                "step": step,
                "identity": self._identity,
                "scores": scores,
                "optimizer": settings,
                "schedule": schedule.state_dict(),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            }
            self._write(step, model_state, moments, progress)
            self._prune()
        accelerator.wait_for_everyone()
        return scores

    def restore(
        self,
        accelerator: Accelerator,
        distiller: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
    ) -> int:
        """Go on from the last checkpoint that is whole; a collective of all processes.

        Returns:
            Steps that are done: 0 where there is no checkpoint. One that is damaged or not of this
            training is refused by name, and the one before it is used.
        """
        for path in reversed(self.paths()):
            try:
                progress = self.verified(path)
            except BadCheckpoint as error:
                if self._console is not None and accelerator.is_main_process:
                    self._console.print(f"[yellow]refused:[/] {error}", soft_wrap=True)
                continue
            state = load_file(path / _OPTIMIZER) | progress["optimizer"]
            set_state_dict(
                distiller,
                _plain(optimizer),
                model_state_dict=load_file(path / _MODEL),
                optim_state_dict=state,
                # A flat optimizer state is recognised by itself, and refused with its own option.
                options=StateDictOptions(full_state_dict=True, cpu_offload=True),
            )
            schedule.load_state_dict(progress["schedule"])
            if accelerator.scaler is not None and progress["scaler"] is not None:
                accelerator.scaler.load_state_dict(progress["scaler"])
            return progress["step"]
        return 0

    def paths(self) -> list[Path]:
        """Folders of all checkpoints, by step; not verified."""
        return sorted(self.folder.glob("step-*"))

    def last(self) -> Path:
        """The whole checkpoint of the most steps.

        Raises:
            BadCheckpoint: there is none.
        """
        for path in reversed(self.paths()):
            with suppress(BadCheckpoint):
                self.verified(path)
                return path
        raise BadCheckpoint(f"{self.folder} must hold a whole checkpoint: got none; train again.")

    def best(self) -> Path | None:
        """The whole checkpoint that is worth most, the last of equals; None without scores."""
        found = []
        for path in self.paths():
            with suppress(BadCheckpoint):
                progress = self.verified(path)
                if progress["scores"] is not None and self._worth is not None:
                    found.append((self._worth(progress["scores"]), progress["step"], path))
        return max(found)[2] if found else None

    def student_state(self, path: Path) -> dict[str, Tensor]:
        """The student's weights in a checkpoint, without the projections."""
        prefix = "student."
        state = load_file(path / _MODEL)
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    def verified(self, path: Path) -> dict:
        """What progress.json says, after every file was found whole and of this training.

        Raises:
            BadCheckpoint: naming the checkpoint and what is wrong with it.
        """
        if path in self._whole:
            return self._whole[path]
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            files = manifest["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadCheckpoint(
                f"checkpoint {path.name} must have a readable {_MANIFEST}: got "
                f"{type(error).__name__}; it is not used."
            ) from None
        _check_file(path, _PROGRESS, files)
        progress = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
        theirs = progress["identity"]
        theirs = theirs if isinstance(theirs, dict) else {}
        changed = [name for name, ours in self._identity.items() if theirs.get(name) != ours]
        if changed:
            raise BadCheckpoint(
                f"checkpoint {path.name} must be of this training: got one of other "
                f"{' and '.join(changed)}; it is not used."
            )
        for name in (_MODEL, _OPTIMIZER):  # gigabytes, unlike the above
            _check_file(path, name, files)
        self._whole[path] = progress
        return progress

    def _write(
        self, step: int, model_state: Mapping[str, Tensor], moments: dict, progress: dict
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        halves = [p for p in self.paths() if not (p / _MANIFEST).exists()]
        # Of a run that was killed while it wrote, or deleted.
        for leftover in (*self.folder.glob(".part-*"), *halves):
            shutil.rmtree(leftover, ignore_errors=True)
        part = self.folder / f".part-{step:08d}"
        part.mkdir()
        try:
            # Tied weights are there once: the distiller sees to that.
            save_file({k: v.contiguous() for k, v in model_state.items()}, part / _MODEL)
            save_file(moments, part / _OPTIMIZER)
            (part / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
            files = {name: digest(part / name) for name in (_MODEL, _OPTIMIZER, _PROGRESS)}
            (part / _MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
            sync_folder(part)
            target = self.folder / f"step-{step:08d}"
            shutil.rmtree(target, ignore_errors=True)  # one that was refused
            part.rename(target)
            sync(self.folder)
            self._whole[target] = progress
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def _prune(self) -> None:
        """Delete all but the last `keep` and the best; those that are refused count for nothing."""
        ours = [path for path in self.paths() if self._is_ours(path)]
        spared = {self.best(), *ours[-self._keep :]}
        for path in ours:
            if path not in spared:
                # The manifest first: half a folder must not look like a checkpoint.
                self._whole.pop(path, None)
                (path / _MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)

    def _is_ours(self, path: Path) -> bool:
        with suppress(BadCheckpoint):
            return bool(self.verified(path))
        return False


def _check_file(path: Path, name: str, files: Mapping[str, str]) -> None:
    if not (path / name).is_file() or digest(path / name) != files.get(name):
        raise BadCheckpoint(
            f"checkpoint {path.name} must have {name} as it was written: got another one or none; "
            "it is not used."
        )


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _tensors_and_rest(state: Mapping[str, object]) -> tuple[dict[str, Tensor], dict]:
    tensors = {k: v.contiguous() for k, v in state.items() if isinstance(v, Tensor)}
    return tensors, {k: v for k, v in state.items() if not isinstance(v, Tensor)}
