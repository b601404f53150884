"""What the loss costs: the fused one beside the same lines in plain PyTorch.

Run as a module it measures the peak memory of one loss in a process of its own.
"""

import copy
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fakd_kernels import FeatureAlignment

from .architectures import hidden_width
from .config import RunConfig
from .data import collate, plan
from .distiller import Distiller
from .losses import FeatureAlignmentLoss
from .parts import build, make_distiller

LOSSES = ("fused", "eager")


@dataclass(frozen=True)
class Shape:
    """The sizes of one call of the loss."""

    rows: int  # texts in a batch
    tokens: int  # of each text
    student_width: int
    teacher_width: int
    pairs: int


@dataclass(frozen=True)
class Cost:
    """What training with one of the losses costs."""

    step_ms: float  # a whole step: teacher, student, loss, backward, AdamW; median
    loss_ms: float  # the loss alone, forward and backward; median
    loss_peak_bytes: int | None  # what the loss adds to the memory of its process at its peak


@dataclass(frozen=True)
class Costs:
    """What both losses cost in the same training."""

    by_loss: dict[str, Cost]
    setting: str  # what was measured, in words


class EagerFeatureAlignmentLoss(FeatureAlignmentLoss):
    """`FeatureAlignmentLoss` as users write it by hand: the baseline of measurements."""

    @classmethod
    def like(cls, loss: FeatureAlignmentLoss) -> "EagerFeatureAlignmentLoss":
        """The same settings and projections."""
        twin = cls(
            loss.student_dims,
            loss.teacher_dims,
            projection=loss.projection,
            bias=any(name.endswith("bias") for name in loss.state_dict()),
            cosine_weight=loss.cosine_weight,
            euclidean_weight=loss.euclidean_weight,
            euclidean=loss.euclidean,
            pair_weights=loss.pair_weights,
            eps=loss.eps,
        )
        twin.load_state_dict(loss.state_dict())
        return twin

    def forward(
        self,
        student_hiddens: Sequence[Tensor],
        teacher_hiddens: Sequence[Tensor],
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> FeatureAlignment:
        """See `FeatureAlignmentLoss.forward`."""
        cosines, euclideans = [], []
        for index, (x, t) in enumerate(zip(student_hiddens, teacher_hiddens, strict=True)):
            projection = self._projection(index)
            p = x if projection is None else projection(x)
            cosine = 1 - F.cosine_similarity(p, t, dim=-1, eps=self.eps)
            if self.euclidean == "squared":
                euclidean = (p - t).square().mean(dim=-1)
            else:
                euclidean = (p - t).norm(dim=-1)
            weights = torch.ones_like(cosine) if mask is None else mask.to(cosine.dtype)
            count = weights.sum() if normalizer is None else normalizer
            cosines.append((cosine * weights).sum() / count)
            euclideans.append((euclidean * weights).sum() / count)
        cosine, euclidean = torch.stack(cosines), torch.stack(euclideans)
        pair_weights = cosine.new_tensor(self.pair_weights or [1 / self.pairs] * self.pairs)
        terms = self.cosine_weight * cosine + self.euclidean_weight * euclidean
        return FeatureAlignment((pair_weights * terms).sum(), cosine.detach(), euclidean.detach())


def measure_costs(config: RunConfig, rounds: int) -> Costs:
    """Whole steps of a training, and its loss of features alone, fused and eager in turn.

    Args:
        config: a training that aligns hidden states.
        rounds: steps of each kind that are timed.

    Raises:
        ValueError: a training that does not. Others as `build` does.
    """
    parts = build(config)
    distiller = make_distiller(config, parts)
    if distiller.feature is None:
        raise ValueError(
            f"the loss of features must be learned from to be timed: got distill.beta = "
            f"{config.distill.beta:g} and distill.delta = {config.distill.delta:g}; raise one."
        )
    indices = plan(parts.prepared, config.data, 1, None, config.train.seed)[0]
    rows = [parts.prepared.train[index] for index in indices]
    batch = collate(parts.tokenizer, config.task)(rows)
    shape = Shape(
        *batch["input_ids"].shape,
        hidden_width(distiller.student),
        hidden_width(distiller.teacher),
        len(distiller.pairs),
    )
    steps = {}
    for kind in LOSSES:
        twin = copy.deepcopy(distiller)
        if kind == "eager":
            twin.feature = EagerFeatureAlignmentLoss.like(twin.feature)
        steps[kind] = _step_call(twin.train(), batch)
    step_ms = interleaved_medians(steps, rounds)
    loss_ms = interleaved_medians({kind: loss_call(kind, shape) for kind in LOSSES}, 5 * rounds)
    costs = {k: Cost(step_ms[k], loss_ms[k], loss_peak_bytes(k, shape)) for k in LOSSES}
    return Costs(costs, _describe(shape, rounds))


def _step_call(distiller: Distiller, batch: dict) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        distiller(**batch).loss.backward()
        optimizer.step()

    return step


def _describe(shape: Shape, rounds: int) -> str:
    return (
        f"Batch of {shape.rows} x {shape.tokens} tokens, {shape.pairs} layer pairs, "
        f"{shape.student_width} to {shape.teacher_width} wide, float32, "
        f"{torch.get_num_threads()} threads; medians over {rounds} steps and {5 * rounds} calls of "
        "the loss, both losses in turn. A step is teacher, student, all losses, backward and "
        "AdamW. Peak memory is what forward and backward of the loss of features add to the "
        "resident memory of a process of their own, gradients included."
    )


def interleaved_medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call: the median over rounds in which every call has its turn.

    Taking turns shares out whatever else the machine is doing at the moment.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def loss_call(kind: str, shape: Shape) -> Callable[[], object]:
    """Forward and backward of one loss on random hidden states of this shape."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.rows, shape.tokens)
    students = [
        torch.randn(*size, shape.student_width, generator=generator).requires_grad_()
        for _ in range(shape.pairs)
    ]
    teachers = [
        torch.randn(*size, shape.teacher_width, generator=generator) for _ in range(shape.pairs)
    ]
    loss = {"fused": FeatureAlignmentLoss, "eager": EagerFeatureAlignmentLoss}[kind](
        shape.student_width, shape.teacher_width, shape.pairs
    )
    leaves = [*students, *loss.parameters()]
    return lambda: torch.autograd.grad(loss(students, teachers).loss, leaves)


def loss_peak_bytes(kind: str, shape: Shape) -> int | None:
    """Peak memory of forward and backward, gradients included, in a process of its own.

    The highest resident memory of the process during the second of two calls, less what it held
    just before. None where the process could not be measured.
    """
    # A fixed threshold makes malloc return every larger block at once, so that what an earlier
    # call left in the heap cannot hide what this one takes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", __name__, kind, json.dumps(asdict(shape))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def _peak_of_one_call(kind: str, shape: Shape) -> int:
    call = loss_call(kind, shape)
    call()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # forget the highest resident memory so far (Linux)
    before = _resident_bytes()
    result = call()
    peak = _peak_bytes()
    del result
    return max(0, peak - before)


def _resident_bytes() -> int:
    return _status_bytes("VmRSS") or _peak_bytes()


def _peak_bytes() -> int:
    # Kilobytes, except on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return _status_bytes("VmHWM") or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status_bytes(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    match = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    return 1024 * int(match[1]) if match else None


if __name__ == "__main__":
    sys.stdout.write(f"{_peak_of_one_call(sys.argv[1], Shape(**json.loads(sys.argv[2])))}\n")
