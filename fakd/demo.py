"""The demos: comparisons whose settings, models and texts come with packages."""

from collections.abc import Sequence
from pathlib import Path

from .compare import CompareConfig, load_comparison
from .config_file import Override
from .losses.shared import check_choice

_FOLDER = Path(__file__).parent / "demos"
# A run of seconds; its scores mean nothing.
_QUICK = {
    "r8": ("teacher.steps=4", "teacher.data.test_rows=128", "base.data.test_rows=128"),
    "sotu": ("base.data.test_rows=4", "base.data.max_tokens=32"),
}


def load_demo(
    name: str, overrides: Sequence[Override] = (), *, is_quick: bool = False
) -> CompareConfig:
    """The settings of a demo, some of them changed.

    Args:
        name: "r8": encoders, on news of 8 classes. "sotu": causal language models, on speeches.
        overrides: as for `load_comparison`.
        is_quick: take a few steps only, which shows that everything works.

    Raises:
        ValueError: another name, or settings that cannot be.
    """
    check_choice("the demo", name, tuple(_QUICK))
    quick = (*_QUICK[name], "base.steps=6", "timed_steps=2") if is_quick else ()
    return load_comparison(_FOLDER / f"{name}.yaml", [*quick, *overrides])
