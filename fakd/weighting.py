"""Weights of the terms that change while a student learns: schedules, and balance."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# What a schedule multiplies a weight by, from the share of the training that is done, 0 to 1.
SCHEDULES = {
    "constant": lambda done: 1.0,
    "fall": lambda done: 1.0 - done,
    "rise": lambda done: done,
}
# A weight's name in the config -> the part of the distiller that has it, its attribute there, and
# the name of the term in the logs.
WEIGHTS = {
    "task_weight": ("", "task_weight", "task"),
    "alpha": ("output", "kl_weight", "soft"),
    "beta": ("feature", "cosine_weight", "cosine"),
    "gamma": ("attention", "weight", "attention"),
    "delta": ("feature", "euclidean_weight", "euclidean"),
}
_MEMORY = 0.95  # of the running means of terms, about the last 20 steps


class Weighting(nn.Module):
    """Sets the weights of a distiller's losses before each step.

        weight = configured weight * schedule(share of the training that is done)
                 [* 1 / running mean of the term, where terms are balanced]

    Balanced, a weight says what a term is worth beside the others, whatever its unit: a term whose
    mean is 40 and one whose mean is 0.4 pull alike. The means are state: checkpoints have them.

    Args:
        schedules: for some weights ("task_weight", "alpha", "beta", "gamma", "delta"): "constant",
            "fall" (linearly to 0) or "rise" (linearly from 0); the others stay.
        is_balanced: see above.
    """

    means: Tensor | None

    def __init__(self, schedules: Mapping[str, str] | None = None, is_balanced: bool = False):
        super().__init__()
        self.schedules = dict(schedules or {})
        self.is_balanced = is_balanced
        # Of each term, in the order of WEIGHTS; 0: none was seen.
        self.register_buffer("means", torch.zeros(len(WEIGHTS)) if is_balanced else None)
        self._configured: dict[str, float] = {}

    def begin(self, distiller: nn.Module, done: float) -> None:
        """Set the weights for a step.

        Args:
            distiller: has the losses.
            done: the share of the training that is done, between 0 and 1.
        """
        if not self.schedules and not self.is_balanced:
            return
        means = self.means.tolist() if self.is_balanced else [0.0] * len(WEIGHTS)
        for (name, (part, attribute, _)), mean in zip(WEIGHTS.items(), means, strict=True):
            owner = _owner(distiller, part, attribute)
            if owner is None:
                continue
            owner, attribute = owner
            configured = self._configured.setdefault(name, getattr(owner, attribute))
            factor = SCHEDULES[self.schedules.get(name, "constant")](done)
            setattr(owner, attribute, configured * factor / (mean or 1.0))

    def end(self, logs: Mapping[str, Tensor]) -> None:
        """Take note of the terms of a step: means over all processes, so that all agree."""
        if not self.is_balanced:
            return
        for index, (_, _, term) in enumerate(WEIGHTS.values()):
            if term in logs:
                value = logs[term].detach().float().abs()
                before = self.means[index]
                mean = torch.where(before == 0, value, _MEMORY * before + (1 - _MEMORY) * value)
                self.means[index] = mean


def _owner(distiller: nn.Module, part: str, attribute: str) -> tuple[nn.Module, str] | None:
    """Where a weight is; that of labels may be in the pass over the LM heads."""
    if part:
        owner = getattr(distiller, part)
        return None if owner is None else (owner, attribute)
    if getattr(distiller.output, "ce_weight", 0) > 0:
        return distiller.output, "ce_weight"
    return distiller, attribute
