"""The training loop, top to bottom."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import gather_object, send_to_device
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from .broken_loss import NonFiniteLoss, stop_all
from .config import TrainConfig
from .distribute import gradient_sync, join, prepare
from .stopping import StopSignals
from .train_log import LogLine, TrainLog

__all__ = ["LogLine", "NonFiniteLoss", "Resumes", "train"]


class Resumes(Protocol):
    """What keeps the state of a training, such as `fakd.checkpoint.Checkpoints`.

    Both methods are called in every process, with the distiller itself, not its wrapper.
    """

    def restore(
        self,
        accelerator: Accelerator,
        distiller: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
    ) -> int:
        """Load the last state, and say how many steps it had taken; 0: there is none."""

    def save(
        self,
        accelerator: Accelerator,
        distiller: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        step: int,
        *,
        is_scored: bool = True,
    ) -> None:
        """Keep the state after `step` steps; at once, without scores, if they are not wanted."""


def train(
    distiller: nn.Module,
    batches: DataLoader | Sequence[dict],
    config: TrainConfig,
    *,
    accelerator: Accelerator | None = None,
    log_path: Path | None = None,
    console: Console | None = None,
    title: str = "training",
    checkpoints: Resumes | None = None,
    signals: StopSignals | None = None,
) -> list[LogLine]:
    """Take one optimiser step for each `config.accumulation` micro-batches of every process.

    A step depends on its rows alone, not on how they are split: every term is a mean over all
    that counts in the micro-batches of all processes, and so are the gradients and the log.

    Args:
        distiller: a `Distiller`; trained in place, on the device of `accelerator`.
        batches: the micro-batches of this process in order, each what `distiller` takes as
            keywords, with the same entries in all; equally many in every process. The caller has
            split the rows over the processes.
        config: see `TrainConfig`.
        accelerator: one process, DDP or FSDP2; None makes one, with `config.mixed_precision`. What
            it tracks receives the lines of the log.
        log_path: where to write one JSON object per line of the log.
        console: where to draw a progress bar; None draws none.
        title: what the progress bar says.
        checkpoints: where to go on, if there is a state, and where to keep it: every
            `config.checkpoint_every` steps, after the last, and before `signals` stop it.
        signals: held until a step is done, in whichever process they arrive; None holds none.

    Returns:
        The log: step, loss, every term unweighted and weighted, learning rate and seconds per
        step, each a mean over the steps since the line before (or since the training went on). The
        main process also has, and writes, the lines from before it went on.

    Raises:
        NonFiniteLoss: in all processes, before the gradients of such a loss reach the weights; the
            micro-batch is saved beside the log.
        Stopped: in all processes, after the same step.
        ValueError: no whole number of steps, or another one in another process; an accelerator of
            another kind.
    """
    accelerator = accelerator or join(config.mixed_precision)
    signals = signals or StopSignals()
    steps = _count_steps(len(batches), config.accumulation)
    model = prepare(accelerator, distiller)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(_parameter_groups(parameters, config), lr=config.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, int(config.warmup * steps), steps)
    optimizer = accelerator.prepare_optimizer(optimizer)
    done = 0
    if checkpoints is not None:
        done = checkpoints.restore(accelerator, distiller, optimizer, schedule)
        if done and console is not None and accelerator.is_main_process:
            left = f"going on after step {done} of {steps}"
            console.print(left if done < steps else f"all {steps} steps are done: nothing to train")
    # DDP and FSDP average over the processes, and accelerate over the accumulation it knows of;
    # the parts of one loss must be added up.
    divisor = accelerator.num_processes * accelerator.gradient_accumulation_steps

    torch.manual_seed(config.seed)  # of the order of a shuffled DataLoader
    stream = _micro_batches(batches, done * config.accumulation, accelerator.device)
    bar = TrainLog(accelerator, config.log_every, steps, done, log_path, console, title)
    with bar as log, signals.held():
        for step in range(done + 1, steps + 1):
            model.train()
            distiller.weighting.begin(distiller, done=(step - 0.5) / steps)
            micro_batches = list(islice(stream, config.accumulation))
            # Dropout depends on the step alone: a training that goes on needs no state of
            # generators, whatever else drew numbers before.
            torch.manual_seed(_mix(config.seed, step, accelerator.process_index))
            normalizers = _sums(accelerator, [distiller.counts(**batch) for batch in micro_batches])
            terms = []
            for index, batch in enumerate(micro_batches, start=1):
                with gradient_sync(model, is_wanted=index == config.accumulation):
                    output = model(**batch, normalizers=normalizers)
                    accelerator.backward(divisor * output.loss)
                terms.append({"loss": output.loss.detach(), **output.logs})
            # All processes stop after the same step: what each has received travels with the terms.
            received = torch.full_like(terms[0]["loss"], float(signals.received is not None))
            means = _sums(accelerator, [{**each, "received": received} for each in terms])
            agreed = means.pop("received")
            # Reads one number from the device in every step: the price of never having to go back.
            if not torch.isfinite(means["loss"]):
                stop_all(accelerator, step, terms, micro_batches, log_path)
            distiller.weighting.end(means)
            accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            log.add(step, means, learning_rate=schedule.get_last_lr()[0])
            if not optimizer.step_was_skipped:  # by the loss scaler of fp16
                schedule.step()
            is_alone = accelerator.num_processes == 1
            is_stopped = signals.received is not None if is_alone else bool(agreed > 0)
            if checkpoints is not None:
                state = accelerator, distiller, optimizer, schedule, step
                if _is_due(step, steps, config.checkpoint_every):
                    log.add_scores(step, checkpoints.save(*state) or {})
                elif is_stopped:
                    # Who sends signals waits for seconds; scores may take minutes.
                    checkpoints.save(*state, is_scored=False)
            if is_stopped:
                raise signals.stopped(_in_words(step, steps, is_kept=checkpoints is not None))
    # Forward as it was, without the casts of mixed precision.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return log.lines


def _count_steps(micro_batches: int, accumulation: int) -> int:
    everywhere = gather_object([micro_batches])
    if len(set(everywhere)) > 1:
        raise ValueError(
            f"batches must be equally many in every process: got {everywhere}; split them evenly."
        )
    steps, rest = divmod(micro_batches, accumulation)
    if rest:
        raise ValueError(
            f"batches must hold whole steps of {accumulation} micro-batches: got {micro_batches}; "
            f"drop the last {rest}."
        )
    if steps == 0:
        raise ValueError("batches must hold at least one step: got none; pass more data.")
    return steps


def _micro_batches(batches, done: int, device: torch.device) -> Iterator[dict]:
    """Those that are left, on the device; the others are not loaded."""
    if isinstance(batches, DataLoader):
        left = skip_first_batches(batches, done) if done else batches
    else:
        left = (batches[index] for index in range(done, len(batches)))
    return (send_to_device(batch, device) for batch in left)


def _sums(accelerator: Accelerator, values: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[] for each name: the sum over the micro-batches of all processes."""
    total = torch.stack([torch.stack([*value.values()]) for value in values]).sum(0)
    total = accelerator.reduce(total, reduction="sum")
    return dict(zip(values[0], total.unbind(), strict=True))


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    return random.Random(repr(numbers)).getrandbits(63)


def _in_words(step: int, steps: int, is_kept: bool) -> str:
    kept = ", which is kept; the same command goes on from there" if is_kept else ""
    return f"stopped after step {step} of {steps}{kept}"


def _is_due(step: int, steps: int, every: int | None) -> bool:
    return step == steps or (every is not None and step % every == 0)


def _parameter_groups(parameters: Sequence[nn.Parameter], config: TrainConfig) -> list[dict]:
    """Matrices decay; biases and norms do not."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
