"""What happens when a loss is NaN or infinite: all processes stop, and say where it came from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor


class NonFiniteLoss(FloatingPointError):
    """A loss became NaN or infinite; the message names the term."""


def stop_all(
    accelerator: Accelerator,
    step: int,
    terms: Sequence[Mapping[str, Tensor]],
    micro_batches: Sequence[Mapping[str, Tensor]],
    log_path: Path | None,
) -> NoReturn:
    """Raise the same error in every process, after saving the first micro-batch that is to blame.

    Args:
        accelerator: of the processes, which all call this.
        step: the number of the step.
        terms: the loss and the logs of each micro-batch of this process.
        micro_batches: what they come from.
        log_path: beside which the micro-batch is saved; None saves none.

    Raises:
        NonFiniteLoss: always.
    """
    broken = [i for i, values in enumerate(terms) if not _are_finite(values.values())]
    blamed = gather_object([accelerator.process_index] if broken else [])
    # Sums can overflow where no part does: the first micro-batch stands for all then.
    first = min(blamed, default=0)
    said = []
    if accelerator.process_index == first:
        index = broken[0] if broken else 0
        saved = _save(micro_batches[index], step, log_path)
        said = [_describe(step, terms[index]) + saved]
    raise NonFiniteLoss(gather_object(said)[0])


def _are_finite(values) -> bool:
    return all(bool(torch.isfinite(value)) for value in values)


def _describe(step: int, terms: Mapping[str, Tensor]) -> str:
    values = {k: float(v) for k, v in terms.items() if not k.startswith("weighted_")}
    loss = values.pop("loss")
    broken = [name for name, value in values.items() if not abs(value) < float("inf")]
    listed = ", ".join(f"{name} = {value:g}" for name, value in values.items())
    return (
        f"the loss must stay finite: got {loss:g} in step {step}, from "
        f"{' and '.join(broken) or 'the sum of the terms'} ({listed}); lower the learning rate, "
        "or look at that batch"
    )


def _save(batch: Mapping[str, Tensor], step: int, log_path: Path | None) -> str:
    """Save a micro-batch beside the log; the end of the message."""
    if log_path is None:
        return "."
    path = log_path.with_name(f"bad-batch-step-{step}.safetensors")
    tensors = {k: v.cpu().contiguous() for k, v in batch.items() if isinstance(v, Tensor)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    except OSError as error:
        return f" (it could not be saved to {path}: {error})."
    return f", saved to {path}."
