"""The training loop, top to bottom."""

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from .config import TrainConfig
from .distiller import DistillerOutput

LogLine = dict[str, float]


class NonFiniteLoss(FloatingPointError):
    """A loss became NaN or infinite; the message names the term."""


def train(
    distiller: nn.Module,
    batches: DataLoader | Sequence[dict],
    config: TrainConfig,
    *,
    log_path: Path | None = None,
    console: Console | None = None,
    title: str = "training",
) -> list[LogLine]:
    """Take one optimiser step for each batch.

    Args:
        distiller: a `Distiller`, or any module that returns its `.loss` and `.logs`; trained in
            place, on the device that accelerate picks.
        batches: what `distiller` takes as keywords, one entry per step; its length is the number
            of steps.
        config: see `TrainConfig`.
        log_path: where to write one JSON object per line of the log.
        console: where to draw a progress bar; None draws none.
        title: what the progress bar says.

    Returns:
        The log: step, loss, every term unweighted and weighted, learning rate and seconds per
        step, each a mean over the steps since the line before.

    Raises:
        NonFiniteLoss: before the gradients of such a loss reach the weights.
    """
    torch.manual_seed(config.seed)
    steps = len(batches)
    if steps == 0:
        raise ValueError("batches must hold at least one step: got none; pass more data.")
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(_parameter_groups(distiller, config), lr=config.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, int(config.warmup * steps), steps)
    distiller, optimizer, batches = accelerator.prepare(distiller, optimizer, batches)
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]

    distiller.train()
    log = _Log(config.log_every, steps, log_path)
    with log, _progress_bar(console) as bar:
        task = bar.add_task(title, total=steps, loss=float("nan"))
        for step, batch in enumerate(batches, start=1):
            output = distiller(**batch)
            stop_if_not_finite(output, step)
            accelerator.backward(output.loss)
            accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            log.add(step, output, learning_rate=schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update(task, advance=1, loss=log.last_loss)
    return log.lines


def stop_if_not_finite(output: DistillerOutput, step: int) -> None:
    """Raise before a broken loss spoils the weights.

    Reads one number from the device in every step: the price of never having to go back.
    """
    if torch.isfinite(output.loss):
        return
    values = {name: float(value) for name, value in output.logs.items()}
    unweighted = {name: values[name] for name in values if not name.startswith("weighted_")}
    broken = [name for name, value in unweighted.items() if not abs(value) < float("inf")]
    listed = ", ".join(f"{name} = {value:g}" for name, value in unweighted.items())
    raise NonFiniteLoss(
        f"the loss must stay finite: got {float(output.loss.detach()):g} in step {step}, from "
        f"{' and '.join(broken) or 'the sum of the terms'} ({listed}); lower the learning rate, "
        "or look at that batch."
    )


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[dict]) -> list[int]:
    """The class of each row, in eval mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    classes: list[int] = []
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        classes += model(**inputs).logits.argmax(dim=-1).tolist()
    model.train(was_training)
    return classes


class _Log:
    """Means between two lines of the log, kept and written as they come."""

    def __init__(self, every: int, steps: int, path: Path | None) -> None:
        self.lines: list[LogLine] = []
        self.last_loss = float("nan")
        self._every, self._steps, self._path = every, steps, path
        self._files = ExitStack()
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def __enter__(self) -> "_Log":
        self._file = None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._files.enter_context(self._path.open("w", encoding="utf-8"))
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self._files.close()

    def add(self, step: int, output: DistillerOutput, learning_rate: float) -> None:
        for name, value in {"loss": output.loss.detach(), **output.logs}.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._count += 1
        if step % self._every and step != self._steps:
            return
        # The one place where the terms reach the host.
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        now = time.perf_counter()
        seconds = (now - self._began) / self._count
        line = {"step": step, **means, "learning_rate": learning_rate, "step_seconds": seconds}
        self.lines.append(line)
        self.last_loss = means["loss"]
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._sums, self._count, self._began = {}, 0, now


def _parameter_groups(module: nn.Module, config: TrainConfig) -> list[dict]:
    """Matrices decay; biases and norms do not."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in learned if parameter.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in learned if parameter.dim() < 2],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def _progress_bar(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        disable=console is None,
    )
