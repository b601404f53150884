"""Texts and blocks of tokens of the tiny vocabulary, and whether packages of real ones are here."""

from importlib import metadata

import torch
from torch import Tensor

from .models import VOCABULARY


def is_installed(*packages: str) -> bool:
    try:
        for package in packages:
            metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def words(count: int, step: int) -> str:
    """A text of so many words; another step gives other words."""
    return " ".join(f"w{index * step % 50}" for index in range(count))


def tiny_blocks(count: int = 7, tokens: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (count, tokens), generator=generator)
