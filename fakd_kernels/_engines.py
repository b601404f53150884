"""Which engine serves a call: what is usable here, who is asked first, and why, in words.

An engine is one way to compute the same contract. Every op lists, per engine, what keeps that
engine from serving a given call (`Refusals`); the first engine in `PREFERENCE` that refuses
nothing serves it. A forced engine that refuses raises: nothing falls back in silence.
"""

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from . import _extension

NAMES = ("reference", "cpu", "triton", "cuda")
# The rule of which engine serves what: asked in this order by device type, `engine=` overrides it.
# "reference" serves every device and comes last.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
# Where another is faster, on an H100 in bfloat16. Rows of scores are Triton's: 2048 x 32000 logits
# take 0.21 ms against 0.41, maps of 4096 keys 4.1 against 5.6. Rows of features are CUDA's: 12 x
# 4096 of 768 columns take 0.10 ms against 0.18, in one launch whatever their dtypes and widths.
PREFERENCE_OF = {"feature_alignment": {"cuda": ("cuda", "triton", "reference")}}

Refusals = dict[str, str | None]  # engine -> why it cannot serve this call, None if it can


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine can be used in this process, and the reason in words."""

    name: str
    is_usable: bool
    reason: str


class EngineTable(Mapping[str, EngineStatus]):
    """Engine name -> status; prints as one line per engine."""

    def __init__(self, statuses: list[EngineStatus]) -> None:
        self._statuses = {status.name: status for status in statuses}

    def __getitem__(self, name: str) -> EngineStatus:
        return self._statuses[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statuses)

    def __len__(self) -> int:
        return len(self._statuses)

    def __repr__(self) -> str:
        return "\n".join(
            f"{status.name:<9} {'usable' if status.is_usable else 'absent'}: {status.reason}"
            for status in self._statuses.values()
        )


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_import_error() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install triton >= 3.6"
    return None


def triton_absent() -> str | None:
    """Why Triton kernels cannot run in this process, or None."""
    if (reason := _triton_import_error()) is not None:
        return reason
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; TRITON_INTERPRET=1 runs the kernels slowly on a CPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"the kernels need sm_80 or newer: got {torch.cuda.get_device_name()}"
    return None


def engines() -> EngineTable:
    """List the engines with what is usable in this process and the reason for what is not.

    Returns:
        A mapping from "reference", "cpu", "triton" and "cuda" to `EngineStatus`; printing it gives
        one line per engine.
    """
    triton = triton_absent()
    how = "Triton's interpreter, on CPU tensors (slow)" if interpreted() else "Triton on CUDA"
    return EngineTable(
        [
            EngineStatus("reference", True, "plain PyTorch in blocks of rows, on every device"),
            EngineStatus(
                "cpu",
                _extension.cpu_absent() is None,
                _extension.cpu_absent() or f"compiled C++ kernels, {_extension.cpu_isa()}",
            ),
            EngineStatus("triton", triton is None, triton or how),
            EngineStatus(
                "cuda",
                _extension.cuda_absent() is None,
                _extension.cuda_absent() or "compiled CUDA kernels",
            ),
        ]
    )


_DOUBLE = "float64 is served by the reference engine only"


def cpu_refusal(device: torch.device, is_double: bool) -> str | None:
    """Why the C++ engine cannot serve such tensors, None where it can."""
    if device.type != "cpu":
        return f"it serves CPU tensors, these are on {device.type}"
    return _DOUBLE if is_double else _extension.cpu_absent()


def triton_refusal(device: torch.device, is_double: bool) -> str | None:
    """Why Triton kernels cannot serve such tensors, None where they can."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"it serves CUDA tensors, these are on {device.type}"
    return _DOUBLE if is_double else triton_absent()


def cuda_refusal(device: torch.device, is_double: bool) -> str | None:
    """Why the CUDA kernels cannot serve such tensors, None where they can."""
    if device.type != "cuda":
        return f"it serves CUDA tensors, these are on {device.type}"
    return _DOUBLE if is_double else _extension.cuda_absent()


def requested(engine: str | None) -> str | None:
    """The engine asked for by the argument, else by FAKD_ENGINE, else None for a free choice."""
    name = engine or os.environ.get("FAKD_ENGINE") or None
    if name is not None and name not in NAMES:
        source = "engine" if engine else "FAKD_ENGINE"
        raise ValueError(
            f"{source} must be one of {', '.join(map(repr, NAMES))}: got {name!r}; "
            "choose one or leave it out."
        )
    return name


def choose(op: str, device: torch.device, refusals: Refusals, engine: str | None) -> str:
    """The engine that serves this call; raises RuntimeError if a forced one cannot."""
    name = requested(engine)
    if name is not None:
        if (reason := refusals.get(name, f"{op} has no {name} engine")) is not None:
            raise RuntimeError(
                f"engine={name!r} must be able to serve {op}: {reason}; "
                "leave engine out to let fakd_kernels choose."
            )
        return name
    preference = PREFERENCE | PREFERENCE_OF.get(op, {})
    for name in preference.get(device.type, ("reference",)):
        if name in refusals and refusals[name] is None:
            if name == "reference":
                _warn_slow(op, device.type)
            return name
    return "reference"


def _warn_slow(op: str, device_type: str) -> None:
    """Say it once where a faster engine would have served, had it been built or installed."""
    absent = {"cpu": _extension.cpu_absent, "cuda": triton_absent}.get(device_type)
    if absent is not None and (reason := absent()) is not None:
        _warn_once(f"{op} runs on the slower reference engine: {reason}.")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


_EXPLAINERS: dict[str, Callable[..., str]] = {}


def register_explainer(function: Callable, lower: Callable, explain: Callable[..., str]) -> None:
    """Let `explain` serve a public function.

    Args:
        function: the op's public function, whose name and arguments it has.
        lower: makes of these arguments, by name, those of the registered op, first in a tuple.
        explain: takes these and gives the words.
    """

    def explainer(*tensors: object, **options: object) -> str:
        bound = inspect.signature(function).bind(*tensors, **options)
        bound.apply_defaults()
        return explain(*lower(**bound.arguments)[0])

    _EXPLAINERS[function.__name__] = explainer


def explain(op: str, *tensors: object, **options: object) -> str:
    """Say which engine would serve a call, and why not the others; nothing is computed.

    Args:
        op: name of a public function of this package, such as "feature_alignment".
        *tensors: the positional arguments of that call.
        **options: its keyword arguments.

    Returns:
        A few lines of plain words.

    Raises:
        ValueError: op is unknown. Others as the call itself would raise them.
    """
    if op not in _EXPLAINERS:
        raise ValueError(
            f"op must be one of {', '.join(sorted(_EXPLAINERS))}: got {op!r}; choose one."
        )
    return _EXPLAINERS[op](*tensors, **options)


def describe(op: str, chosen: str, refusals: Refusals) -> list[str]:
    """The lines every explainer begins with."""
    lines = [f"{op}: served by the {chosen} engine."]
    for name in NAMES:
        if name == chosen:
            continue
        reason = refusals.get(name, f"{op} has no {name} engine")
        lines.append(f"  not {name}: {reason or 'it could serve, but is asked later'}")
    return lines
